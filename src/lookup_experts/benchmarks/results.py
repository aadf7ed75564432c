"""Results: said and kept as they come; in the end one JSON object with the machine and the
versions that gave it, and a picture."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lookup_experts import console
from lookup_experts.benchmarks.machine import describe_machine
from lookup_experts.benchmarks.plots import check_picture

Result = dict[str, Any]
"""One measurement, as plain JSON values."""


def make_report(what: str, results: list[Result]) -> dict[str, Any]:
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


class Results:
    """What a run of `mole bench WHAT` has measured so far.

    It is kept beside `json` (`NAME.partial`) until all of it is there, so that a run that is broken
    off leaves what it had.

    Args:
        what: the command's name.
        json: the file of the report; the standard output where there is none.
        plot: a file to draw into.
        work: a folder to keep results in where there is no `json`; without, they aren't kept.

    Raises:
        UserError: no picture could be drawn there.
    """

    def __init__(
        self, what: str, json: Path | None, plot: Path | None = None, work: Path | None = None
    ) -> None:
        check_picture(plot)
        self._what, self._json, self._plot = f"bench {what}", json, plot
        beside = json or (work / f"{what}.json" if work else None)
        self._partial = beside.with_name(f"{beside.name}.partial") if beside else None
        self.found: list[Result] = []

    def resume(self, apart_from: str | None = None) -> None:
        """Take over what the same command, of the same program, had when it was broken off.

        Args:
            apart_from: an option whose value may be another.
        """
        if self._partial is None or not self._partial.exists():
            return
        before, now = json.loads(self._partial.read_text()), self._report()
        value = re.compile(rf" {apart_from}[ =]\S+") if apart_from else None
        same = [
            (
                value.sub("", report["command"]) if value else report["command"],
                report["machine"]["versions"],
                report["machine"]["commit"],
            )
            for report in (before, now)
        ]
        if same[0] == same[1]:
            self.found = before["results"]

    def add(self, *found: Result, say: Callable[[Result], str] | None = None) -> None:
        """Keep results, without what doesn't apply to them (None), and say each in a line."""
        for result in found:
            applies = {key: value for key, value in result.items() if value is not None}
            self.found.append(applies)
            console.say((say or line)(applies))
        if self._partial:
            write_report(self._report(), self._partial)

    def finish(self, draw: Callable[[list[Result], Path], None] | None = None) -> None:
        """Report, and draw; warns of results that were to come from the disk and didn't."""
        if any(result.get("page_cache_bypassed") is False for result in self.found):
            console.say(
                "Warning: the page cache answered reads, so these figures are not the disk's."
            )
        if self._json:
            write_report(self._report(), self._json)
        else:
            console.json_result(self._report())
        if self._partial:
            self._partial.unlink(missing_ok=True)
        if self._plot and draw:
            draw(self.found, self._plot)

    def _report(self) -> dict[str, Any]:
        return make_report(self._what, self.found)


def line(result: Result) -> str:
    """One result in one line."""
    words = []
    for key, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{key} {shown}")
    return "  " + ", ".join(words)
