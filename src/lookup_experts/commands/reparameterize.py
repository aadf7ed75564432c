"""`mole reparameterize`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options


def reparameterize(
    folder: options.ModelFolder,
    out: Annotated[Path, typer.Argument(help="The inference folder to make.")],
    encoding: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16, int8, nf4 or nf3."),
    ] = "bfloat16",
    block_size: Annotated[
        int | None, typer.Option(help="nf4 and nf3: how many neighbours share a scale.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Fold the trained experts into a table on disk.

    OUT gets the backbone, the routers, the tokenizer and the table. An interrupted run goes on
    when the same command is given again.

    Example: `mole reparameterize runs/mole out/ --encoding bfloat16`
    """
    from lookup_experts.generation.folding import reparameterize as fold
    from lookup_experts.units import format_bytes

    console.quiet_transformers()
    with console.progress_bar("Folding the experts") as progress:
        table = fold(
            folder,
            out,
            encoding=encoding,
            block_size=block_size,
            progress=progress,
            notify=console.say,
        )
    layout = table.layout
    if json:
        console.json_result(
            {
                "folder": str(out),
                "records": layout.shape.vocab_size,
                "record_bytes": layout.record_bytes,
                "table_bytes": layout.table_bytes,
                "encoding": layout.encoding.name,
                "fingerprint": table.manifest.fingerprint,
            }
        )
    else:
        console.result(
            f"{out}: {layout.shape.vocab_size} records of {format_bytes(layout.record_bytes)}, "
            f"{format_bytes(layout.table_bytes)} in all, {layout.encoding.name}"
        )
