"""How far long work has come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with (ids done, ids in all)."""


@contextmanager
def late_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to call with bytes done; a bar appears on stderr after two seconds."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(description), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total_bytes)
    started_at = time.perf_counter()

    def advance(num_bytes: int) -> None:
        bar.advance(task, num_bytes)
        if not bar.live.is_started and time.perf_counter() - started_at > 2:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
