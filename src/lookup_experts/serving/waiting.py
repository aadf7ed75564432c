"""The bounded line of sequences that wait for a place in the batch."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lookup_experts.serving.metrics import ServingMetrics
from lookup_experts.serving.sequence import GenerationSequence


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on."""

    max_batch: int = 32
    """Sequences that run at the same time."""
    max_queue: int = 128
    """Sequences that wait."""


class QueueFullError(Exception):
    """There is no place to wait."""


class ShuttingDownError(Exception):
    """Nothing new is taken on."""


class WaitingLine:
    """First come, first served. Safe to use from any thread.

    Args:
        limits: of the batch and the line.
        metrics: told how long the line is.
    """

    def __init__(self, limits: Limits, metrics: ServingMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._waiting: deque[GenerationSequence] = deque()
        self._changed = threading.Condition()
        self.is_draining = False
        """Set, also in a signal handler, to take nothing new."""

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, sequences: Sequence[GenerationSequence], num_running: int) -> None:
        """Queue the sequences of one request: all of them, or none.

        Raises:
            QueueFullError, ShuttingDownError.
        """
        with self._changed:
            if self.is_draining:
                raise ShuttingDownError
            free = max(0, self._limits.max_batch - num_running)
            if len(self._waiting) + len(sequences) > self._limits.max_queue + free:
                self._metrics.rejected.inc()
                raise QueueFullError
            self._waiting.extend(sequences)
            self._changed.notify()
            self._tell_length()

    def put_back(self, sequences: Sequence[GenerationSequence]) -> None:
        """Let these wait again, before all others."""
        with self._changed:
            self._waiting.extendleft(reversed(sequences))
            self._tell_length()

    def wake(self) -> None:
        """Let `wait` return and look again."""
        with self._changed:
            self._changed.notify()

    def wait(self, is_enough: Callable[[], bool]) -> None:
        """Return when somebody waits, or `is_enough` says that there is something else to do."""
        with self._changed:
            while not self._waiting and not is_enough():
                # Woken now and then, since a signal handler can't take the lock to notify.
                self._changed.wait(timeout=1.0)

    def drop(self, is_over: Callable[[GenerationSequence], bool]) -> None:
        """Remove those who need not wait any more."""
        with self._changed:
            self._waiting = deque(one for one in self._waiting if not is_over(one))
            self._tell_length()

    def take(
        self,
        most: int,
        fits: Callable[[list[GenerationSequence], GenerationSequence], bool],
    ) -> list[GenerationSequence]:
        """The first ones, at most `most`, as long as each fits those before it."""
        taken: list[GenerationSequence] = []
        with self._changed:
            while self._waiting and len(taken) < most and fits(taken, self._waiting[0]):
                taken.append(self._waiting.popleft())
            self._tell_length()
        return taken

    def _tell_length(self) -> None:
        self._metrics.waiting.set(len(self._waiting))
