"""`mole bench decode`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.compare import compare


def decode(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    dtype: bench_options.Dtype = "bfloat16",
    store: options.Store = "direct",
    cache: options.Cache = "256MB",
    batch: bench_options.Counts = "1,8,32",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of steps, dense and MoLE.")] = 200,
    device: options.Device = "cpu",
    graphs: Annotated[
        bool, typer.Option("--graphs", help="On a GPU: static caches and CUDA graphs.")
    ] = False,
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Decoding steps over real text: MoLE with its table on disk beside the dense backbone.

    Example: `mole bench decode --batch 1,8,32 --cache 256MB --json decode.json`
    """
    from lookup_experts.benchmarks.speed import measure_decode

    compare(
        measure_decode,
        shape,
        experts,
        encoding,
        dtype,
        store,
        cache,
        batch,
        pairs,
        ids,
        work,
        json,
        plot,
        device,
        graphs,
    )
