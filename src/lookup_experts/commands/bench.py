"""`mole bench WHAT`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lookup_experts import console
from lookup_experts.commands import options

app = typer.Typer(
    name="bench",
    help="Measure decoding, prefill, reading and building on this machine.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Shape = Annotated[str, typer.Option(help="The paper's shape: 160m, 410m or 1b.")]
Experts = Annotated[int, typer.Option("--experts", help="Routed experts per layer.")]
Encoding = Annotated[str, typer.Option(help="Of the table.")]
Work = Annotated[
    Path, typer.Option(help="Where tables with random numbers are kept; make room for them.")
]
Ids = Annotated[
    Path | None,
    typer.Option(
        help="A stream of token ids: a .npy file or a folder of `mole prepare`. "
        "Default: the text of the Python standard library, tokenised."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the results to this file, as JSON.")
]
Plot = Annotated[Path | None, typer.Option(help="Also draw the results into this PNG.")]
Counts = Annotated[str, typer.Option(help="Which sizes to measure, e.g. 1,8,32.")]


@app.command()
def decode(
    shape: Shape = "160m",
    experts: Experts = 4,
    encoding: Encoding = "bfloat16",
    store: options.Store = "direct",
    cache: options.Cache = "256MB",
    batch: Counts = "1,8,32",
    pairs: Annotated[int, typer.Option(help="Pairs of steps, dense and MoLE.")] = 200,
    ids: Ids = None,
    work: Work = Path("runs/bench"),
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Decoding steps over real text: MoLE with its table on disk beside the dense backbone.

    Example: `mole bench decode --batch 1,8,32 --cache 256MB --json decode.json`
    """
    from lookup_experts.benchmarks.speed import measure_decode

    _compare(
        measure_decode, shape, experts, encoding, store, cache, batch, pairs, ids, work, json, plot
    )


