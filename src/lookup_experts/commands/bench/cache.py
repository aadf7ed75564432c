"""`mole bench cache`."""

from typing import Annotated

import typer

from lookup_experts.commands.bench import options as bench_options


def cache(
    capacity: Annotated[
        str, typer.Option(help="How many records the cache holds.")
    ] = "512,1024,2048,3640,4096,8192",
    streams: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "1,8,32",
    tokens: Annotated[
        int, typer.Option(help="Of the stream; the first half is only counted.", min=2)
    ] = 2_000_000,
    ids: bench_options.Ids = None,
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """What each policy of a row cache would find on real text: a simulation, without a model.

    Example: `mole bench cache --ids novels-ids.npy --capacity 1024,8192`
    """
    from lookup_experts.benchmarks.cache import bench_cache
    from lookup_experts.benchmarks.results import Results

    sizes = bench_options.counts(capacity), bench_options.counts(streams)
    bench_cache(*sizes, tokens, ids, work, Results("cache", json, plot))
