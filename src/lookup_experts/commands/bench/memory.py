"""`mole bench memory`."""

from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def memory(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = None,
    form: bench_options.Form = "mole",
    row_size: bench_options.RowSize = None,
    model: bench_options.OffloadedModel = None,
    resident: bench_options.ResidentModel = None,
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
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
) -> None:
    """What the processes of a dense and of a MoLE model really hold, after decoding and a prompt.

    Example: `mole bench memory --cache 0`, `mole bench memory --prompt 8192`
    """
    from lookup_experts.benchmarks.memory import bench_memory
    from lookup_experts.benchmarks.offloaded import bench_memory as bench_offloaded
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.units import parse_bytes

    subjects = bench_options.subjects_of(shape, model, resident, encoding, store, cache, ids, work)
    if subjects is not None:
        bench_offloaded(subjects, Results("memory", json))
        return
    case = bench_options.case_of(shape, experts, encoding, dtype, form, row_size)
    results = Results("prompt memory" if prompt else "memory", json)
    bench_memory(case, store, parse_bytes(cache), prompt, ids, work, results)
