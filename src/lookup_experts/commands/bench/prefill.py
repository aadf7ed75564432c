"""`mole bench prefill`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.compare import compare


def prefill(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    dtype: bench_options.Dtype = "bfloat16",
    store: options.Store = "direct",
    cache: options.Cache = "0",
    tokens: bench_options.Counts = "512,2048",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of prompts, dense and MoLE.")] = 200,
    device: options.Device = "cpu",
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Prompts of real text: MoLE with its table on disk beside the dense backbone.

    Example: `mole bench prefill --tokens 512,2048`
    """
    from lookup_experts.benchmarks.speed import measure_prefill

    compare(
        measure_prefill,
        shape,
        experts,
        encoding,
        dtype,
        store,
        cache,
        tokens,
        pairs,
        ids,
        work,
        json,
        plot,
        device,
    )
