"""Slots in memory for records: those of the batches under way, and a cache of recent ones.

Records are read straight into slots and mixed straight out of them, so a record that stays cached
is never copied. A slot is held while a batch uses it; when nobody holds it, its record stays,
within the budget, and the least recently used goes first.
"""

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import copy

import numpy as np

from lookup_experts.errors import TableError
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.store import PendingRead


class Arrival:
    """A read that several batches may wait for, known before it has begun."""

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._read: PendingRead | None = None
        self._error: Exception | None = None

    def begin(self, start: Callable[[], PendingRead]) -> None:
        """Start the read; where that fails, those who wait get the error as well."""
        try:
            self._read = start()
        except Exception as error:
            self._error = error
            raise
        finally:
            self._begun.set()

    def abandon(self) -> None:
        """If it has not begun, it never will: those who wait get an error."""
        self._begun.set()

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        self._begun.wait()
        if self._read is None:
            # Ctrl-C is for the thread that it reached alone.
            raise self._error or TableError("A read was interrupted before it began.")
        try:
            self._read.wait()
        except Exception as error:
            # As a copy, which takes the traceback along. The read keeps the error, and with a
            # traceback all frames above, the rows of the batch among them: their slots would
            # never be given back.
            passed_on = copy(error).with_traceback(error.__traceback__)
            error.__traceback__ = None
            raise passed_on from None


class Slot:
    """One place for a record, and how it is being used."""

    __slots__ = ("arrival", "holders", "number")

    def __init__(self, number: int, arrival: Arrival) -> None:
        self.number = number
        self.holders = 1
        """Batches that use it now."""
        self.arrival: Arrival | None = arrival
        """What brings its record; None once it is there."""


class Taken:
    """The slots of one batch, in the order of its ids."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, Slot]] = []
        self.missing: list[tuple[int, Slot]] = []
        """Those among them whose records this batch must read."""
        self.arrival = Arrival()
        """Of the missing ones."""
        self.under_way: set[Arrival] = set()
        """Of those that other batches are reading."""


class SlotCache:
    """Which slots hold what, wherever their memory is. Safe to use from several threads.

    Args:
        num_slots: slots in all.
        cached_slots: how many records that nobody uses may stay in them.
    """

    def __init__(self, num_slots: int, cached_slots: int) -> None:
        self.cached_slots = cached_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[int, Slot] = {}
        self._idle: OrderedDict[int, Slot] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def take(self, ids: list[int]) -> Taken | None:
        """Hold a slot for each of the unique `ids`; None if there are not enough slots.

        The caller begins `arrival` for what is missing, waits, and then calls `arrived`, or
        `forget` if that failed; and `release` in the end.
        """
        with self._lock:
            if not self._has_room(ids):
                return None
            taken = Taken()
            try:
                self._fill(taken, ids)
            except BaseException:  # Ctrl-C: nobody would ever begin to read what is missing
                self._forget(taken)
                raise
            return taken

    def _fill(self, taken: Taken, ids: list[int]) -> None:
        # Hits are held first, so that none of them is evicted for a miss.
        found = {id_: slot for id_ in ids if (slot := self._hold(id_)) is not None}
        for id_ in ids:
            slot = found.get(id_)
            if slot is None:
                slot = self._held[id_] = Slot(self._free_slot(), taken.arrival)
                taken.missing.append((id_, slot))
            elif slot.arrival is not None:
                taken.under_way.add(slot.arrival)
            taken.entries.append((id_, slot))

    def arrived(self, taken: Taken) -> None:
        """Note that the missing records of a batch are there."""
        with self._lock:
            for _, slot in taken.missing:
                slot.arrival = None

    def forget(self, taken: Taken) -> None:
        """Drop the missing records of a batch, which could not be read.

        Only once the read has failed for good: others may hold the same slots and wait for it,
        and what they are told must be the same.
        """
        with self._lock:
            self._forget(taken)

    def _forget(self, taken: Taken) -> None:
        for id_, slot in taken.missing:
            if self._held.get(id_) is slot:
                del self._held[id_]
                self._free.append(slot.number)

    def release(self, taken: Taken) -> None:
        """Give the slots of a batch back, once; records beyond the budget are forgotten."""
        with self._lock:
            entries, taken.entries = taken.entries, []
            for id_, slot in entries:
                if self._held.get(id_) is not slot:
                    continue  # forgotten
                slot.holders -= 1
                if slot.holders == 0:
                    self._idle[id_] = self._held.pop(id_)
            while len(self._idle) > self.cached_slots:
                self._free.append(self._idle.popitem(last=False)[1].number)

    def _has_room(self, ids: list[int]) -> bool:
        idle_hits = sum(id_ in self._idle for id_ in ids)
        missing = len(ids) - idle_hits - sum(id_ in self._held for id_ in ids)
        return missing <= len(self._free) + len(self._idle) - idle_hits

    def _hold(self, id_: int) -> Slot | None:
        slot = self._held.get(id_)
        if slot is None:
            slot = self._idle.pop(id_, None)
            if slot is None:
                return None
            self._held[id_] = slot
        slot.holders += 1
        return slot

    def _free_slot(self) -> int:
        if self._free:
            return self._free.pop()
        return self._idle.popitem(last=False)[1].number


class RowCache(SlotCache):
    """Slots in RAM.

    Args:
        stride: bytes per record.
        budget_bytes: what records that nobody uses may take; 0 keeps none.
        working_slots: how many records batches may hold at once, beyond the budget.
    """

    def __init__(self, stride: int, budget_bytes: int, working_slots: int) -> None:
        cached_slots = budget_bytes // stride
        num_slots = cached_slots + working_slots
        super().__init__(num_slots, cached_slots)
        # Memory that was never touched takes none, so an empty cache costs nothing.
        self.memory: np.ndarray = aligned_buffer(num_slots * stride).reshape(num_slots, stride)

    def take_memory(self) -> None:
        """Take all of it from the kernel now, before the first record comes.

        A process that runs for long then has the size it will have, or fails at once.
        """
        with self._lock:
            if self.cached_slots and not self._held and not self._idle:
                self.memory.reshape(-1)[:: mmap.PAGESIZE] = 0
