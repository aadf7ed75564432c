"""`mole offload`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options


def offload(
    folder: options.ModelFolder,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    module: Annotated[
        list[str] | None,
        typer.Option(
            help="The name of an embedding; may be given several times. Default: those that are "
            "known to be read by token and layer (Gemma 3n, Gemma 4) or n-gram (Qwen4Exp)."
        ),
    ] = None,
    encoding: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16, int8, nf4 or nf3."),
    ] = "bfloat16",
    block_size: options.BlockSize = None,
    json: options.Json = False,
) -> None:
    """Put the embeddings of a released model into tables on disk.

    OUT gets the other weights (linked where possible), all other files and the tables. It is
    loaded, generated with, served and evaluated like any other model here. An interrupted run goes
    on when the same command is given again.

    Example: `mole offload google/gemma-3n-E2B-it out/`
    """
    from lookup_experts.generation.offload import offload as put_into_tables
    from lookup_experts.units import format_bytes

    console.quiet_transformers()
    with console.progress_bar("Offloading embeddings") as progress:
        tables = put_into_tables(
            folder,
            out,
            module,
            encoding,
            block_size=block_size,
            progress=progress,
            notify=console.say,
        )
    if json:
        console.json_result(
            {
                "folder": str(out),
                "embeddings": {
                    name: {
                        "records": table.layout.shape.vocab_size,
                        "record_bytes": table.layout.record_bytes,
                        "table_bytes": table.layout.table_bytes,
                        "encoding": table.layout.encoding.name,
                        "fingerprint": table.manifest.fingerprint,
                    }
                    for name, table in tables.items()
                },
            }
        )
        return
    for name, table in tables.items():
        layout = table.layout
        console.result(
            f"{name}: {layout.shape.vocab_size} records of {format_bytes(layout.record_bytes)}, "
            f"{format_bytes(layout.table_bytes)} in all, {layout.encoding.name}"
        )
