"""`mole bench cache`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import counts, id_stream, line, report


def cache(
    capacity: Annotated[
        str, typer.Option(help="How many records the cache holds.")
    ] = "512,1024,2048,3640,4096,8192",
    streams: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "1,8,32",
    tokens: Annotated[
        int, typer.Option(help="Of the stream; the first half is only counted.", min=2)
    ] = 2_000_000,
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """What each policy of a row cache would find on real text: a simulation, without a model.

    Example: `mole bench cache --ids novels-ids.npy --capacity 1024,8192`
    """
    from lookup_experts.benchmarks.cache import compare_policies
    from lookup_experts.benchmarks.models import Case
    from lookup_experts.errors import UserError

    capacities, parallel = counts(capacity), counts(streams)
    stream = id_stream(ids, Case(), work)[:tokens]
    if len(stream) < 2 * max(parallel):
        raise UserError(f"{len(stream)} token ids are too few for {max(parallel)} streams.")
    with console.progress_bar("Simulating") as progress:
        results = compare_policies(stream, capacities, parallel, progress)
    for found in results:
        console.say(line(found))
    report("cache", results, json, plot)
