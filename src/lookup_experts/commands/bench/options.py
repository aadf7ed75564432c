"""Options that the measurements share."""

from pathlib import Path
from typing import Annotated

import typer

Shape = Annotated[str, typer.Option(help="The paper's shape: 160m, 410m or 1b.")]
Experts = Annotated[int, typer.Option("--experts", help="Routed experts per layer.")]
Encoding = Annotated[str, typer.Option(help="Of the table.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")]
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
