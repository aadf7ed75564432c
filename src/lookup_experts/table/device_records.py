"""The records of a table within reach of a device: what `device.py` reads from.

Nothing here lets the host wait for the device or the device for Python, so a whole step of a model
can be captured in a CUDA graph and replayed with other ids.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import TableError
from lookup_experts.table.gather import NO_PROBLEM, gather
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.page_locked import lock_pages


@dataclass
class CacheCounts:
    """What steps met since the records were opened; exact when the device has nothing queued."""

    ids: int
    """Positions of all steps."""
    hot_hits: int
    """Those whose records lay in the device's memory …"""
    ram_hits: int
    """… and in RAM; the others were missing."""
    records_read: int
    """For those; an id that a step has several times is read once."""
    bytes_read: int
    read_seconds: float
    """From a request to the answer, as far as the worker sees it."""


class DeviceRecords(Protocol):
    """Where a device finds records. What it queues, it queues on the current stream."""

    order: AbstractContextManager[Any]
    """Held while a batch's `locate` and `gather`s are queued: another one's `locate` may then come
    before or after them, but not between."""

    @property
    def most_positions(self) -> int | None:
        """Of a batch that `locate` takes; None: any number."""
        ...

    def locate(self, ids: Tensor) -> Tensor:
        """Token ids int64 [P] on the device, contiguous -> places int64 [P] there, for `gather`;
        valid until this is called again."""
        ...

    def gather(self, places: Tensor, start: int, out: Tensor) -> None:
        """Put bytes `start` to `start + W` of the records at `places` into `out`, uint8 [P, W]; see
        `gather.gather`."""
        ...

    def check(self) -> None:
        """Tell what went wrong on the device since this was last called, as far as it is known by
        now; waits for nothing.

        Raises:
            TableError: an id is outside of the table, or its record couldn't be read. What came
                out of that step is no numbers.
        """
        ...

    def fill(self) -> int:
        """Bring the most frequent records within reach, as far as there is room; how many are."""
        ...

    def counts(self) -> CacheCounts | None:
        """What the device met so far; None: it doesn't count."""
        ...

    def close(self) -> None:
        """Give back what it holds, once what is queued has come to its end."""
        ...


class HostRecords:
    """A whole table in RAM, page-locked, which the device reads over the bus.

    Args:
        records: uint8 [V, stride], see `Store.whole`.
        device: what reads them.

    Raises:
        UserError: CUDA refuses to lock so much memory.
    """

    order: AbstractContextManager[Any] = nullcontext()
    most_positions = None

    def __init__(self, records: np.ndarray, device: torch.device) -> None:
        self._vocab_size = len(records)
        # A page of its own, that the device may write to.
        self._problem = aligned_buffer(4096).view(np.int64)
        self._problem[0] = NO_PROBLEM
        arrays = [records, self._problem.view(np.uint8)]
        if device.type == "cuda":
            self._locked = [lock_pages(array) for array in arrays]
            self._records, problem = (locked.on(device) for locked in self._locked)
        else:
            self._locked = []
            self._records, problem = (torch.from_numpy(array) for array in arrays)
        self._problem_on_device = problem.view(torch.int64)[:1]

    def locate(self, ids: Tensor) -> Tensor:
        """See `DeviceRecords.locate`."""
        return ids

    def gather(self, places: Tensor, start: int, out: Tensor) -> None:
        """See `DeviceRecords.gather`."""
        gather(self._records, places, start, out, self._problem_on_device)

    def fill(self) -> int:
        """Nothing is brought: all are there."""
        return 0

    def counts(self) -> None:
        """See `DeviceRecords.counts`."""

    def check(self) -> None:
        """See `DeviceRecords.check`."""
        problem = int(self._problem[0])
        if problem != NO_PROBLEM:
            self._problem[0] = NO_PROBLEM
            raise TableError(
                f"Token id {problem} is not in the table, whose ids are 0 to "
                f"{self._vocab_size - 1}."
            )

    def close(self) -> None:
        """See `DeviceRecords.close`; registrations go with the last who holds them."""
        if self._locked:
            torch.cuda.synchronize(self._records.device)  # what is queued still reads
        del self._records, self._problem_on_device
        self._locked = []


class DeviceMemoryRecords:
    """Records that were brought to the device for one batch.

    Args:
        memory: uint8 [U, stride] on the device; places are its rows.
    """

    order: AbstractContextManager[Any] = nullcontext()
    most_positions = None

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def locate(self, ids: Tensor) -> Tensor:
        """See `DeviceRecords.locate`; ids are places here."""
        return ids

    def gather(self, places: Tensor, start: int, out: Tensor) -> None:
        """See `DeviceRecords.gather`."""
        torch.index_select(self._memory[:, start : start + out.shape[1]], 0, places, out=out)

    def fill(self) -> int:
        """Nothing is brought: all are there."""
        return 0

    def counts(self) -> None:
        """See `DeviceRecords.counts`."""

    def check(self) -> None:
        """Nothing can go wrong."""

    def close(self) -> None:
        """Memory goes with the batch's rows."""
