"""`mole reparameterize`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.table_report import report_table
from lookup_experts.errors import UserError


def reparameterize(
    folder: options.ModelFolder,
    out: Annotated[Path, typer.Argument(help="The inference folder to make.")],
    encoding: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16, int8, nf4 or nf3."),
    ] = "bfloat16",
    block_size: options.BlockSize = None,
    evaluate: options.EvaluationText = None,
    counts: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Count tokens in text like that to come (a file, or a folder of mole prepare) and "
            "keep that with the table: mole serve fills its row cache by it when it starts.",
        ),
    ] = None,
    save: Annotated[
        str,
        typer.Option(
            help="full: OUT has the backbone too. experts: it refers to it, for mole serve --table."
        ),
    ] = "full",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Fold the trained experts into a table on disk.

    OUT gets the backbone, the routers, the tokenizer and the table. An interrupted run goes on
    when the same command is given again. At the end it tells what the encoding costs, against the
    experts. Started by torchrun, several processes share the table's shards (4 GiB each).

    Example: `mole reparameterize runs/mole out/ --encoding nf4 --eval notes.txt --counts data/`
    """
    from functools import partial

    from lookup_experts.allocation import keep_freed_memory
    from lookup_experts.evaluation.counting import count_tokens
    from lookup_experts.evaluation.quality import quality_against_experts
    from lookup_experts.evaluation.text import read_token_ids
    from lookup_experts.folders.load import load
    from lookup_experts.folders.tokenizer import load_tokenizer
    from lookup_experts.generation.folding import reparameterize as fold
    from lookup_experts.generation.ranks import joined_ranks

    console.quiet_transformers()
    keep_freed_memory()  # every expert's activations are as large as the last one's
    with joined_ranks() as ranks:
        fold = partial(
            fold,
            folder,
            out,
            encoding=encoding,
            block_size=block_size,
            trust_remote_code=trust_remote_code,
            save=save,
            ranks=ranks,
        )
        if not ranks.is_main:
            fold()
            return
        token_ids = None
        if evaluate is not None:  # before the long work, so that what can't be read is told at once
            token_ids = read_token_ids(evaluate, load_tokenizer(folder, trust_remote_code))
        token_counts = None
        if counts is not None:
            if out.exists():  # as `fold` says, but before the counting
                raise UserError(f"{out} exists already; choose another folder, or delete it.")
            with console.progress_bar("Counting tokens") as progress:
                token_counts = count_tokens(counts, folder, progress, trust_remote_code)
        with console.progress_bar("Folding the experts") as progress:
            table = fold(token_counts=token_counts, progress=progress, notify=console.say)
    with console.progress_bar("Comparing predictions") as progress:
        model = load(folder, trust_remote_code=trust_remote_code)
        quality = quality_against_experts(table, model, token_ids, progress)
    report_table(out, table, quality, json)
