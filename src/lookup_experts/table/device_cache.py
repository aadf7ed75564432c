"""The records of a table on disk, within reach of a device: those at hand, and how others come.

Some records lie in the device's own memory, more of them in page-locked RAM, which it reads over
the bus. Where each one lies is known on the device, in a map from ids to places. One kernel
(`locate`) looks a step's ids up. Where all are at hand the step goes on at once; else the kernel
tells a process (`miss_worker.py`) which ones are missing, waits for its answer, and updates the
map. So the map changes in the order of the device's own work: a record is evicted when the step
that read it is over, and a CUDA graph in which this is captured can be replayed with other ids. No
host takes part.

Records that can't be had, for whatever reason, become bytes of 0xFF, which are no numbers in any
encoding; why is told by `check`.
"""

import os
import platform
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import TableError, UserError
from lookup_experts.model.rows import check_bounds
from lookup_experts.table.counts import most_frequent, read_counts
from lookup_experts.table.device_cache_reference import gather_reference, locate_reference
from lookup_experts.table.device_records import CacheCounts
from lookup_experts.table.gather import QUAD
from lookup_experts.table.host_memory import available_memory_bytes
from lookup_experts.table.miss_messages import (
    BROKEN,
    BYTES_READ,
    HOT_HITS,
    IDS,
    MISSES,
    MOST_POSITIONS,
    NANOSECONDS,
    NUM_COUNTS,
    OUTSIDE,
    OUTSIDE_ID,
    RAM_HITS,
    parts_of,
)
from lookup_experts.table.miss_process import MissProcess
from lookup_experts.table.opening import Table
from lookup_experts.table.page_locked import PageLocked, lock_pages
from lookup_experts.table.store import Notify, log
from lookup_experts.units import format_bytes

MOST_LOOKS = 2**23
"""How often a step looks for its answer, about once in a microsecond, before it gives up."""


