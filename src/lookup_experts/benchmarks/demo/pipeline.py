"""The demo from its first stage to its last: runs what isn't finished yet."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from lookup_experts import console
from lookup_experts.benchmarks.demo.corpus import Text
from lookup_experts.benchmarks.demo.journal import Journal, Result, Stage
from lookup_experts.benchmarks.demo.report import Report
from lookup_experts.benchmarks.demo.screen import Screen
from lookup_experts.benchmarks.demo.sizes import Sizes
from lookup_experts.benchmarks.demo.stages import REPORTS, Stages
from lookup_experts.errors import DiskFullError, UserError
from lookup_experts.training.files import locked
from lookup_experts.units import format_bytes


def run_demo(text: Text, sizes: Sizes, out: Path, command: str) -> Report:
    """Everything, or what of it isn't finished yet in `out`.

    Args:
        text: what to learn from.
        sizes: how large everything is.
        out: the demo's folder: new, empty, or one of an earlier demo.
        command: what the user typed, for the report.

    Returns:
        The report, which is in `out/report.json`, too.

    Raises:
        UserError: the text or the folder can't be used, or a package is missing.
        DiskFullError: there is too little space; what is finished is kept.
        TableError: the table disagrees with the experts, or is damaged.
    """
    _require_packages()
    with locked(out, "running a demo"), _told_when_disk_is_full(out):
        journal = Journal(out)
        screen = Screen()
        stages = Stages(text, sizes, out, command, screen).in_order()
        results: dict[str, Result] = {}
        for number, stage in enumerate(stages, start=1):
            screen.begin(number, len(stages), stage.why)
            results[stage.name] = _finish(stage, results, journal, screen, out, sizes)
        return json.loads((out / REPORTS[0]).read_bytes())


def _finish(
    stage: Stage,
    results: Mapping[str, Result],
    journal: Journal,
    screen: Screen,
    out: Path,
    sizes: Sizes,
) -> Result:
    """The stage's result: that of an earlier run, or of working on it now."""
    result = journal.result(stage)
    if result is not None:
        screen.end(stage.tell(result), None)
        return result
    _check_space(out, sizes)
    console.quiet_transformers()
    started_at = perf_counter()
    journal.begin(stage)
    result = stage.work(results)
    result["seconds"] = perf_counter() - started_at
    journal.finish(stage, result)
    screen.end(stage.tell(result), result["seconds"])
    return result


def _require_packages() -> None:
    """Before five minutes have gone by."""
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            raise UserError(
                f"The demo needs the package {package}: pip install 'lookup-experts[train,plot]'."
            )


def _check_space(out: Path, sizes: Sizes) -> None:
    free = shutil.disk_usage(out).free
    held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if free + held < sizes.disk_bytes():
        raise DiskFullError(
            f"The demo needs about {format_bytes(sizes.disk_bytes())} in {out}, "
            f"{format_bytes(free)} are free. Free some space, or choose an --out on another disk."
        )


@contextmanager
def _told_when_disk_is_full(out: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from lookup_experts.training.disk_space import says_disk_full

        if not says_disk_full(error):
            raise
        raise DiskFullError(
            f"The disk of {out} is full. What is finished is kept: free some space and run the "
            "same command again."
        ) from error
