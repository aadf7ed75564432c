"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[
    str, typer.Argument(help="A model folder, or a name on the Hugging Face hub.")
]
Store = Annotated[
    str,
    typer.Option(
        help="Where the table is read from: memory, mmap, direct (disk), or auto: memory if it "
        "fits half of what is free, or what is given, like auto:8GB; else direct."
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        help="Budget for records of recent tokens, e.g. 256MB; 0 is off. RAM, with the records of "
        "the batch under way (up to 64) beside it; on a GPU half of it is the GPU's memory, or as "
        "much as is said behind a colon: 256MB:64MB."
    ),
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="Weights: float32, bfloat16, float16, or auto.")]
Weights = Annotated[
    str,
    typer.Option(
        help="Of the linear layers, on a CPU: auto (as they are fastest), plain (as torch has "
        "them), or int8 (8 bits)."
    ),
]
Checksums = Annotated[
    bool, typer.Option("--checksums", help="Compare every record that is read with its checksum.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let Python code that lies in the model's folder run; read it first.",
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Tell what it took, on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option(help="A folder with a tokenizer, where the model's folder has none."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, always.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: from all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
EvaluationText = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="TEXT",
        help="Compare the model's predictions too, on up to 32k tokens of this file "
        "(.txt, .jsonl, .txt.gz ...).",
    ),
]
BlockSize = Annotated[
    int | None, typer.Option(help="nf4 and nf3: how many neighbours share a scale.")
]
