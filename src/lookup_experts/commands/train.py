"""`mole train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options

if TYPE_CHECKING:
    from lookup_experts.training.recipe import RecipeFile


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name such as mole-160m-4e.")],
    data: Annotated[Path, typer.Option(help="A folder of `mole prepare`.")],
    out: Annotated[Path, typer.Option(help="The folder of the run and of the trained model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the recipe; can be given several times."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train a recipe from scratch; resumes where it stopped.

    Ctrl-C stops after the step that is under way, with a checkpoint; the same command goes on.
    On several GPUs: `torchrun --nproc-per-node 8 -m lookup_experts.cli train ...`

    Example: `mole train mole-tiny-4e --data data/ --out out/ --set training.steps=100`
    """
    from lookup_experts.training.recipe import load_recipe

    console.quiet_transformers()
    run_training(load_recipe(recipe, overrides or ()), data, out, json)


def run_training(recipe: "RecipeFile", data: Path, out: Path, json: bool) -> None:
    """Train a recipe of any kind and tell what came out."""
    from lookup_experts.cli import EXIT_INTERRUPTED
    from lookup_experts.training.train import TrainingInterrupted
    from lookup_experts.training.train import train as train_recipe
    from lookup_experts.training.trainer import is_main_process

    try:
        summary = train_recipe(recipe, data, out)
    except TrainingInterrupted as interrupted:
        console.say(str(interrupted))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not is_main_process():
        return
    if json:
        console.json_result(summary.to_dict())
    else:
        console.result(f"{out}: {summary.in_words()}")
