"""`mole prepare`: text to token shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options

if TYPE_CHECKING:
    from lookup_experts.training.prepare import PreparedText


def prepare(
    text: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Files (.txt, .md, .py, .jsonl, .parquet; .txt and .jsonl also as .gz or .zst), "
            "folders of them, or Hugging Face data sets as `name` or `name:config`.",
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="A Hugging Face tokenizer: a folder, a `tokenizer.json`, or a name on the hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    validation: Annotated[
        float, typer.Option(help="The share of the tokens to hold out, in whole documents.")
    ] = 0.01,
    text_field: Annotated[
        str, typer.Option(help="The field with the text, in rows of .jsonl, .parquet, data sets.")
    ] = "text",
    eos_token: Annotated[
        str | None,
        typer.Option(
            help="The token to put after every document.", show_default="the tokenizer's eos"
        ),
    ] = None,
    bos: Annotated[
        bool,
        typer.Option(
            "--bos/--no-bos",
            help="Begin each document as the tokenizer begins a text, for many with a BOS token; "
            "--no-bos begins it with its text.",
        ),
    ] = True,
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenise.", show_default="one per core")
    ] = None,
    json: options.Json = False,
) -> None:
    """Turn text into token shards for training.

    A text file is one document, and so is each row of a .jsonl or .parquet file or a data set. In a
    folder with such rows README.md and .py files are no documents. It is told what was taken as
    what. If the command is interrupted, run it again: it goes on where it stopped.

    Example: `mole prepare books/ notes.txt --tokenizer EleutherAI/gpt-neox-20b --out data/`
    """
    from lookup_experts.training.prepare import prepare as prepare_text

    console.quiet_transformers()
    prepared = prepare_text(
        text,
        tokenizer=tokenizer,
        out=out,
        validation=validation,
        text_field=text_field,
        eos_token=eos_token,
        bos=bos,
        num_workers=workers,
        progress=console.progress_bar,
        notify=console.say,
    )
    if json:
        console.json_result(prepared.summary())
    else:
        console.result(_in_words(prepared))


def _beginning(prepared: "PreparedText") -> str:
    put, given = prepared.bos_tokens, prepared.tokenizer_bos_tokens
    if put:
        return f"Each document begins with {' '.join(put)}, as the tokenizer begins a text."
    if given:
        return (
            f"Each document begins with its text, without the {' '.join(given)} that the tokenizer "
            "begins a text with."
        )
    return "Each document begins with its text; the tokenizer puts nothing before it."


def _in_words(prepared: "PreparedText") -> str:
    manifest = prepared.manifest
    done = "is complete already; nothing was done" if prepared.was_complete else "is complete"
    lines = [f"{prepared.folder} {done}."]
    lines.append(_beginning(prepared))
    lines += [
        f"{split}: {manifest.num_tokens(split):,} tokens, "
        f"documents that end in it: {manifest.num_documents(split):,}"
        for split in manifest.splits
    ]
    if manifest.held_out["by"] == "tail":
        lines.append("There is one document only, so the end of it was held out for validation.")
    if manifest.num_empty_documents:
        lines.append(f"Left out, because empty: {manifest.num_empty_documents:,} documents.")
    return "\n".join(lines)
