"""Results as files: one JSON object with the machine and the versions that gave it."""

import json
import sys
from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.machine import describe_machine


def make_report(what: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that `--json` gives: what was measured, by which command, where, and results."""
    return {
        "what": what,
        "command": " ".join(["mole", *sys.argv[1:]]),
        "machine": describe_machine().to_dict(),
        "results": results,
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report to a file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)
