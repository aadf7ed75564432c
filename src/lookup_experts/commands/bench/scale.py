"""`mole bench scale`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts.commands.bench import options as bench_options


def scale(
    data: Annotated[Path, typer.Option(help="A folder of `mole prepare`, with held-out text.")],
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            help="As for `mole bench quality`. Default: dense mole-4e meki:row_size=128 moe-10e."
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(min=1, help="At most, for each, e.g. 20e6. Default: four passes."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="For everything; tokens are chosen so that all systems fit."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order.")] = 0,
    recipe: Annotated[
        str, typer.Option(help="Sizes and schedule of all; a dense recipe.")
    ] = "dense-30m",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the recipe; can be given several times."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Where curves go as they come.")] = Path("runs/scale"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Train systems on equal tokens within a limit of time, on the GPU where there is one.

    Prints how validation loss, and the lead over dense, move with the tokens; then tokens per
    second, FLOPs, and recall from the context. Interrupted, the same command goes on after the
    systems that are done.

    Example: `mole bench scale --data data/ --seconds 180 --json scale.json`
    """
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.benchmarks.scale import bench_scale
    from lookup_experts.training.recipe import load_recipe

    bench_scale(
        systems or (),
        load_recipe(recipe, overrides or ()),
        data,
        None if tokens is None else int(tokens),
        seconds,
        seed,
        work,
        Results("scale", json, plot),
    )