class CachedRecords:
    """`DeviceRecords` of a table on disk.

    The device's slots go to the most frequent records where the table has counts, else to the first
    ones asked for; RAM's to those used most recently.

    Args:
        table: an open table.
        device: where records are needed; on a CPU kernels are replaced by their references.
        gpu_bytes: of the device's memory, in whole records; enough for all, and neither RAM nor
            the disk is asked any more.
        ram_bytes: of page-locked RAM, in whole records, but never less than one step needs.
        verify_checksums: compare every record that is read with its checksum.
        notify: told, in one line each, what could not be had.

    Raises:
        TableError: the table can't be read.
        UserError: there isn't as much memory, or CUDA refuses to lock it.
    """

    most_positions = MOST_POSITIONS

    def __init__(
        self,
        table: Table,
        device: torch.device,
        gpu_bytes: int,
        ram_bytes: int,
        *,
        verify_checksums: bool = False,
        notify: Notify = log,
    ) -> None:
        self._table, self._device = table, device
        self._locate, self._gather = _kernels(device)
        self._opened_in = os.getpid()
        self._closed = False
        layout = table.layout
        vocab_size = layout.shape.vocab_size
        self.num_hot = min(gpu_bytes // layout.stride, vocab_size)
        """Slots in the device's memory."""
        least = min(MOST_POSITIONS, vocab_size)
        self.num_ram = max(min(ram_bytes // layout.stride, vocab_size - self.num_hot), least)
        """Slots in RAM."""
        self._lock = threading.Lock()
        self.order: AbstractContextManager[Any] = threading.Lock()
        """See `DeviceRecords.order`."""
        self._last_stream: Any = None
        self._outside_seen = 0
        with torch.inference_mode(False):
            self._take_device_memory(vocab_size, layout.stride)
        _check_machine(self.num_ram * layout.stride)
        self._process = MissProcess(table, verify_checksums, self.num_ram, self.num_hot, notify)
        self._locked: list[PageLocked] = []
        # What a dropped cache holds must outlive what is queued.
        tensors = (self._hot, self._where, self._places, self._counts)
        self._end = finalize(self, _end, device, self._process, self._locked, tensors)
        self._end.atexit = False
        self.backend = self._process.backend
        """What does the reading, see `Store.backend`."""
        try:
            with torch.inference_mode(False):
                self._share_memory()
            self._warm_up()
            self._fill_device()
        except BaseException:
            self.close()
            raise

    @property
    def device_bytes(self) -> int:
        """What it holds in the device's memory."""
        tensors = (self._hot, self._where, self._places, self._counts)
        return sum(tensor.nbytes for tensor in tensors)

    def _take_device_memory(self, vocab_size: int, stride: int) -> None:
        device, num_hot = self._device, self.num_hot
        try:
            # One row at least, so that there is an address.
            self._hot = torch.empty((max(1, num_hot), stride), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(device)
            raise UserError(
                f"The part of the row cache on the GPU takes {format_bytes(num_hot * stride)}, and "
                f"{format_bytes(free)} are free there. Give it less."
            ) from error
        self._where = torch.full((vocab_size,), -1, dtype=torch.int32, device=device)
        self._places = torch.full((MOST_POSITIONS,), -1, dtype=torch.int64, device=device)
        self._newest = self._places
        """What the last `locate` gave."""
        self._counts = torch.zeros(NUM_COUNTS, dtype=torch.int64, device=device)

    def _share_memory(self) -> None:
        """Have the device reach what is shared with the worker."""
        process = self._process
        self._shared: tuple[Tensor, ...]
        if self._device.type == "cuda":
            for array in (process.slots, process.message_bytes):
                self._locked.append(lock_pages(array))
            self._ram, words = (locked.on(self._device) for locked in self._locked)
            self._shared = parts_of(words.view(torch.int64))
        else:
            self._ram = torch.from_numpy(process.slots)
            words_here = parts_of(process.message_bytes.view(np.int64))
            self._shared = tuple(torch.from_numpy(part) for part in words_here)

    def _warm_up(self) -> None:
        """Load the kernels: in a capture, or while a step waits, that may be too late."""
        if self._device.type != "cuda":
            return
        nothing = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._queue_locate(nothing, 0)
        out = self._hot.new_empty((1, QUAD))
        self._gather(nothing - 1, self._hot, self._ram, self.num_hot, 0, out)
        torch.cuda.synchronize(self._device)

    def _fill_device(self) -> None:
        if self.num_hot == self._table.layout.shape.vocab_size:
            self._bring(np.arange(self.num_hot))
            self._process.close()  # nobody will ask any more
            return
        counts = read_counts(self._table) if self.num_hot else None
        if counts is not None:
            self._bring(most_frequent(counts, self.num_hot))

    def fill(self) -> int:
        """See `DeviceRecords.fill`; by the counts kept with the table. Those for the device have
        been brought at the start.

        Raises:
            TableError: the counts or a record are damaged, or can't be read.
        """
        counts = read_counts(self._table)
        if counts is None:
            return 0
        ids = most_frequent(counts, self.num_hot + self.num_ram)
        self._bring(ids[self.num_hot :][::-1])  # the least recently used go first
        return len(ids)

    def _bring(self, ids: np.ndarray) -> None:
        """Have these records at hand, as far as there is room, in this order."""
        on_device = torch.from_numpy(np.ascontiguousarray(ids)).to(self._device)
        for step in on_device.split(MOST_POSITIONS):
            self.locate(step)
        self._wait_for_device()
        self.check()

    def locate(self, ids: Tensor) -> Tensor:
        """See `DeviceRecords.locate`.

        Steps are one after the other: called on another stream than before, it lets that one wait
        for the work queued on the stream before. Where this is captured in a CUDA graph nobody
        sees its replays, and they must be ordered like that by who replays them.

        Args:
            ids: int64 [P], contiguous; P at most 64.
        """
        if len(ids) > MOST_POSITIONS or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError(
                f"Expected at most {MOST_POSITIONS} int64, got {ids.dtype} {ids.shape}"
            )
        with self._lock:
            self._require_usable()
            self._follow_last_stream()
            self._queue_locate(ids, len(ids))
            self._newest = self._places[: len(ids)]
            return self._newest

    def _queue_locate(self, ids: Tensor, num_ids: int) -> None:
        self._locate(
            ids,
            self._where,
            self._places,
            self._counts,
            *self._shared,
            self._hot,
            self._ram,
            num_ids,
            self.num_hot,
            MOST_LOOKS,
        )

    def _follow_last_stream(self) -> None:
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if stream == self._last_stream or torch.cuda.is_current_stream_capturing():
            return
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def gather(self, places: Tensor, start: int, out: Tensor) -> None:
        """See `DeviceRecords.gather`; `start` and W are multiples of 16, `out` is contiguous.

        Raises:
            ValueError: places are of an earlier step than the last, whose records may be gone.
        """
        if places is not self._newest:
            raise ValueError("Expected what the last call of `locate` gave, got other places.")
        width = out.shape[1]
        if start % QUAD or width % QUAD or not 0 <= start <= self._hot.shape[1] - width:
            raise ValueError(f"Expected multiples of {QUAD} in a record, got {start} and {width}.")
        if len(places):
            self._gather(places, self._hot, self._ram, self.num_hot, start, out)

    def check(self) -> None:
        """See `DeviceRecords.check`.

        Raises:
            TableError: an id was outside of the table; a record couldn't be read, the next step
                that asks for it tries again; or the worker has ended or doesn't answer, which
                stays so.
        """
        process, counts = self._process, self._process.messages.counts
        process.check()
        if counts[OUTSIDE] != self._outside_seen:
            self._outside_seen = counts[OUTSIDE]
            token_id = counts[OUTSIDE_ID]
            check_bounds(token_id, token_id, self._table.layout.shape.vocab_size)
        if process.has_died:
            raise process.death()
        if counts[BROKEN]:
            raise TableError(
                "The process that reads the table for the device doesn't answer. Is the disk of "
                f"{self._table.folder} still there? Load the model again."
            )

    def counts(self) -> CacheCounts:
        """What steps met so far."""
        counts, controls = self._process.messages.counts, self._process.messages.controls
        return CacheCounts(
            counts[IDS],
            counts[HOT_HITS],
            counts[RAM_HITS],
            controls[MISSES],
            controls[BYTES_READ],
            controls[NANOSECONDS] / 1e9,
        )

    def _require_usable(self) -> None:
        if os.getpid() != self._opened_in:
            raise UserError(
                "A table that was opened for a device can't be used after a fork; open it in each "
                "process."
            )
        if self._closed:
            raise ValueError(f"The records of {self._table.folder} are closed.")

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Give back what is held, once what is queued has come to its end; graphs that use it must
        not be replayed any more."""
        with self._lock:  # who waits in `locate` on a CPU gets an answer first
            self._closed = True
        self._end()

    def __reduce__(self) -> NoReturn:
        raise UserError("Records within reach of a device can't be pickled; open them anew.")


def _kernels(device: torch.device) -> tuple[Callable[..., None], Callable[..., None]]:
    """What looks places up, and what copies records."""
    if device.type != "cuda":
        return locate_reference, gather_reference
    from lookup_experts.table.device_cache_kernels import gather_kernel, locate_kernel

    return locate_kernel, gather_kernel


def _check_machine(num_bytes: int) -> None:
    if platform.machine() != "x86_64":
        raise UserError(
            "Reading a table from disk for a GPU relies on the order in which x86-64 processors "
            f"write to memory, and this is {platform.machine()}. Use the store 'memory'."
        )
    available = available_memory_bytes()
    if num_bytes > available:
        raise UserError(
            f"The part of the row cache in RAM takes {format_bytes(num_bytes)}, and "
            f"{format_bytes(available)} are available. Give it less."
        )


def _end(
    device: torch.device,
    process: MissProcess,
    locked: list[PageLocked],
    tensors: tuple[Tensor, ...],
) -> None:
    """Wait for what is queued, end the worker, and only then let go of what both used."""
    if not process.is_ours:
        return
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        process.close()
        locked.clear()
