"""`mole bench train`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import counts, line, report


def train(
    shape: bench_options.Shape = "160m",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Cut the shape to so many blocks.")
    ] = None,
    experts: Annotated[str, typer.Option(help="Routed experts per layer, e.g. 4,16.")] = "4,16",
    tokens: Annotated[
        str, typer.Option(help="Tokens of a micro batch, multiples of --context.")
    ] = "2048,8192",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 2048,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Micro batches of a step. From 2 on, sharing expert outputs between them is "
            "measured too, and per-position is not.",
        ),
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each system.")] = 3,
    head: Annotated[
        bool, typer.Option(help="With the output head and its loss, or the blocks alone.")
    ] = True,
    peak: Annotated[
        bool, typer.Option(help="Measure peak memory as well, each in a process of its own.")
    ] = True,
    trainer: Annotated[
        bool,
        typer.Option("--trainer", help="Only measure the Trainer against a bare loop."),
    ] = False,
    dtype: bench_options.Dtype = "float32",
    device: options.Device = "cpu",
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Training steps on real text: dense, MoLE at unique ids, MoLE at every position.

    Forward and backward, no optimizer. Beside each measured ratio stands the same in FLOPs.

    Example: `mole bench train --layers 2 --tokens 2048,8192 --ids runs/novels --json train.json`
    """
    from lookup_experts.benchmarks.models import Case
    from lookup_experts.benchmarks.speed import TextWindows
    from lookup_experts.benchmarks.training import case_of_shape
    from lookup_experts.benchmarks.training_plot import draw_training
    from lookup_experts.commands.bench.report import dtype_of, id_stream
    from lookup_experts.errors import UserError

    sizes, numbers = counts(tokens), counts(experts)
    for size in sizes:
        if size % context:
            raise UserError(f"--tokens {size} is no multiple of --context {context}.")
    case = case_of_shape(
        shape, layers, context=context, head=head, dtype=dtype_of(dtype), device=device
    )
    windows = TextWindows(id_stream(ids, Case(shape), work))
    if trainer:
        results = _overhead(case, numbers, windows, sizes, rounds)
    else:
        results = _steps(case, numbers, windows, sizes, rounds, accumulate, peak)
    report("train", results, json, plot=None)
    if plot:
        draw_training(results, plot)


def _steps(
    case: Any,
    numbers: list[int],
    windows: Any,
    sizes: list[int],
    rounds: int,
    accumulate: int,
    peak: bool,
) -> list[dict[str, Any]]:
    from lookup_experts.benchmarks.training import Systems, measure_training
    from lookup_experts.benchmarks.training_memory import peak_bytes

    names = ("unique", "per_position") if accumulate == 1 else ("unique", "shared")
    keys = [("dense", None), *((name, count) for count in numbers for name in names)]
    results: list[dict[str, Any]] = []
    peaks: dict[Any, int] = {}
    if peak:  # first, while this process holds little
        measured = [(size, key) for size in sizes for key in keys]
        with console.progress_bar("Peak memory") as advance:
            for number, (size, key) in enumerate(measured):
                rows = size // case.context
                batches = [windows.take(rows, case.context + 1) for _ in range(accumulate)]
                peaks[size, key] = peak_bytes(case, *key, batches)
                advance(number + 1, len(measured))
    systems = Systems(case, keys)
    for size in sizes:
        with console.progress_bar(f"{accumulate} x {size} tokens") as advance:
            found = measure_training(systems, windows, size, rounds, accumulate, advance)
        for key, result in zip(keys, found, strict=True):
            results.append(replace(result, peak_bytes=peaks.get((size, key))).to_dict())
            console.say(line(results[-1]))
    return results


def _overhead(
    case: Any, numbers: list[int], windows: Any, sizes: list[int], rounds: int
) -> list[dict[str, Any]]:
    from lookup_experts.benchmarks.trainer_overhead import measure_overhead

    results = []
    for number in numbers:
        for size in sizes:
            with console.progress_bar(f"Trainer, {number} experts, {size} tokens") as advance:
                sequences = size // case.context
                found = measure_overhead(case, number, windows, sequences, rounds, advance)
            results.append(found.to_dict())
            console.say(line(results[-1]))
    return results
