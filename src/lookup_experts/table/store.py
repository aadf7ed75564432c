"""A store brings the records of a batch of ids: `store.read(ids, out)`.

Here is the contract, and what all stores share. Each has a file of its own; see `store_choice.py`.
What a record means is in `format.py` and `encoding.py`; caching and prefetching are in `cache.py`
and `reader.py`.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from lookup_experts.errors import TableError
from lookup_experts.table.damage import find_damage
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.opening import Table, read_checksums
from lookup_experts.table.reading_thread import ThreadedRead, submit_read
from lookup_experts.table.scales import PROBLEM, scale_check

_CHECKED_BYTES = 2**24
_FEW = 64

Notify = Callable[[str], None]
log: Notify = logging.getLogger("lookup_experts").warning
"""Tells those who didn't say how they want to be told: Python prints it to stderr."""


class Store(Protocol):
    """Where records come from. Safe to call from several threads at once."""

    name: str
    """"memory", "mmap" or "direct"."""
    backend: str
    """What really does the reading: "ram", "page cache", "io_uring", "preadv x8 threads" ..."""
    bytes_read: int
    """Bytes brought from where the records are."""
    reads: int
    """Calls of `read` that had ids."""
    seconds_reading: float
    """Seconds spent in those calls, summed over threads."""
    verify_checksums: bool
    """Whether records that are read are compared with their checksums."""

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """Put the records of `ids`, or the same part of each, into `out`.

        Args:
            ids: int64 [U], unique.
            out: uint8 [U, width], C-contiguous; a whole record has width `stride`. Where records
                are whole blocks of the disk, `start` and `width` multiples of 4096, and `out`
                aligned to that (`aligned_buffer`, pinned memory), `direct` reads straight into
                it; otherwise it copies.
            start: the first byte of the part.

        Raises:
            TableError: an id is outside the table; a record can't be read in full, or is
                damaged: by its scales, or (whole records, with `verify_checksums`) anywhere.
                Names file and id. `out` is then undefined.
        """

    def check(self, ids: np.ndarray) -> None:
        """Compare the whole records of `ids`, of which parts will be read, with their checksums,
        which a part alone can't be.

        A few are held at a time. Without `verify_checksums` nothing is done.

        Raises:
            TableError: as `read`.
        """

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> "PendingRead":
        """Start to put whole records into rows of `memory`; for small batches.

        Args:
            ids: int64 [U], unique.
            memory: uint8 [M, stride], contiguous. Aligned to 4096, records that are whole blocks
                of the disk are read straight into it.
            slots: int64 [U], the row of `memory` for each id. Nobody else may touch these rows
                until the read is over.

        Raises:
            TableError: an id is outside the table.
        """

    def settle(self) -> None:
        """Return when nothing that was begun so far writes into memory any more.

        For who was interrupted (Ctrl-C) while a read began, and so holds nothing to wait for.
        """

    def whole(self) -> np.ndarray | None:
        """All records, uint8 [V, stride], where they are in memory anyway; else None."""

    def reopened(self) -> "Store":
        """Another store over the same table, opened as this one was; records in RAM are shared.

        Raises:
            TableError: the table is no longer there, or is another one.
        """

    def close(self) -> None:
        """Give back files, threads and memory; what was begun is read to its end."""


class PendingRead(Protocol):
    """A read that was begun."""

    def wait(self) -> None:
        """Return when the records are there; may be called again, and from any thread.

        The memory belongs to the read until this has returned, or has raised an `Exception`: an
        interrupted wait (Ctrl-C) must be repeated.

        Raises:
            TableError: as `Store.read`; the same each time.
        """


