"""`mole train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.errors import UserError

if TYPE_CHECKING:
    from lookup_experts.training.recipe import RecipeFile


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name such as mole-160m-4e.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder of `mole prepare`, or `stream:` and a Hugging Face data set, .jsonl or "
            ".parquet files. Several, each with its share: --data A=0.7 --data B=0.3."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the run and of the trained model.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the recipe; can be given several times."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="For streams: a tokenizer's folder, file, or name on the hub."),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of a stream's rows with text.")
    ] = "text",
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: cut the model over the GPUs (FSDP2).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what it would cost; needs no data.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="With --dry-run: how many train together.")] = 1,
    tokens_per_id: Annotated[
        float | None,
        typer.Option(
            help="With --dry-run: tokens per unique id where the experts are evaluated.",
            show_default="that of English prose",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train a recipe from scratch; resumes where it stopped.

    Ctrl-C stops after the step that is under way, with a checkpoint; the same command goes on, on
    any number of GPUs: `torchrun --nproc-per-node 8 -m lookup_experts.cli train ...`, with
    --shard where a copy of the model doesn't fit each; or `accelerate launch --config_file
    recipes/accelerate/fsdp2.yaml -m lookup_experts.cli train ...`

    Example: `mole train mole-tiny-4e --data data/ --out out/ --set training.steps=100`
    """
    from lookup_experts.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        from lookup_experts.commands.costs_report import report_costs

        report_costs(loaded, recipe, gpus, tokens_per_id, json)
        return
    if not data or out is None:
        raise UserError("Training needs --data and --out; --dry-run needs neither.")
    from lookup_experts.training.sources import TrainingData

    console.quiet_transformers()
    run_training(loaded, TrainingData(data, tokenizer, text_field), out, json, shard=shard)


def run_training(
    recipe: "RecipeFile", data: Any, out: Path, json: bool, *, shard: bool = False
) -> None:
    """Train a recipe of any kind and tell what came out."""
    from lookup_experts.cli import EXIT_INTERRUPTED
    from lookup_experts.training.train import TrainingInterrupted
    from lookup_experts.training.train import train as train_recipe
    from lookup_experts.training.trainer import is_main_process

    try:
        summary = train_recipe(recipe, data, out, shard=shard)
    except TrainingInterrupted as interrupted:
        console.say(str(interrupted))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not is_main_process():
        return
    if json:
        console.json_result(summary.to_dict())
    else:
        console.result(f"{out}: {summary.in_words()}")
