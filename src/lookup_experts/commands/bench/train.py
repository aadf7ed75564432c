"""`mole bench train`."""

from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def train(
    shape: bench_options.Shape = "160m",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Cut the shape to so many blocks.")
    ] = None,
    experts: Annotated[
        str,
        typer.Option(help="Routed experts per layer, e.g. 4,16; narrow rows: 4-r192, meki-r96."),
    ] = "4,16",
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
        bool, typer.Option("--trainer", help="Only measure the Trainer against a bare loop.")
    ] = False,
    dtype: bench_options.Dtype = "float32",
    device: options.Device = "cpu",
    ids: bench_options.Ids = None,
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Training steps on real text: dense, MoLE at unique ids, MoLE at every position.

    Forward and backward, no optimizer. Beside each measured ratio stands the same in FLOPs.

    Example: `mole bench train --layers 2 --tokens 2048,8192 --ids runs/novels --json train.json`
    """
    from lookup_experts.benchmarks.models import Case
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.benchmarks.text import TextWindows, id_stream
    from lookup_experts.benchmarks.train import Rows, bench_train, case_of_shape
    from lookup_experts.benchmarks.trainer import bench_trainer
    from lookup_experts.errors import UserError

    sizes = bench_options.counts(tokens)
    trained = [Rows.parse(word) for word in experts.split(",")]
    for size in sizes:
        if size % context:
            raise UserError(f"--tokens {size} is no multiple of --context {context}.")
    if trainer and plot:
        raise UserError("--plot draws systems beside dense; leave it out with --trainer.")
    case = case_of_shape(
        shape,
        layers,
        context=context,
        head=head,
        dtype=bench_options.dtype_of(dtype),
        device=device,
    )
    windows = TextWindows(id_stream(ids, Case(shape).layout.shape.vocab_size, work))
    results = Results("train", json, plot)
    if trainer:
        bench_trainer(case, trained, sizes, windows, rounds, results)
    else:
        bench_train(case, trained, sizes, windows, rounds, accumulate, peak, results)
