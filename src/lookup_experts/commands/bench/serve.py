"""`mole bench serve`."""

from typing import Annotated

import typer

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def serve(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = None,
    form: bench_options.Form = "mole",
    row_size: bench_options.RowSize = None,
    encoding: bench_options.Encoding = "bfloat16",
    dtype: bench_options.Dtype = "bfloat16",
    weights: options.Weights = "auto",
    store: options.Store = "direct",
    cache: options.Cache = "256MB",
    streams: bench_options.Counts = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Loads of each system, in turn.")] = 3,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each.")] = 64,
    soak: Annotated[
        float,
        typer.Option(
            min=0, help="Instead: load MoLE for so many minutes with the most streams, steadily."
        ),
    ] = 0,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="On a CPU: also the same folders in vLLM's server, whose `vllm` has to be on the "
            "path, transformers' generate, and llama.cpp, if llama-bench is there.",
        ),
    ] = False,
    tables: Annotated[
        int,
        typer.Option(
            min=1, help="Also one server with the backbone and so many tables, asked for in turn."
        ),
    ] = 1,
    device: options.Device = "cpu",
    ids: bench_options.Ids = None,
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """`mole serve` under concurrent streams: MoLE beside dense, on a GPU also without CUDA graphs.

    Example: `mole bench serve --streams 1,8,32 --json serve.json --plot serve.png`
    """
    from lookup_experts.benchmarks.peers import find_generating
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.benchmarks.serve import EAGER, IN_VLLM, TABLES, bench_serve
    from lookup_experts.benchmarks.vllm_server import options_in_vllm
    from lookup_experts.errors import UserError

    if peers and (soak or device != "cpu"):
        raise UserError("--peers compares loads on the CPU; leave it, or --soak and --device, out.")

    if tables > 1 and soak:
        raise UserError("--tables compares loads; leave it, or --soak, out.")

    most = max(bench_options.counts(streams))
    common = ("--device", device, "--weights", weights, "--max-batch", most)
    servers: dict[str, tuple[object, ...]]
    servers = {"mole": ("--store", store, "--cache", cache, *common)}
    if not soak:
        servers = {"dense": common, **servers}
        if device.startswith("cuda"):
            servers |= {
                f"{name}{EAGER}": (*words, "--no-graphs") for name, words in servers.items()
            }
    if tables > 1:
        servers[TABLES] = servers["mole"]
    case = bench_options.case_of(shape, experts, encoding, dtype, form, row_size)
    if peers:
        in_vllm = options_in_vllm(store, cache, most)
        servers |= {f"{name}{IN_VLLM}": words for name, words in in_vllm.items()}
    bench_serve(
        case,
        servers,
        bench_options.counts(streams),
        rounds,
        prompt,
        tokens,
        soak,
        ids,
        work,
        Results("serve", json, plot),
        find_generating(case, work) if peers else (),
        tables,
    )
