"""Runs `mole bench`."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lookup_experts import cli


def bench(folder: Path, what: str, *arguments: object) -> dict[str, Any]:
    """The report of a measurement of the shape `tiny`, which keeps its files in `folder`."""
    out = folder / f"{what}.json"
    common = ["--shape", "tiny", "--work", str(folder / "work"), "--json", str(out)]
    done = CliRunner().invoke(cli.app, ["bench", what, *common, *map(str, arguments)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] >= 1
    return report
