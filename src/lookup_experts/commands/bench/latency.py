"""`mole bench latency`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def latency(
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            help="dense, mole-4e, moe-10e, and a MoE with its experts elsewhere: moe-10e-disk, "
            "-ram, -mmap, -accelerate. Default: all of these. Also narrow rows: mole-4e-r192, "
            "meki-r96."
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
    work: bench_options.Work = bench_options.WORK,
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
    from lookup_experts.benchmarks.latency.measure import bench_latency
    from lookup_experts.benchmarks.latency.systems import Plan
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.units import parse_bytes

    bench_latency(
        systems or (),
        Plan(shape, parse_bytes(cache), work, device, bench_options.dtype_of(dtype)),
        bench_options.counts(batch),
        prompt,
        steps,
        ids,
        quality,
        memory_plot,
        Results("latency", json, plot, work),
    )
