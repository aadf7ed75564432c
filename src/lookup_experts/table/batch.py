"""The slots of one batch, from asking for its records to giving them back."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lookup_experts.table.cache import SlotCache, Taken
from lookup_experts.table.store import PendingRead, Store


def unique_in_order(ids: list[int]) -> tuple[list[int], list[int]]:
    """The unique ids as they first appear, and each id's place among them."""
    place_of_id: dict[int, int] = {}
    places = [place_of_id.setdefault(token_id, len(place_of_id)) for token_id in ids]
    return list(place_of_id), places


class Filling(Protocol):
    """Puts records into slots, wherever these are."""

    def begin(self, ids: np.ndarray, slots: np.ndarray) -> PendingRead:
        """Start to bring the records of `ids` into `slots`, int64 [U] both.

        What comes back must be over for good once its `wait` has returned or raised an error.
        """
        ...

    def settle(self) -> None:
        """See `Store.settle`."""
        ...


@dataclass(frozen=True)
class FillingFromStore:
    """Straight from a store into slots in RAM."""

    store: Store
    memory: np.ndarray
    """uint8 [slots, stride]."""

    def begin(self, ids: np.ndarray, slots: np.ndarray) -> PendingRead:
        """See `Filling.begin`."""
        return self.store.begin(ids, self.memory, slots)

    def settle(self) -> None:
        """See `Filling.settle`."""
        self.store.settle()


class SlotBatch:
    """The slots that one batch holds.

    As a `PendingRead` it stands for all of them: what this batch reads, and what others are
    reading for it.
    """

    def __init__(self, filling: Filling, cache: SlotCache, taken: Taken) -> None:
        self._filling, self._cache, self._taken = filling, cache, taken
        self._open = bool(taken.missing)
        self.is_pending = self._open or bool(taken.under_way)
        """Whether there is anything to wait for."""
        self.read: PendingRead | None = None
        """What reads the missing records, once it has begun."""

    @property
    def shares(self) -> bool:
        """Whether other batches are reading for this one as well."""
        return bool(self._taken.under_way)

    @property
    def missing_ids(self) -> frozenset[int]:
        """The ids whose records this batch reads."""
        return frozenset(token_id for token_id, _ in self._taken.missing)

    def slots(self) -> list[int]:
        """Where the records are, or will be, in the order of the ids."""
        return [slot.number for _, slot in self._taken.entries]

    def begin(self) -> None:
        """Start to read what is missing."""
        if self._taken.missing:
            self._taken.arrival.begin(self._begin_read)

    def _begin_read(self) -> PendingRead:
        missing = self._taken.missing
        ids = np.array([token_id for token_id, _ in missing])
        slots = np.array([slot.number for _, slot in missing])
        self.read = self._filling.begin(ids, slots)
        return self.read

    def abandon(self) -> None:
        """Give up a batch whose rows could not be made; those who wait for its reading get an
        error if that has not begun."""
        # An interrupt may have come between the kernel's taking the read and our noting it.
        self._filling.settle()
        self._taken.arrival.abandon()
        self.release()

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        if self._open:
            self._settle()
        elif self._taken.missing:
            self._taken.arrival.wait()  # once more: it ends as it did
        for arrival in self._taken.under_way:
            arrival.wait()

    def _settle(self) -> None:
        """Wait for what this batch reads, and tell the cache how that ended.

        Where the waiting is interrupted (Ctrl-C) it hasn't ended, and remains to be done.
        """
        try:
            self._taken.arrival.wait()
        except Exception:  # passed on; not Ctrl-C, after which the read goes on
            self._open = False
            self._cache.forget(self._taken)
            raise
        self._open = False
        self._cache.arrived(self._taken)

    def release(self) -> None:
        """Give the slots back. If nobody waited (a forward pass that failed), the read is waited
        for now: the kernel must not write into slots that have a new owner."""
        if self._open:
            with suppress(Exception):  # it only matters that the read is over
                self._settle()
        self._cache.release(self._taken)
