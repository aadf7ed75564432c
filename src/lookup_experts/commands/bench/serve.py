"""`mole bench serve`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import counts, dtype_of, id_stream, line, report
from lookup_experts.errors import UserError


def serve(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    dtype: bench_options.Dtype = "bfloat16",
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
    device: options.Device = "cpu",
    ids: bench_options.Ids = None,
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """`mole serve` under concurrent streams of OpenAI's client: MoLE from disk beside dense.

    Example: `mole bench serve --streams 1,8,32 --json serve.json --plot serve.png`
    """
    import asyncio
    from contextlib import ExitStack

    from lookup_experts.benchmarks.models import Case, random_table
    from lookup_experts.benchmarks.serving.folders import save_folders
    from lookup_experts.benchmarks.serving.load import Client
    from lookup_experts.benchmarks.serving.measure import measure_soak, measure_streams
    from lookup_experts.benchmarks.serving.process import ServerProcess

    console.quiet_transformers()
    numbers = counts(streams)
    case = Case(shape, experts, encoding, dtype_of(dtype))
    with console.progress_bar("Writing a table") as progress:
        table = random_table(case, work, progress)
    text = id_stream(ids, case, work)
    if len(text) <= prompt:
        raise UserError(f"--ids has {len(text)} ids; a prompt of {prompt} needs more.")
    starts = range(0, len(text) - prompt, max(1, (len(text) - prompt) // 512))
    prompts = [text[start : start + prompt].tolist() for start in starts]
    folders = save_folders(case, table, work)
    reading = {"dense": (), "mole": ("--store", store, "--cache", cache)}
    common = ("--device", device, "--max-batch", max(numbers))
    with ExitStack() as stack:
        clients = {}
        for name in ("mole",) if soak else ("dense", "mole"):
            server = ServerProcess(folders[name], *reading[name], *common)
            stack.enter_context(server)
            clients[name] = Client(server, prompts, tokens)
        with console.progress_bar("Serving") as progress:
            if soak:
                steady = measure_soak("mole", clients["mole"], max(numbers), soak, progress)
                results = [asyncio.run(steady)]
            else:
                found = measure_streams(clients, numbers, rounds, progress)
                results = asyncio.run(found)
    for result in results:
        result["dtype"] = dtype
        console.say(line(result))
    report("serve", results, json, plot)
