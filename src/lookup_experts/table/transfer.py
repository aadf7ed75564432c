"""From a store into slots on a device: read to page-locked memory, copied beside the compute.

A batch's missing records are read into rows of a `PinnedRing`, and when they are there the lane
copies them to their slots, a group of layers after the other, so that the first blocks needn't
wait for the last layers. A row of the ring is used again when its copy is over.
"""

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from lookup_experts.errors import TableError
from lookup_experts.table.lanes import Lane, Mark
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.rows import WaitClock
from lookup_experts.table.store import PendingRead, Store

COPY_BYTES = 4 * 2**20
"""About what is copied between two marks. Less would let the first block begin a little earlier,
and have the host queue many more copies: one for each record and group."""


class PinnedRing:
    """Page-locked memory for records on their way, handed out row by row.

    Args:
        lane: whose copies read from it.
        row_bytes: bytes per row.
        least_rows: what a batch may need; there are more where the memory, whose size such
            memory is rounded up to (a power of two), has room for them.
        clock: counts the waiting for copies.
    """

    def __init__(self, lane: Lane, row_bytes: int, least_rows: int, clock: WaitClock) -> None:
        num_bytes = 1 << (least_rows * row_bytes - 1).bit_length()
        num_rows = num_bytes // row_bytes
        self.memory: Tensor = lane.host_memory(num_bytes)[: num_rows * row_bytes].view(
            num_rows, row_bytes
        )
        self.rows: tuple[Tensor, ...] = self.memory.unbind()
        self._clock = clock
        self._free = list(range(num_rows))
        self._reading: dict[PendingRead, None] = {}  # oldest first
        self._copying: deque[tuple[Mark, list[int]]] = deque()
        self._changed = threading.Condition()

    def take(self, count: int) -> list[int]:
        """So many rows, at most `least_rows`. Where others have them, what these wait for is
        waited for here as well, so nobody who holds rows without using them can block this."""
        while True:
            with self._changed:
                self._collect()
                if len(self._free) >= count:
                    taken, self._free = self._free[:count], self._free[count:]
                    return taken
                in_the_way = self._oldest()
                if in_the_way is None:
                    self._changed.wait()  # somebody has just taken rows and is about to read
                    continue
            with suppress(TableError):  # told to those who read
                self._clock.wait(in_the_way)

    def _collect(self) -> None:
        while self._copying and self._copying[0][0].is_reached():
            self._free += self._copying.popleft()[1]

    def _oldest(self) -> Mark | PendingRead | None:
        if self._copying:
            return self._copying[0][0]
        return next(iter(self._reading), None)

    def lend(self, read: PendingRead) -> None:
        """Note what reads into rows that were taken."""
        with self._changed:
            self._reading[read] = None
            self._changed.notify_all()

    def give_back(
        self, rows: list[int], read: PendingRead | None = None, copied: Mark | None = None
    ) -> None:
        """Rows that nobody reads into any more.

        Args:
            read: what did, as noted by `lend`.
            copied: reached when the copy out of them is over; None if there is none.
        """
        with self._changed:
            if read is not None:
                del self._reading[read]
            if copied is None:
                self._free += rows
            else:
                self._copying.append((copied, rows))
            self._changed.notify_all()


@dataclass(frozen=True)
class CopyGroup:
    """Layers that are copied together, and the bytes of a record that hold them."""

    end: int
    """The first layer that is not among them."""
    start: int
    stop: int


@lru_cache
def copy_groups(layout: RecordLayout, num_records: int) -> tuple[CopyGroup, ...]:
    """All layers in groups of about `COPY_BYTES` for so many records, at least one layer each."""
    num_layers = layout.shape.num_layers
    per_layer = max(1, num_records * layout.layer_bytes)
    size = min(num_layers, max(1, COPY_BYTES // per_layer))
    ends = [*range(size, num_layers, size), num_layers]
    starts = [0, *ends[:-1]]
    return tuple(
        CopyGroup(end, first * layout.layer_bytes, end * layout.layer_bytes)
        for first, end in zip(starts, ends, strict=True)
    )


class Transfer:
    """A batch's missing records on their way to the device.

    As a `PendingRead` it is over when they have been read and their copies are queued: from then
    on whoever waits for a mark gets the records.
    """

    def __init__(
        self, transfers: "Transfers", read: PendingRead, rows: list[int], slots: list[int]
    ) -> None:
        self._transfers, self._read = transfers, read
        self._rows, self._slots = rows, slots
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self.marks: list[tuple[int, Mark]] = []
        """(first layer that is not there yet, mark), ascending; once waited for."""

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        with self._lock:
            if self._error is None and not self.marks:
                self._finish()
            if self._error is not None:
                raise self._error

    def _finish(self) -> None:
        ring = self._transfers.ring
        try:
            self._read.wait()
            self.marks = self._transfers.copy(self._rows, self._slots)
        except Exception as error:
            self._error = error
            ring.give_back(self._rows, self)
            return
        ring.give_back(self._rows, self, self.marks[-1][1])


class Transfers:
    """Brings records to slots on a device; a `Filling` (`batch.py`).

    Args:
        store: where records are read from.
        layout: of the records.
        lane: what copies them.
        memory: uint8 [slots, stride], the slots.
        ring: what records are read to first.
    """

    def __init__(
        self,
        store: Store,
        layout: RecordLayout,
        lane: Lane,
        memory: Tensor,
        ring: PinnedRing,
    ) -> None:
        self._store, self._layout, self._lane, self._memory = store, layout, lane, memory
        self.ring = ring
        self._host_memory = ring.memory.numpy()
        self.last: Mark | None = None
        """Reached when all that was queued so far has been copied."""
        self.num_layers = layout.shape.num_layers
        self._lock = threading.Lock()

    def begin(self, ids: np.ndarray, slots: np.ndarray) -> Transfer:
        """See `Filling.begin`; at most as many ids as the ring has rows for a batch."""
        rows = self.ring.take(len(ids))
        try:
            read = self._store.begin(ids, self._host_memory, np.array(rows))
        except BaseException:
            self.settle()  # it may have begun before an interrupt
            self.ring.give_back(rows)
            raise
        transfer = Transfer(self, read, rows, slots.tolist())
        self.ring.lend(transfer)
        return transfer

    def settle(self) -> None:
        """See `Filling.settle`; copies are queued only by who waits."""
        self._store.settle()

    def copy(self, rows: list[int], slots: list[int]) -> list[tuple[int, Mark]]:
        """Queue the copies of what has been read from rows of the ring into slots."""
        marks: list[tuple[int, Mark]] = []
        targets = [self._memory[slot] for slot in slots]
        sources = [self.ring.rows[row] for row in rows]
        groups = copy_groups(self._layout, len(rows))
        with self._lock:  # so that `last` is the last one
            if len(groups) == 1:
                marks.append((self.num_layers, self._lane.copy(targets, sources)))
            else:
                for group in groups:
                    part = slice(group.start, group.stop)
                    mark = self._lane.copy(
                        [row[part] for row in targets], [row[part] for row in sources]
                    )
                    marks.append((group.end, mark))
            self.last = marks[-1][1]
        return marks