@app.command()
def prefill(
    shape: Shape = "160m",
    experts: Experts = 4,
    encoding: Encoding = "bfloat16",
    store: options.Store = "direct",
    cache: options.Cache = "0",
    tokens: Counts = "512,2048",
    pairs: Annotated[int, typer.Option(help="Pairs of prompts, dense and MoLE.")] = 15,
    ids: Ids = None,
    work: Work = Path("runs/bench"),
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Prompts of real text: MoLE with its table on disk beside the dense backbone.

    Example: `mole bench prefill --tokens 512,2048`
    """
    from lookup_experts.benchmarks.speed import measure_prefill

    _compare(
        measure_prefill,
        shape,
        experts,
        encoding,
        store,
        cache,
        tokens,
        pairs,
        ids,
        work,
        json,
        plot,
    )


@app.command()
def read(
    shape: Shape = "160m",
    experts: Experts = 4,
    encoding: Encoding = "bfloat16",
    store: options.Store = "direct",
    batch: Counts = "1,8,32,256",
    work: Work = Path("runs/bench"),
    json: JsonFile = None,
) -> None:
    """Random records, beside large sequential reads of the same disk.

    Example: `mole bench read --batch 32,256`
    """
    from lookup_experts.benchmarks.models import Case, random_table
    from lookup_experts.benchmarks.reading import measure_read
    from lookup_experts.table.store import open_store

    with console.progress_bar("Writing a table") as progress:
        table = random_table(Case(shape, experts, encoding), work, progress)
    results = []
    with open_store(table, store, notify=console.say) as opened:
        for size in _counts(batch):
            for busy in (False, True):
                results.append(measure_read(table, opened, size, busy_thread=busy).to_dict())
                console.say(_line(results[-1]))
    _report("read", results, json, None)


@app.command()
def build(
    shape: Shape = "160m",
    experts: Experts = 4,
    encoding: Encoding = "bfloat16",
    work: Work = Path("runs/bench"),
    json: JsonFile = None,
) -> None:
    """A table from experts with random weights, against the bare matrix products.

    The table stays in `--work` for the other benchmarks' taking.

    Example: `mole bench build --encoding nf4`
    """
    from lookup_experts.benchmarks.building import measure_build
    from lookup_experts.benchmarks.models import Case
    from lookup_experts.errors import UserError

    case = Case(shape, experts, encoding)
    folder = work / f"{case.name}-built"
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it, or give another --work.")
    with console.progress_bar("Building") as progress:
        results = [measure_build(case, folder, progress).to_dict()]
    console.say(_line(results[0]))
    _report("build", results, json, None)


@app.command()
def memory(
    shape: Shape = "160m",
    experts: Experts = 4,
    encoding: Encoding = "bfloat16",
    store: options.Store = "direct",
    cache: options.Cache = "0",
    ids: Ids = None,
    work: Work = Path("runs/bench"),
    json: JsonFile = None,
) -> None:
    """What the processes of a dense and of a MoLE model really hold, after decoding and a prompt.

    Example: `mole bench memory --cache 0`
    """
    from lookup_experts.benchmarks.models import Case, random_table
    from lookup_experts.benchmarks.residency import measure_memory
    from lookup_experts.units import parse_bytes

    case = Case(shape, experts, encoding)
    with console.progress_bar("Writing a table") as progress:
        table = random_table(case, work, progress)
    stream = _stream(ids, case, work)
    results = [
        found.to_dict()
        for found in measure_memory(case, table.folder, store, parse_bytes(cache), stream)
    ]
    for found in results:
        console.say(_line(found))
    _report("memory", results, json, None)


def _compare(
    measure: Callable[..., list[Any]],
    shape: str,
    experts: int,
    encoding: str,
    store: str,
    cache: str,
    sizes: str,
    pairs: int,
    ids: Path | None,
    work: Path,
    json: Path | None,
    plot: Path | None,
) -> None:
    """Dense and MoLE side by side for each size."""
    from lookup_experts.benchmarks.models import Case, dense_model, random_table, table_model
    from lookup_experts.benchmarks.speed import TextWindows
    from lookup_experts.units import parse_bytes

    case = Case(shape, experts, encoding)
    counts, cache_bytes = _counts(sizes), parse_bytes(cache)
    with console.progress_bar("Writing a table") as progress:
        table = random_table(case, work, progress)
    windows = TextWindows(_stream(ids, case, work))
    dense = dense_model(case)
    mole = table_model(case, table, store, cache_bytes, console.say)
    results = []
    for size in counts:
        with console.progress_bar(f"{measure.__name__.removeprefix('measure_')} {size}") as bar:
            found = measure(dense, mole, windows, size, pairs, bar)
        results += [result.to_dict() for result in found]
        console.say(_line(results[-1]))
    _report(measure.__name__.removeprefix("measure_"), results, json, plot)


def _stream(ids: Path | None, case: Any, work: Path) -> Any:
    from lookup_experts.benchmarks.ids import load_ids, standard_library_ids

    vocab_size = case.layout.shape.vocab_size
    return load_ids(ids, vocab_size) if ids else standard_library_ids(work)


def _counts(text: str) -> list[int]:
    from lookup_experts.errors import UserError

    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"Expected numbers like 1,8,32; got {text!r}.") from error
    if not counts or min(counts) < 1:
        raise UserError(f"Sizes must be at least 1; got {text!r}.")
    return counts


def _line(result: dict[str, Any]) -> str:
    """One result in one line."""
    words = []
    for key, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{key} {shown}")
    return "  " + ", ".join(words)


def _report(what: str, results: list[dict[str, Any]], json: Path | None, plot: Path | None) -> None:
    from lookup_experts.benchmarks.results import draw_ratios, make_report, write_report

    report = make_report(f"bench {what}", results)
    if json:
        write_report(report, json)
    else:
        console.json_result(report)
    if plot:
        draw_ratios(report, plot)
