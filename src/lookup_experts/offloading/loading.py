"""How an expert's record gets into a slot, which is memory where the model runs.

| from | model on | by |
|---|---|---|
| disk or RAM | CPU | a read straight into the slot (`SlotReads`) |
| disk | GPU | a read into page-locked memory, then a copy beside the model's work (`StagedReads`) |
| RAM | GPU | a copy out of page-locked memory, which holds all experts (`PinnedCopies`) |
"""

from collections import deque
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.lanes import Lane, Mark, open_lane
from lookup_experts.table.store import PendingRead, RecordStore

STAGED = 4
"""Experts on their way from disk to a GPU at once."""
_PINNED_AT_ONCE = 2**26


class Loader(Protocol):
    """Brings records to slots."""

    slots: Tensor
    """uint8 [slots, stride], where the model runs."""

    def begin(self, number: int, slot: int) -> PendingRead:
        """Begin to bring an expert to a slot that no work queued so far will write.

        After `wait` of what it gives, work that the model's queue is given may read the slot.
        """
        ...

    def close(self) -> None:
        """Forget the memory; nothing may be under way."""
        ...


def open_loader(store: RecordStore, num_slots: int, device: torch.device) -> Loader:
    """The loader for where the records are and where the model runs.

    Raises:
        UserError: a kind of device that has none.
    """
    lane = open_lane(device)
    if lane is None:
        return SlotReads(store, num_slots)
    if store.name == "memory":
        return PinnedCopies(store, num_slots, lane)
    return StagedReads(store, num_slots, lane)


class SlotReads:
    """Reads into slots in the host's memory; the disk's controller or a thread does the work."""

    def __init__(self, store: RecordStore, num_slots: int) -> None:
        self._store = store
        self._memory = aligned_buffer(num_slots * store.layout.stride).reshape(num_slots, -1)
        with torch.inference_mode(False):
            self.slots = torch.from_numpy(self._memory)

    def begin(self, number: int, slot: int) -> PendingRead:
        return self._store.begin(np.array([number]), self._memory, np.array([slot]))

    def close(self) -> None:
        self.slots, self._memory = self.slots[:0].clone(), self._memory[:0].copy()


class _QueuedCopy:
    """A copy beside the model's work: its queue waits for it, the host doesn't."""

    def __init__(self, lane: Lane, mark: Mark) -> None:
        self._lane, self._mark = lane, mark

    def wait(self) -> None:
        self._lane.lead(self._mark)


class PinnedCopies:
    """Copies out of page-locked memory that holds all records."""

    def __init__(self, store: RecordStore, num_slots: int, lane: Lane) -> None:
        stride, count = store.layout.stride, store.layout.shape.vocab_size
        self._lane = lane
        self._records = lane.host_memory(count * stride).view(count, stride)
        step = max(1, _PINNED_AT_ONCE // stride)
        for first in range(0, count, step):
            numbers = np.arange(first, min(first + step, count))
            store.read(numbers, self._records[first : first + step].numpy())
        self.slots = lane.device_memory(num_slots, stride)

    def begin(self, number: int, slot: int) -> PendingRead:
        # What was in the slot may still be read by work that is queued.
        self._lane.follow(self._lane.mark_of(self._lane.model_queue()))
        return _QueuedCopy(self._lane, self._lane.copy([self.slots[slot]], [self._records[number]]))

    def close(self) -> None:
        self._records = self._records[:0].clone()


class StagedReads:
    """Reads into page-locked memory, and copies from there."""

    def __init__(self, store: RecordStore, num_slots: int, lane: Lane) -> None:
        self._store, self._lane, stride = store, lane, store.layout.stride
        self._staging = lane.host_memory(STAGED * stride).view(STAGED, stride)
        self._rows: deque[tuple[int, Mark | None]] = deque((row, None) for row in range(STAGED))
        """Rows of the staging memory that are not being read into, the longest idle first, and
        the copy out of each that must be over before."""
        self.slots = lane.device_memory(num_slots, stride)
        self.under_way: deque[_StagedRead] = deque()

    def begin(self, number: int, slot: int) -> PendingRead:
        while not self._rows:  # all are being read into: hand the oldest on to the device
            self.under_way[0].hand_over()
        row, copied = self._rows.popleft()
        if copied is not None:
            copied.wait()
        read = self._store.begin(np.array([number]), self._staging.numpy(), np.array([row]))
        self.under_way.append(_StagedRead(self, read, row, slot))
        return self.under_way[-1]

    def copy(self, row: int, slot: int) -> Mark:
        """Queue the copy of a row that was read."""
        self._lane.follow(self._lane.mark_of(self._lane.model_queue()))
        return self._lane.copy([self.slots[slot]], [self._staging[row]])

    def give_back(self, read: "_StagedRead", row: int, mark: Mark | None) -> None:
        """The row can be read into again, after this mark."""
        self.under_way.remove(read)
        self._rows.append((row, mark))

    def lead(self, mark: Mark) -> None:
        """Let the model's queue wait."""
        self._lane.lead(mark)

    def close(self) -> None:
        for _, copied in self._rows:
            if copied is not None:
                copied.wait()


class _StagedRead:
    """A read into a row of the staging memory, then a copy into a slot."""

    def __init__(self, loader: StagedReads, read: PendingRead, row: int, slot: int) -> None:
        self._loader, self._read, self._row, self._slot = loader, read, row, slot
        self._mark: Mark | None = None
        self._error: Exception | None = None
        self._over = False

    def hand_over(self) -> None:
        """Wait for the disk and queue the copy; an error is kept for who waits."""
        if self._over:
            return
        try:
            self._read.wait()
            self._mark = self._loader.copy(self._row, self._slot)
        except Exception as error:
            self._error = error
        self._over = True  # not after Ctrl-C: then the read goes on
        self._loader.give_back(self, self._row, self._mark)

    def wait(self) -> None:
        self.hand_over()
        if self._error is not None:
            raise self._error
        assert self._mark is not None
        self._loader.lead(self._mark)
