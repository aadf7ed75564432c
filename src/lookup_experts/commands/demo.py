"""`mole demo`."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options


def demo(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file or folder of your own text, of any kind that `mole prepare` reads; can be "
            "given several times.",
            show_default="the Python standard library",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Less text and training: a minute instead of five.")
    ] = False,
    json: options.Json = False,
) -> None:
    """The whole story on text found on this machine: train, fold, read from disk, compare.

    Trains a small dense model and one with lookup experts on the same text, folds the experts
    into a table, and measures both. Needs no network. If the command is interrupted, run it
    again: it goes on where it stopped.

    Example: `mole demo --data my-book.txt`
    """
    from lookup_experts.benchmarks.demo.report import show_report, show_sample
    from lookup_experts.benchmarks.demo.stages import FULL, QUICK, run_demo
    from lookup_experts.benchmarks.text import own_text, standard_library
    from lookup_experts.cli import EXIT_INTERRUPTED

    text = own_text(data, out) if data else standard_library()
    command = shlex.join(["mole", *sys.argv[1:]])
    try:
        report = run_demo(text, QUICK if quick else FULL, out, command)
    except KeyboardInterrupt:
        console.say("Interrupted. Run the same command again to go on.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        console.json_result(report)
        return
    show_sample(report["agreement"])
    show_report(report)
    console.say(_what_next(out))


def _what_next(out: Path) -> str:
    mole = "mole" if shutil.which("mole") else os.path.relpath(sys.argv[0])
    folder = shlex.quote(str(out / "mole-table"))
    return "\n".join(
        [
            f"\nThe report with a picture: {out / 'report.md'}. What to try next:",
            f"  {mole} generate {folder} --prompt 'def main():' --store direct --stats",
            f"  {mole} inspect {folder}",
            f"  {mole} verify {folder}",
        ]
    )
