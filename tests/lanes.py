"""Lanes for tests, without a device: one that is late, and one that notes what was asked of it."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lookup_experts.table.lanes import HostLane, Mark


class LateMark:
    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result(30)


class LateLane(HostLane):
    """Copies in a thread of its own, in order and some time later, as a CUDA stream does.

    Who reads what was copied without waiting for the mark, or reads into what is still to be
    copied, gets wrong rows.
    """

    def __init__(self, most_seconds: float = 0.002, seed: int = 0) -> None:
        self._thread = ThreadPoolExecutor(1, "late-lane")
        self._random = random.Random(seed)
        self._most_seconds = most_seconds
        self.copies = 0

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Mark:
        self.copies += 1
        seconds = self._random.uniform(0, self._most_seconds)
        return LateMark(self._thread.submit(self._copy, seconds, list(targets), list(sources)))

    def _copy(self, seconds: float, targets: list[Tensor], sources: list[Tensor]) -> None:
        time.sleep(seconds)
        for target, source in zip(targets, sources, strict=True):
            assert target.is_contiguous() and source.is_contiguous()
            target.copy_(source)

    def beside(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> Mark:
        seconds = self._random.uniform(0, self._most_seconds)
        mode = torch.is_inference_mode_enabled()  # which is each thread's own
        return LateMark(self._thread.submit(self._work, seconds, mode, work))

    def _work(self, seconds: float, mode: bool, work: Callable[[], None]) -> None:
        time.sleep(seconds)
        with torch.inference_mode(mode), torch.no_grad():
            work()

    def lead(self, mark: Mark) -> None:
        mark.wait()


class NotingLane(HostLane):
    """Notes, in order, what the model's queue and the lane were told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ids_fetched = 0
        self._lock = threading.Lock()

    def note(self, what: str) -> None:
        with self._lock:
            self.notes.append(what)

    def follow(self, mark: Mark) -> None:
        self.note("follow")

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Mark:
        self.note("copy")
        return super().copy(targets, sources)

    def beside(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> Mark:
        self.note("beside")
        return super().beside(work, tensors)

    def lead(self, mark: Mark) -> None:
        self.note("lead")

    def to_host(self, token_ids: Tensor) -> Any:
        self.ids_fetched += 1
        return super().to_host(token_ids)
