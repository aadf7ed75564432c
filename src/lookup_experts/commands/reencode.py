"""`mole reencode`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.table_report import report_table
from lookup_experts.errors import UserError


def reencode(
    table: Annotated[str, typer.Argument(help="An inference folder, or the folder of a table.")],
    out: Annotated[Path, typer.Argument(help="The folder to make, of the same kind.")],
    encoding: Annotated[str, typer.Option(help="float32, bfloat16, float16, int8, nf4 or nf3.")],
    block_size: options.BlockSize = None,
    evaluate: options.EvaluationText = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Write a table again in another encoding.

    The experts aren't needed. OUT gets all else that is in an inference folder, too; weights are
    linked rather than copied where possible. An interrupted run goes on when the same command is
    given again. At the end it tells what the encoding costs, against TABLE.

    Example: `mole reencode out/ out-nf4/ --encoding nf4 --eval notes.txt`
    """
    from lookup_experts.evaluation.quality import quality_against_table
    from lookup_experts.evaluation.text import read_token_ids
    from lookup_experts.folders.load import load
    from lookup_experts.folders.model_folder import TABLE, local_folder
    from lookup_experts.folders.tokenizer import load_tokenizer
    from lookup_experts.generation.reencoding import BARE, open_sources
    from lookup_experts.generation.reencoding import reencode as write_again

    console.quiet_transformers()
    folder = local_folder(table)
    place, source = next(iter(open_sources(folder).items()))
    token_ids = None
    if evaluate is not None:  # before the long work, so that what can't be read is told at once
        if place == BARE:
            raise UserError(
                f"{folder} is a table without a model, so --eval has nothing that could predict "
                "a text. Give the inference folder, or leave --eval out."
            )
        if place != TABLE:
            raise UserError(
                f"{folder} has no lookup experts, whose predictions --eval compares. Leave it out, "
                "and compare by mole eval --against."
            )
        token_ids = read_token_ids(evaluate, load_tokenizer(folder, trust_remote_code))
    with console.progress_bar("Re-encoding the table") as progress:
        made = write_again(
            folder,
            out,
            encoding=encoding,
            block_size=block_size,
            progress=progress,
            notify=console.say,
        )
    with console.progress_bar("Comparing predictions") as progress:
        model = None
        if token_ids is not None:
            model = load(folder, trust_remote_code=trust_remote_code, notify=console.say)
        quality = quality_against_table(made, source, model, token_ids, progress)
    report_table(out, made, quality, json)
