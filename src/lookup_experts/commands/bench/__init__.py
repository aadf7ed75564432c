"""`mole bench WHAT`: a measurement is the function of its name in the module of its name."""

import typer

from lookup_experts.commands.bench.build import build
from lookup_experts.commands.bench.cache import cache
from lookup_experts.commands.bench.decode import decode
from lookup_experts.commands.bench.gpu import gpu
from lookup_experts.commands.bench.latency import latency
from lookup_experts.commands.bench.memory import memory
from lookup_experts.commands.bench.prefill import prefill
from lookup_experts.commands.bench.quality import quality
from lookup_experts.commands.bench.read import read
from lookup_experts.commands.bench.scale import scale
from lookup_experts.commands.bench.serve import serve
from lookup_experts.commands.bench.train import train

app = typer.Typer(
    name="bench",
    help="Measure decoding, prefill, reading, building and training on this machine.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
for measurement in (
    decode,
    prefill,
    read,
    build,
    memory,
    cache,
    latency,
    quality,
    scale,
    train,
    serve,
    gpu,
):
    app.command()(measurement)