class RecordStore(ABC):
    """What all stores share: checking requests and records, finding files, counting."""

    name: str
    backend: str

    def __init__(self, table: Table, verify_checksums: bool) -> None:
        self.table, self.layout = table, table.layout
        self.verify_checksums = verify_checksums
        self.bytes_read, self.reads, self.seconds_reading = 0, 0, 0.0
        self._first_ids = np.array([shard.first_id for shard in table.shards])
        self._checksums = _all_checksums(table) if verify_checksums else None
        self._scales = scale_check(table.layout)
        self._count_lock = threading.Lock()
        self._closed = False
        self._thread: ThreadPoolExecutor | None = None

    @abstractmethod
    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """See `Store.read`."""

    def read_by(
        self,
        fetch: Callable[[np.ndarray, np.ndarray, int], int],
        ids: np.ndarray,
        out: np.ndarray,
        start: int,
    ) -> None:
        """Check a request, have `fetch` bring the records, check them and count.

        Args:
            fetch: as `read`, for valid ids, of which there is one at least; gives back how many
                bytes it brought from where they are.
        """
        self._check_request(ids, out, start)
        if not len(ids):
            return
        started_at = time.perf_counter()
        num_bytes = fetch(ids, out, start)
        self._check_records(ids, out, start)
        self._count(num_bytes, time.perf_counter() - started_at)

    def check(self, ids: np.ndarray) -> None:
        """See `Store.check`."""
        if self._checksums is None:
            return
        stride = self.layout.stride
        at_once = max(1, _CHECKED_BYTES // stride)
        records = aligned_buffer(min(at_once, len(ids)) * stride).reshape(-1, stride)
        for first in range(0, len(ids), at_once):
            part = ids[first : first + at_once]
            self.read(part, records[: len(part)])

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> PendingRead:
        """See `Store.begin`; here by a thread that reads beside the caller."""
        self._check_ids(ids)
        return ThreadedRead(submit_read(self._background(), self._read_into, ids, memory, slots))

    def _read_into(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> None:
        if len(ids) == 1:  # no copy in between; a record may be megabytes
            self.read(ids, memory[int(slots[0]), np.newaxis])
            return
        stride = self.layout.stride
        records = aligned_buffer(len(ids) * stride).reshape(len(ids), stride)
        self.read(ids, records)
        memory[slots] = records

    def _background(self) -> ThreadPoolExecutor:
        """The thread of `begin`, started when it is first needed."""
        with self._count_lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "table-reader")
            return self._thread

    def settle(self) -> None:
        """See `Store.settle`."""
        if self._thread is not None:
            submit_read(self._thread, lambda: None).exception()  # it reads one after the other

    def whole(self) -> np.ndarray | None:
        """See `Store.whole`."""
        return None

    @abstractmethod
    def reopened(self) -> Self:
        """See `Store.reopened`."""

    def close(self) -> None:
        """See `Store.close`."""
        if self._thread is not None:
            self._thread.shutdown()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_request(self, ids: np.ndarray, out: np.ndarray, start: int) -> None:
        stride = self.layout.stride
        width = out.shape[-1] if out.ndim == 2 and 0 < out.shape[1] <= stride - start else stride
        expected = (len(ids), width)
        if (
            start < 0
            or out.shape != expected
            or out.dtype != np.uint8
            or not out.flags.c_contiguous
        ):
            raise ValueError(
                f"Expected contiguous uint8 {expected}, got {out.dtype} {out.shape} "
                f"with strides {out.strides}."
            )
        self._check_ids(ids)

    def _check_ids(self, ids: np.ndarray) -> None:
        if self._closed:
            raise ValueError(f"The {self.name} store over {self.table.folder} is closed.")
        if not len(ids):
            return
        # The few ids of a step in plain Python, which begins sooner than operations on arrays.
        listed = ids.tolist() if len(ids) <= _FEW else [int(ids.min()), int(ids.max())]
        low, high = min(listed), max(listed)
        vocab_size = self.layout.shape.vocab_size
        if low < 0 or high >= vocab_size:
            raise TableError(
                f"Token id {low if low < 0 else high} is not in the table, whose ids are 0 to "
                f"{vocab_size - 1}."
            )

    def _check_records(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        if self._scales is not None:
            for row in self._scales.rows(out, start):
                raise self._damaged(int(ids[row]), PROBLEM)
        if self._checksums is None or out.shape[1] != self.layout.stride:
            return
        for row, problem in find_damage(self.layout, out, self._checksums[ids]):
            raise self._damaged(int(ids[row]), problem)

    def _damaged(self, token_id: int, problem: str) -> TableError:
        path, _ = self._place(token_id)
        own_id = self.table.own_id(token_id)
        return TableError(f"{path}: the record of id {own_id} is damaged: {problem}.")

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row within the shard of each id, int64 [U] both."""
        shards = np.searchsorted(self._first_ids, ids, side="right") - 1
        return shards, ids - self._first_ids[shards]

    def _place(self, token_id: int) -> tuple[Path, int]:
        """File and offset of one record, for messages."""
        shards, rows = self._locate(np.array([token_id]))
        path = self.table.path(self.table.shards[int(shards[0])])
        return path, self.layout.record_offset(int(rows[0]))

    def _count(self, num_bytes: int, seconds: float) -> None:
        with self._count_lock:
            self.reads += 1
            self.bytes_read += num_bytes
            self.seconds_reading += seconds


def _all_checksums(table: Table) -> np.ndarray:
    return np.concatenate([read_checksums(table, shard) for shard in table.shards])
