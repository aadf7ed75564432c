"""What commands say: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def say(message: str) -> None:
    """One line for the person, on stderr."""
    print(message, file=sys.stderr)  # noqa: T201


def result(text: str) -> None:
    """A result, on stdout."""
    print(text)  # noqa: T201


def json_result(value: dict[str, Any]) -> None:
    """The one JSON object of `--json`, on stdout."""
    print(json.dumps(value, indent=2))  # noqa: T201


@contextmanager
def progress_bar(description: str, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with an ETA on stderr; what it gives is called with (done, total).

    Args:
        description: what is being done.
        transient: leave nothing behind when it is over, and nothing at all in a log file.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = transient and not console.is_terminal
    bar = Progress(*columns, console=console, transient=transient, disable=disable)
    task = bar.add_task(description, total=None)

    def update(done: int, total: int) -> None:
        bar.start()  # with the first news, so that an error before it stands alone
        bar.update(task, completed=done, total=total or None)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def quiet_transformers() -> None:
    """Silence transformers' own bars and hints; its errors still come through."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
