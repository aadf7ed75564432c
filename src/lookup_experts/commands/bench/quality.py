"""`mole bench quality`."""

from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands.bench import options as bench_options


def quality(
    data: Annotated[Path, typer.Option(help="A folder of `mole prepare`, with held-out text.")],
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            help="dense, moe-10e, mole-4e ...; keys of the recipe after a colon: mole-4e:size=128. "
            "Default: dense moe-10e mole-4e."
        ),
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(help="The systems of a study of the paper: losses, size, number or path."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="To train each on, e.g. 3e6.")] = "1e6",
    seeds: Annotated[str, typer.Option(help="One run of each system per seed.")] = "0,1,2",
    recipe: Annotated[
        str, typer.Option(help="Sizes and schedule of all; a dense recipe.")
    ] = "dense-tiny",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the recipe; can be given several times."),
    ] = None,
    forms: Annotated[
        bool,
        typer.Option(
            "--forms",
            help="The study of forms instead: loss against table bytes, learning rates searched, "
            "folded, taken apart; the best on five times as many tokens.",
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Of --forms: cpu, the default, or cuda.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that train at the same time.")] = 1,
    side_by_side: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of --forms: models that each process trains at a time, at least "
            "those of one form that differ in their seeds.",
        ),
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(
            help="Of --forms: capture steps as CUDA graphs. Default: on a GPU.", show_default=False
        ),
    ] = None,
    work: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("runs/quality"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Train systems alike, over several seeds, and compare their validation losses.

    Interrupted, the same command goes on; finished runs are not trained again. A run that is
    killed or out of memory is reported as such, and the others go on.

    With --forms, points that are finished when it is interrupted are in the report.

    Example: `mole bench quality dense moe-10e mole-4e --data data/ --tokens 3e6 --seeds 0,1,2`
    """
    from lookup_experts.benchmarks.forms.run import bench_forms
    from lookup_experts.benchmarks.quality import bench_quality
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.cli import EXIT_INTERRUPTED
    from lookup_experts.errors import UserError
    from lookup_experts.training.recipe import load_recipe
    from lookup_experts.training.train import TrainingInterrupted

    base = load_recipe(recipe, overrides or ())
    num_tokens, seed_numbers = _numbers(tokens, "--tokens")[0], _numbers(seeds, "--seeds")
    if forms:
        if systems or ablation:
            raise UserError("--forms names its own systems; leave systems and --ablation out.")
        results = Results("quality", json, plot, work)
        kept = work / "points"
        bench_forms(
            base,
            data,
            num_tokens,
            tuple(seed_numbers),
            kept,
            device or "cpu",
            jobs,
            side_by_side or 1,
            graphs,
            results,
        )
        return
    for option, value in (
        ("--device", device),
        ("--side-by-side", side_by_side),
        ("--graphs", graphs),
    ):
        if value is not None:
            raise UserError(f"{option} is of --forms; a recipe's runs know none.")
    try:
        results = Results("quality", json, plot)
        bench_quality(
            systems or (), ablation, seed_numbers, base, data, num_tokens, work, jobs, results
        )
    except TrainingInterrupted as interrupted:
        console.say(str(interrupted))
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _numbers(text: str, option: str) -> list[int]:
    from lookup_experts.errors import UserError

    try:
        numbers = [float(word) for word in text.split(",")]
        if any(number < 0 or not number.is_integer() for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(f"{option} is {text!r}; expected whole numbers.") from None
    return [int(number) for number in numbers]
