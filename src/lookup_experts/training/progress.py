"""How far training is, on stderr: a live line on a terminal, a plain one now and then elsewhere."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, Self

from lookup_experts import console

_SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Shows the progress of one run; a context, which ends the display."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def update(self, step: int, status: str, seconds_left: float | None) -> None:
        """After every step: `status` is the loss and the rate in words."""
        ...

    def message(self, text: str) -> None:
        """A line that stays."""
        ...


def make_display(num_steps: int, shown: bool) -> Display:
    """The display that suits where stderr goes."""
    if not shown:
        return NoDisplay()
    from rich.console import Console

    terminal = Console(stderr=True)
    return LiveDisplay(num_steps, terminal) if terminal.is_terminal else LineDisplay(num_steps)


class NoDisplay:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, step: int, status: str, seconds_left: float | None) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class LineDisplay(NoDisplay):
    """A plain line every few seconds, and one at the end: for log files."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._shown_at = monotonic()
        self._unshown: str | None = None

    def __exit__(self, *exception: object) -> None:
        self._show()

    def update(self, step: int, status: str, seconds_left: float | None) -> None:
        left = format_duration(seconds_left)
        self._unshown = f"step {step:,}/{self._num_steps:,}  {status}  ETA {left}"
        if monotonic() - self._shown_at >= _SECONDS_BETWEEN_LINES:
            self._show()

    def _show(self) -> None:
        if self._unshown is not None:
            console.say(self._unshown)
            self._unshown, self._shown_at = None, monotonic()

    def message(self, text: str) -> None:
        console.say(text)


class LiveDisplay:
    """A bar that is redrawn in its place."""

    def __init__(self, num_steps: int, terminal: object) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        assert isinstance(terminal, Console)
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}  ETA {task.fields[left]}"),
            console=terminal,
        )
        self._task = self._progress.add_task("", total=num_steps, left="-")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, status: str, seconds_left: float | None) -> None:
        left = format_duration(seconds_left)
        self._progress.update(self._task, completed=step, description=status, left=left)

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


def format_duration(seconds: float | None) -> str:
    """`1:02:03`, or `-` where it is unknown."""
    return "-" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own for every file that it writes."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
