"""`mole bench prefill`."""

from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def prefill(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = None,
    form: bench_options.Form = "mole",
    row_size: bench_options.RowSize = None,
    model: bench_options.OffloadedModel = None,
    resident: bench_options.ResidentModel = None,
    encoding: bench_options.Encoding = "bfloat16",
    dtype: bench_options.Dtype = "bfloat16",
    weights: bench_options.Weights = "auto",
    store: options.Store = "direct",
    cache: options.Cache = "0",
    tokens: bench_options.Counts = "512,2048",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of prompts, dense and MoLE.")] = 200,
    peers: bench_options.Peers = False,
    device: options.Device = "cpu",
    limit: bench_options.Limit = None,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Of a model with embeddings in tables: the first prompt of a process, from a "
            "cold page cache.",
        ),
    ] = False,
    ids: bench_options.Ids = None,
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Prompts of real text: MoLE with its table on disk beside the dense backbone.

    Example: `mole bench prefill --tokens 512,2048`
    """
    from lookup_experts.benchmarks.beside_dense import Comparison
    from lookup_experts.benchmarks.offloaded import bench_prefill as bench_offloaded
    from lookup_experts.benchmarks.prefill import bench_prefill
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.units import parse_bytes

    subjects = bench_options.subjects_of(
        shape, model, resident, encoding, store, cache, ids, work, device
    )
    if subjects is not None:
        bench_offloaded(
            subjects, bench_options.counts(tokens), pairs, limit, cold, Results("prefill", json)
        )
        return
    case = bench_options.case_of(shape, experts, encoding, dtype, form, row_size)
    kinds = tuple(weights.split(","))
    comparison = Comparison(case, store, parse_bytes(cache), ids, work, device, kinds, peers)
    sizes = bench_options.counts(tokens)
    bench_prefill(comparison, sizes, pairs, Results("prefill", json, plot))
