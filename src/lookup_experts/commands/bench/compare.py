"""`mole bench decode` and `prefill`: MoLE beside its dense backbone, for each size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lookup_experts import console
from lookup_experts.commands.bench.report import counts, dtype_of, id_stream, keep, line, report


def compare(
    measure: Callable[..., list[Any]],
    shape: str,
    experts: int,
    encoding: str,
    dtype: str,
    store: str,
    cache: str,
    sizes: str,
    pairs: int,
    ids: Path | None,
    work: Path,
    json: Path | None,
    plot: Path | None,
    device: str,
    graphs: bool = False,
) -> None:
    """Dense and MoLE side by side for each size; `graphs` decodes by CUDA graphs."""
    from lookup_experts.allocation import keep_freed_memory
    from lookup_experts.benchmarks.models import Case, dense_model, random_table, table_model
    from lookup_experts.benchmarks.speed import CONTEXT, SEQUENCE_STEPS, TextWindows
    from lookup_experts.errors import UserError
    from lookup_experts.table.lanes import check_device
    from lookup_experts.units import parse_bytes

    check_device(device)
    keep_freed_memory()
    if graphs and not device.startswith("cuda"):
        raise UserError(f"CUDA graphs need a GPU; give --device cuda instead of {device}.")
    case = Case(shape, experts, encoding, dtype_of(dtype))
    numbers, cache_bytes = counts(sizes), parse_bytes(cache)
    with console.progress_bar("Writing a table") as progress:
        table = random_table(case, work, progress)
    windows = TextWindows(id_stream(ids, case, work), device=device)
    dense = dense_model(case, device=device)
    mole = table_model(case, table, store, cache_bytes, console.say, device)
    if graphs:
        from lookup_experts.benchmarks.graphs import DecodingByGraphs

        dense, mole = (DecodingByGraphs(each, CONTEXT + SEQUENCE_STEPS) for each in (dense, mole))
    what, results = measure.__name__.removeprefix("measure_"), []
    for size in numbers:
        with console.progress_bar(f"{what} {size}") as bar:
            found = measure(dense, mole, windows, size, pairs, bar)
        with_options = {"dtype": dtype} | ({"cuda_graphs": True} if graphs else {})
        results += [result.to_dict() | with_options for result in found]
        console.say(line(results[-1]))
        keep(what, results, json)
    report(what, results, json, plot)
