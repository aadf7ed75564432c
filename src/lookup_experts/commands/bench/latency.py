"""`mole bench latency`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import counts, dtype_of, id_stream


def latency(
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            help="dense, mole-4e, moe-10e, and a MoE with its experts elsewhere: moe-10e-disk, "
            "-ram, -mmap, -accelerate. Default: all of these."
        ),
    ] = None,
    shape: bench_options.Shape = "160m",
    batch: bench_options.Counts = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens before the first step.")] = 512,
    steps: Annotated[
        int, typer.Option(min=1, help="Decoding steps that count; slow systems take fewer.")
    ] = 60,
    cache: Annotated[
        str,
        typer.Option(
            help="Memory beyond the dense model's for each system that keeps experts elsewhere: "
            "MoLE's row cache, or more of MoE's experts."
        ),
    ] = "32MB",
    dtype: bench_options.Dtype = "bfloat16",
    device: options.Device = "cpu",
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the times per batch size into this PNG or SVG.")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="Losses for --memory-plot: JSON of mole bench quality.")
    ] = None,
    memory_plot: Annotated[
        Path | None, typer.Option(help="Also draw loss against memory into this PNG or SVG.")
    ] = None,
) -> None:
    """Dense, MoE, MoE with its experts elsewhere, and MoLE from disk, at equal memory.

    Interrupted, the same command goes on with the batch sizes that are left.

    Example: `mole bench latency --batch 1,8 --json latency.json --plot latency.png`
    """
    from lookup_experts.benchmarks.latency.measure import measure_latency
    from lookup_experts.benchmarks.latency.models import Plan, prepare_tables
    from lookup_experts.benchmarks.latency.parts import Parts
    from lookup_experts.benchmarks.latency.pictures import draw_bars, draw_memory, table_of
    from lookup_experts.benchmarks.latency.systems import parse_systems
    from lookup_experts.benchmarks.plots import check_picture
    from lookup_experts.benchmarks.results import make_report, write_report
    from lookup_experts.benchmarks.speed import TextWindows
    from lookup_experts.units import parse_bytes

    console.quiet_transformers()
    losses = _read_quality(quality, memory_plot)
    check_picture(plot)
    check_picture(memory_plot)
    plan = Plan(shape, parse_bytes(cache), work, device, dtype_of(dtype))
    chosen, batches = parse_systems(systems), sorted(set(counts(batch)))
    windows = TextWindows(id_stream(ids, plan.case(), work))
    with console.progress_bar("Writing tables") as progress:
        prepare_tables(plan, chosen, progress)
    parts = Parts(plan, chosen, prompt, steps, ids)
    left = [size for size in batches if not parts.has(size)]
    if len(left) < len(batches):
        console.say(f"Measured before: {len(batches) - len(left)} of {len(batches)} batch sizes.")
    if left:
        with console.progress_bar("Measuring") as progress:
            measure_latency(chosen, plan, windows, left, prompt, steps, progress, parts.keep)
    results = [found | {"dtype": dtype} for found in parts.results(batches)]
    for line in table_of(results):
        console.say(line)
    report = make_report("bench latency", results)
    if json:
        write_report(report, json)
    else:
        console.json_result(report)
    if plot:
        draw_bars(results, plot)
    if memory_plot:
        draw_memory(results, losses, memory_plot)
    parts.remove(batches)


def _read_quality(path: Path | None, memory_plot: Path | None) -> dict:
    """The report at `path`; empty if no plot needs it."""
    import json

    from lookup_experts.errors import UserError

    if (path is None) != (memory_plot is None):
        raise UserError("--memory-plot needs --quality with a report of mole bench quality.")
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
        found["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the JSON of mole bench quality ({error}).") from error
    return dict(found)
