"""`mole bench memory`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import dtype_of, id_stream, line, report


def memory(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    dtype: bench_options.Dtype = "bfloat16",
    store: options.Store = "direct",
    cache: options.Cache = "0",
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead, without a model: what the rows of a prompt of so many tokens take.",
        ),
    ] = None,
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
) -> None:
    """What the processes of a dense and of a MoLE model really hold, after decoding and a prompt.

    Example: `mole bench memory --cache 0`, `mole bench memory --prompt 8192`
    """
    from lookup_experts.benchmarks.models import Case, random_table
    from lookup_experts.benchmarks.residency import measure_memory, measure_prompt_memory
    from lookup_experts.units import parse_bytes

    case = Case(shape, experts, encoding, dtype_of(dtype))
    with console.progress_bar("Writing a table") as progress:
        table = random_table(case, work, progress)
    stream = id_stream(ids, case, work)
    measured: list[Any]
    if prompt:
        measured = [measure_prompt_memory(case, table.folder, store, prompt, stream)]
    else:
        measured = measure_memory(case, table.folder, store, parse_bytes(cache), stream)
    results = [found.to_dict() for found in measured]
    for found in results:
        console.say(line(found))
    report("prompt memory" if prompt else "memory", results, json, None)
