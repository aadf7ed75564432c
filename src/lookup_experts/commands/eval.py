"""`mole eval`."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options


def eval(  # noqa: A001
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER...",
            help="Model folders, or names on the Hugging Face hub; a column for each.",
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="`all`, or some of arc_challenge, arc_easy, boolq, hellaswag, piqa, race, "
            "social_iqa, lambada, with commas. Default: all, if nothing else is asked for."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Local copies of the tasks' rows (.jsonl, .jsonl.gz); no network then."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows of each task.")] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Also on up to 32k tokens of this file."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Also how far predictions on the text of --perplexity are from this model's (KL "
            "divergence): what an encoding or int8 weights cost. Both are in memory then.",
        ),
    ] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Also pairs of words, to be found in the context.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts in a forward pass, at most.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the harness's own results; interrupted, the same command goes on."
        ),
    ] = None,
    store: options.Store = "auto",
    cache: options.Cache = "0",
    tokenizer: options.Tokenizer = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    stats: options.Stats = False,
    json: options.Json = False,
) -> None:
    """Score models: the paper's eight tasks, zero-shot; perplexity of a text; recall.

    Tasks are run by lm-evaluation-harness, with rows from the Hugging Face hub or from
    `--data-dir`. Accuracies are in percent, with standard errors.

    Example: `mole eval dense/ folded/ --tasks arc_easy,piqa --data-dir data/eval --recall`

    Example: `mole eval out-int8/ out-nf4/ --perplexity text.txt --against resident/`
    """
    from lookup_experts.benchmarks.results import make_report
    from lookup_experts.evaluation.run import Request, evaluate_folders
    from lookup_experts.evaluation.summary import format_summaries
    from lookup_experts.evaluation.tasks import parse_tasks
    from lookup_experts.generation.text import format_reader

    console.quiet_transformers()
    if tasks is None and perplexity is None and not recall:
        tasks = "all"
    request = Request(
        tasks=parse_tasks(tasks) if tasks is not None else [],
        data_dir=data_dir,
        limit=limit,
        text=perplexity,
        reference=against,
        recall=recall,
        batch_size=batch_size,
        out=out,
    )
    loading = {
        "store": store,
        "cache": cache,
        "device": device,
        "dtype": dtype,
        "weights": weights,
        "trust_remote_code": trust_remote_code,
    }
    summaries = evaluate_folders(folders, request, tokenizer, loading)
    results = [summary.to_dict() for summary in summaries]
    if json:
        report = make_report("eval", results)
        if request.tasks:  # its version decides what the tasks are
            report["machine"]["versions"]["lm-eval"] = version("lm-eval")
        console.json_result(report)
    else:
        console.result(format_summaries(results))
    if stats:
        for summary in summaries:
            found = format_reader(summary.reader) if summary.reader else "no table"
            console.say(f"{summary.model}, {found}; linear layers: {summary.linear_layers}")
