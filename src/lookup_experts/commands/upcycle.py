"""`mole upcycle`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options


def upcycle(
    model: Annotated[
        str, typer.Argument(help="A folder with a causal LM, or its name on the hub.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="As for `mole train`: a folder of `mole prepare`, made with the model's "
            "tokenizer, or a `stream:`, which the model's tokenizer cuts; several with shares."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run and of the trained model.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe file, or a name: how it is trained.")
    ] = "upcycle",
    experts: Annotated[
        int | None, typer.Option(help="Experts per layer; 0 trains the backbone as it is.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="How a row is made and read: mole or meki. Default: mole.")
    ] = None,
    row_size: Annotated[
        int | None, typer.Option(help="Numbers of a row. Default: the model's width.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="The blocks that gain experts: 0-7, 0,2,4 or every:2. Default: all."),
    ] = None,
    train_backbone: Annotated[
        str | None, typer.Option(help="What of the backbone is trained too: nothing, ffn or all.")
    ] = None,
    backbone_lr: Annotated[
        float | None, typer.Option(help="The learning rate of what is trained of the backbone.")
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(help="full: a complete model. experts: they alone, naming their backbone."),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of a stream's rows with text.")
    ] = "text",
    trust_remote_code: options.TrustRemoteCode = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: cut the model over the GPUs (FSDP2).")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the recipe; can be given several times."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train lookup experts on an existing model; resumes where it stopped.

    Their outputs are zero at first, so the model begins as what it is. The backbone is frozen
    unless --train-backbone says otherwise. Ctrl-C stops with a checkpoint; the same command goes
    on, on any number of GPUs, as with `mole train`. The result folds like any other:
    `mole reparameterize`.

    Example: `mole upcycle HuggingFaceTB/SmolLM2-135M --data data/ --out out/ --layers every:2`
    """
    from lookup_experts.commands.train import run_training
    from lookup_experts.training.recipe import load_recipe
    from lookup_experts.training.sources import STREAM, TrainingData
    from lookup_experts.training.upcycling import UpcycleRecipe, for_backbone

    console.quiet_transformers()
    settled = for_backbone(
        load_recipe(
            recipe,
            [*(overrides or ()), *_of_experts(experts, form, row_size)],
            kind=UpcycleRecipe,
        ),
        model,
        num_experts=0 if experts == 0 else None,
        layers=layers,
        trained=train_backbone,
        learning_rate=backbone_lr,
        save=save,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = model if any(name.startswith(STREAM) for name in data) else None
    run_training(settled, TrainingData(data, tokenizer, text_field), out, json, shard=shard)


def _of_experts(number: int | None, form: str | None, row_size: int | None) -> list[str]:
    """The options on experts as `--set` has them."""
    from lookup_experts.errors import UserError

    given = {"num_experts": number, "form": form, "row_size": row_size}
    chosen = {key: value for key, value in given.items() if value is not None}
    if number != 0:
        return [f"experts.{key}={value}" for key, value in chosen.items()]
    for option, value in (("--form", form), ("--row-size", row_size)):
        if value is not None:
            raise UserError(
                f"{option} {value} says how experts are, but --experts 0 adds none; leave one out."
            )
    return []
