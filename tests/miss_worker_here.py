"""A worker for `CachedRecords` in a thread of the test, where it can be watched, slowed, and made
to fail; the protocol is the same as with a process."""

import mmap
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from lookup_experts.errors import TableError
from lookup_experts.table import device_cache
from lookup_experts.table.device_cache import CachedRecords
from lookup_experts.table.miss_messages import MESSAGE_BYTES, NEVER, Messages
from lookup_experts.table.miss_worker import MissWorker
from lookup_experts.table.store_choice import open_store

CPU = torch.device("cpu")


class SlowWords:
    """Words that are written one after the other, with pauses at random."""

    def __init__(self, words: Any, seed: int, most_seconds: float) -> None:
        self._words, self._random = words, random.Random(seed)
        self._most_seconds = most_seconds

    def __setitem__(self, place: int, word: int) -> None:
        if self._random.random() < 0.1:
            time.sleep(self._random.uniform(0, self._most_seconds))
        self._words[place] = word

    def __getattr__(self, name: str) -> Any:
        return getattr(self._words, name)


class SlowStore:
    """A store whose reads begin and end late."""

    def __init__(self, store: Any, seed: int, most_seconds: float) -> None:
        self._store, self._random = store, random.Random(seed)
        self._most_seconds = most_seconds

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> Any:
        memory[slots] = 0x5A  # who reads now gets rubbish
        time.sleep(self._random.uniform(0, self._most_seconds))
        return self._store.begin(ids, memory, slots)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class WorkerHere:
    """What `CachedRecords` sees of a `MissProcess`."""

    is_ours = True
    backend = "a thread of the test"

    def __init__(self, table, verify_checksums, num_slots, num_hot, notify, slow=0.0, seed=0):
        stride = table.layout.stride
        memory = mmap.mmap(-1, num_slots * stride)
        self.slots = np.frombuffer(memory, np.uint8).reshape(num_slots, stride)
        messages = mmap.mmap(-1, MESSAGE_BYTES)
        self.message_bytes = np.frombuffer(messages, np.uint8)
        self.messages = Messages(messages)
        self.store = open_store(
            table, "direct", verify_checksums=verify_checksums, notify=lambda message: None
        )
        self.problems: list[str] = []
        store, words = self.store, Messages(messages)
        if slow:
            store = SlowStore(store, seed, slow)
            words.replies = SlowWords(words.replies, seed, slow)

        def tell(problem: str) -> None:
            if not self.problems:  # as a process, which tells the first one
                self.problems.append(problem)

        self.worker = MissWorker(store, words, self.slots, num_hot, tell)
        self._over = threading.Event()
        self.has_died = False
        self._thread = threading.Thread(target=self.worker.run, args=(self._over.is_set,))
        self._thread.start()

    def check(self) -> None:
        if self.problems:
            raise TableError(self.problems.pop(0))

    def death(self) -> TableError:
        return TableError("dead")

    def die(self) -> None:
        """What the watcher of a process does when that has ended."""
        self.close()
        for place in range(len(self.messages.replies)):
            self.messages.replies[place] = NEVER
        self.has_died = True

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.store.close()


@contextmanager
def open_here(
    table, hot=0, ram=0, slow=0.0, seed=0, kernels=None, verify_checksums=False
) -> Iterator[CachedRecords]:
    """Records on the CPU with a worker in this process.

    Args:
        hot, ram: slots.
        slow: the most seconds of its pauses.
    """

    def start(*arguments):
        return WorkerHere(*arguments, slow=slow, seed=seed)

    stride = table.layout.stride
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)  # two threads poll for each other's words
    with pytest.MonkeyPatch.context() as patch, ExitStack() as failing:
        failing.callback(sys.setswitchinterval, interval)
        patch.setattr(device_cache, "MissProcess", start)
        if kernels is not None:
            patch.setattr(device_cache, "_kernels", lambda device: kernels)
        records = CachedRecords(
            table, CPU, hot * stride, ram * stride, verify_checksums=verify_checksums
        )
        failing.pop_all()
    try:
        yield records
    finally:
        records.close()
        sys.setswitchinterval(interval)


def fetched(cache: CachedRecords, ids: Any, start: int = 0, width: int | None = None) -> np.ndarray:
    """What a step gets for these ids, uint8 [P, W]."""
    ids = torch.as_tensor(ids, dtype=torch.int64)
    width = cache._hot.shape[1] - start if width is None else width
    out = torch.full((len(ids), width), 0xEE, dtype=torch.uint8)
    cache.gather(cache.locate(ids), start, out)
    return out.numpy()


@contextmanager
def workers_here(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, whoever opens a table for a device has its worker in this process."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    patch.setattr(device_cache, "MissProcess", WorkerHere)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
