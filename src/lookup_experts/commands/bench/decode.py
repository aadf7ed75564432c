"""`mole bench decode`."""

from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def decode(
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
    cache: options.Cache = "256MB",
    batch: bench_options.Counts = "1,8,32",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of steps, dense and MoLE.")] = 200,
    peers: bench_options.Peers = False,
    device: options.Device = "cpu",
    graphs: Annotated[
        bool, typer.Option("--graphs", help="On a GPU: static caches and CUDA graphs.")
    ] = False,
    limit: bench_options.Limit = None,
    ids: bench_options.Ids = None,
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Decoding steps over real text: MoLE with its table on disk beside the dense backbone.

    Example: `mole bench decode --batch 1,8,32 --cache 256MB --json decode.json`
    """
    from lookup_experts.benchmarks.beside_dense import Comparison
    from lookup_experts.benchmarks.decode import bench_decode
    from lookup_experts.benchmarks.offloaded import bench_decode as bench_offloaded
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.units import parse_bytes

    subjects = bench_options.subjects_of(
        shape, model, resident, encoding, store, cache, ids, work, device
    )
    if subjects is not None:
        bench_offloaded(
            subjects, bench_options.counts(batch), pairs, limit, Results("decode", json)
        )
        return
    case = bench_options.case_of(shape, experts, encoding, dtype, form, row_size)
    kinds = tuple(weights.split(","))
    comparison = Comparison(case, store, parse_bytes(cache), ids, work, device, kinds, peers)
    sizes = bench_options.counts(batch)
    bench_decode(comparison, sizes, pairs, graphs, Results("decode", json, plot))
