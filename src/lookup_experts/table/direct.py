"""The store `direct`: records straight from the disk, past the page cache.

Two back ends bring many records at once: io_uring (`uring.py`), probed when a table is opened,
and where the kernel refuses it a few threads with `preadv`, each with one slice of the batch.
"""

import errno
import os
import threading
import time
import weakref
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Protocol, Self

import numpy as np

from lookup_experts.errors import TableError, UserError
from lookup_experts.table.files import say_why
from lookup_experts.table.format import BLOCK, DATA_START
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.opening import Table, open_shards, reopen_table
from lookup_experts.table.reading_thread import submit_read
from lookup_experts.table.store import Notify, PendingRead, RecordStore, log
from lookup_experts.table.uring import Ring

_NUM_THREADS = 8
_STEP_DEPTH = 64
"""The most reads of a step at once, on a ring of its own."""
_PROMPT_DEPTH = 256
"""The most reads of a prompt at once. The more, the fewer waits: after each, another busy Python
thread may keep the GIL for 5 ms."""
_BOUNCE_BYTES = 2**23
_RING_REFUSALS = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.ENOMEM,
    errno.EINVAL,
    errno.EOPNOTSUPP,
)
_PASSING_ERRORS = (errno.EINTR, errno.EAGAIN)


class Backend(Protocol):
    """What brings many rows from open files at once; see `Ring.read_rows`."""

    def read_rows(self, fds: np.ndarray, offsets: np.ndarray, target: np.ndarray) -> np.ndarray: ...

    def close(self) -> None: ...


class ThreadedReads:
    """`preadv` in long-lived threads, each with one slice of the batch."""

    def __init__(self, num_threads: int = _NUM_THREADS) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="table-read")

    def read_rows(self, fds: np.ndarray, offsets: np.ndarray, target: np.ndarray) -> np.ndarray:
        """As `Ring.read_rows`."""
        results = np.zeros(len(target), np.int64)

        def read_slice(part: slice) -> None:
            requests = zip(fds[part].tolist(), offsets[part].tolist(), target[part], strict=True)
            results[part] = [_pread(fd, row, offset) for fd, offset, row in requests]

        bounds = np.linspace(0, len(target), min(self._num_threads, len(target)) + 1).astype(int)
        parts = [slice(first, end) for first, end in pairwise(bounds.tolist())]
        waiting: list[Future[None]] = []
        try:
            for part in parts[1:]:
                waiting.append(submit_read(self._threads, read_slice, part))
            read_slice(parts[0])
        finally:
            wait(waiting)  # no thread may write into `target` after this call, interrupted or not
        for future in waiting:
            future.result()
        return results

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _pread(fd: int, row: np.ndarray, offset: int) -> int:
    """Bytes read, or an errno below zero."""
    try:
        return os.preadv(fd, [row.data], offset)
    except OSError as error:
        return -(error.errno or errno.EIO)


class RingRead:
    """A `PendingRead` that the kernel carries out on a ring of its own."""

    def __init__(
        self,
        store: "DirectStore",
        ids: np.ndarray,
        memory: np.ndarray,
        address: int,
        slots: np.ndarray,
    ) -> None:
        self._store, self._ids, self._memory, self._slots = store, ids, memory, slots
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._started_at = time.perf_counter()
        fds, offsets = store.places(ids)
        stride = memory.shape[1]
        addresses = [address + slot * stride for slot in slots.tolist()]
        ring = store.take_ring()
        self._ring: Ring | None = ring
        store.under_way.add(self)  # before it begins, so that an interrupt can't hide it
        try:
            ring.start(fds, offsets, addresses, stride)
        except OSError:  # nothing was begun; after Ctrl-C it may have been, and `settle` waits
            self._forget(ring)
            raise

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        self._store.check_process()
        with self._lock:
            if self._ring is not None:
                self._end(self._ring)
            if self._error is not None:
                raise self._error

    def _end(self, ring: Ring) -> None:
        try:
            self._store.complete(self._ids, self._memory, self._slots, ring.finish())
        except OSError as error:
            folder = self._store.table.folder
            self._error = TableError(f"{folder}: can't be read: {say_why(error)}")
        except Exception as error:
            self._error = error
        # Not after Ctrl-C: then the read goes on, and so does the next wait.
        self._forget(ring)
        self._store.count(len(self._ids), self._started_at)

    def _forget(self, ring: Ring) -> None:
        self._ring = None
        self._store.under_way.discard(self)
        self._store.give_ring_back(ring)


class DirectStore(RecordStore):
    """Reads from the disk past the page cache, many records at once."""

    name = "direct"

    def __init__(self, table: Table, verify_checksums: bool, notify: Notify) -> None:
        super().__init__(table, verify_checksums)
        self._shard_starts: list[int] = self._first_ids.tolist()
        self._read_bytes = max(self.layout.stride, BLOCK)
        """One read: a record, or the block that holds it."""
        bounce_rows = min(max(1, _BOUNCE_BYTES // self._read_bytes), 256)
        self._bounce = aligned_buffer(bounce_rows * self._read_bytes).reshape(bounce_rows, -1)
        self._lock = threading.Lock()
        self.under_way: set[RingRead] = set()
        """Reads that may have begun and were not waited for yet; kept, for the kernel writes."""
        self._idle_rings: list[Ring] = []
        self._process = os.getpid()
        with ExitStack() as stack:
            fds, way = self._open_files(stack, notify)
            self._fds = np.array(fds, np.int32)
            self._descriptors = fds
            self._backend, reader = self._open_backend(notify)
            stack.callback(self._backend.close)
            self.backend = reader + way
            self._resources = stack.pop_all()
        # For a store that is dropped without being closed, with the model that used it.
        weakref.finalize(self, self._resources.close).atexit = False

    def _open_files(self, stack: ExitStack, notify: Notify) -> tuple[list[int], str]:
        """Descriptors of the shards, and what to add to the name of the back end."""
        try:
            with ExitStack() as attempt:
                fds = open_shards(self.table, os.O_DIRECT, attempt)
                os.preadv(fds[0], [self._bounce[0, :BLOCK].data], DATA_START)
                stack.enter_context(attempt.pop_all())
                return fds, ""
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise TableError(f"{self.table.folder}: can't be read: {say_why(error)}") from error
        notify(
            f"The file system of {self.table.folder} has no direct reads (O_DIRECT): "
            "reading through the page cache, which takes memory beyond the row cache."
        )
        return open_shards(self.table, 0, stack), " through the page cache"

    def _open_backend(self, notify: Notify) -> tuple[Backend, str]:
        try:
            return self._probed_ring(), "io_uring"
        except OSError as error:
            if error.errno not in _RING_REFUSALS:
                raise UserError(f"io_uring can't be set up: {say_why(error)}") from error
            notify(f"No io_uring here ({error.strerror}): reading with {_NUM_THREADS} threads.")
        return ThreadedReads(), f"preadv x{_NUM_THREADS} threads"

    def _probed_ring(self) -> Ring:
        """A ring that has read a block; an `OSError` where that doesn't work."""
        with ExitStack() as failing:
            ring = Ring(_PROMPT_DEPTH)
            failing.callback(ring.close)
            target = self._bounce[:1, :BLOCK]
            result = int(ring.read_rows(self._fds[:1], np.array([DATA_START]), target)[0])
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            failing.pop_all()
        return ring

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> PendingRead:
        """See `Store.begin`: with io_uring the kernel reads beside the caller, without a thread
        that would fight for the interpreter and the cores."""
        # Not `memory.ctypes`, which makes objects of ctypes first.
        address = memory.__array_interface__["data"][0]
        if not self._reads_alone(len(ids)) or address % BLOCK:
            return super().begin(ids, memory, slots)
        self._check_ids(ids)
        self.check_process()
        try:
            return RingRead(self, ids, memory, address, slots)
        except OSError as error:
            raise TableError(f"{self.table.folder}: can't be read: {say_why(error)}") from error

    def settle(self) -> None:
        """See `Store.settle`."""
        super().settle()
        for read in list(self.under_way):
            with suppress(Exception):  # told to who waits for it
                read.wait()

    def _reads_alone(self, num_ids: int) -> bool:
        """Whether the ring can take so many reads at once, each a whole record."""
        return (
            isinstance(self._backend, Ring)
            and 0 < num_ids <= _STEP_DEPTH
            and self._read_bytes == self.layout.stride
        )

    def take_ring(self) -> Ring:
        """A ring for one read that was begun; as many exist as reads overlap."""
        with self._count_lock:
            if self._idle_rings:
                return self._idle_rings.pop()
        ring = Ring(_STEP_DEPTH)
        self._resources.callback(ring.close)
        return ring

    def give_ring_back(self, ring: Ring) -> None:
        """For the next read."""
        with self._count_lock:
            self._idle_rings.append(ring)

    def places(self, ids: np.ndarray) -> tuple[list[int], list[int]]:
        """Descriptor and offset of each record of a few ids; as `_locate`, without arrays."""
        fds, offsets = [], []
        for token_id in ids.tolist():
            shard = bisect_right(self._shard_starts, token_id) - 1
            fds.append(self._descriptors[shard])
            row = token_id - self._shard_starts[shard]
            offsets.append(DATA_START + row * self.layout.stride)
        return fds, offsets

    def complete(
        self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray, results: list[int]
    ) -> None:
        """Take reads up again that came back short, and check the records."""
        stride = self.layout.stride
        for row, result in enumerate(results):
            if result != stride:
                offset = self._place(int(ids[row]))[1]
                self._finish(int(ids[row]), offset, memory[slots[row]], result, stride)
        if self._checksums is not None or self._scales is not None:
            self._check_records(ids, memory[slots])

    def count(self, num_ids: int, started_at: float) -> None:
        """Add a read that was begun to the counts."""
        self._count(num_ids * self.layout.stride, time.perf_counter() - started_at)

    def check_process(self) -> None:
        """Raise a `UserError` in a process that was forked: it shares the ring with its parent."""
        if os.getpid() != self._process:
            raise UserError("A direct store can't be used after a fork; open it in each process.")

    def _fetch(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        self.check_process()
        whole_blocks = self._read_bytes == self.layout.stride and out.shape[1] % BLOCK == 0
        with self._lock:
            if whole_blocks and out.ctypes.data % BLOCK == 0:
                self._read(ids, out, start)
                return out.nbytes
            self._read_and_copy(ids, out, start)
        return len(ids) * self._read_bytes

    def _read_and_copy(self, ids: np.ndarray, out: np.ndarray, start: int) -> None:
        """Read into the aligned bounce buffer, piece by piece, and copy the records out."""
        for first in range(0, len(ids), len(self._bounce)):
            piece = ids[first : first + len(self._bounce)]
            blocks = self._bounce[: len(piece)]
            inner = self._read(piece, blocks, 0)
            records = blocks.reshape(len(piece), -1, self.layout.stride)[
                np.arange(len(piece)), inner
            ]
            out[first : first + len(piece)] = records[:, start : start + out.shape[1]]

    def _read(self, ids: np.ndarray, target: np.ndarray, start: int) -> np.ndarray:
        """Read each id's record from byte `start` on, or the block that holds the record.

        Args:
            target: uint8 [n, width], a row for each id; width is a multiple of a block.

        Returns:
            int64 [n]: which record of its row each id is (0 where a row is one record).
        """
        shards, rows = self._locate(ids)
        offsets = DATA_START + rows * self.layout.stride + start
        starts = offsets // BLOCK * BLOCK
        results = self._read_rows(self._fds[shards], starts, target)
        needed = offsets - starts + min(self.layout.stride, target.shape[1])
        for row in np.flatnonzero(results < needed):
            self._finish(
                int(ids[row]), int(starts[row]), target[row], int(results[row]), int(needed[row])
            )
        return (offsets - starts) // self.layout.stride

    def _read_rows(self, fds: np.ndarray, offsets: np.ndarray, target: np.ndarray) -> np.ndarray:
        """As `Ring.read_rows`; one read alone has nothing to overlap with and goes straight."""
        if len(target) == 1:
            return np.array([_pread(int(fds[0]), target[0], int(offsets[0]))])
        try:
            return self._backend.read_rows(fds, offsets, target)
        except OSError as error:
            raise TableError(f"{self.table.folder}: can't be read: {say_why(error)}") from error

    def _finish(self, token_id: int, start: int, row: np.ndarray, result: int, needed: int) -> None:
        """Take a read up again that came back short; an error if it can't be completed."""
        if result < 0 and -result not in _PASSING_ERRORS:
            raise self._unread(token_id, os.strerror(-result))
        done = max(0, result) // BLOCK * BLOCK  # direct reads start at multiples of a block
        rest = _pread(self._fd_of(token_id), row[done:], start + done)
        if rest < 0:
            raise self._unread(token_id, os.strerror(-rest))
        if done + rest < needed:
            raise self._unread(token_id, f"got {done + rest} of {needed} bytes")

    def _fd_of(self, token_id: int) -> int:
        return int(self._fds[self._locate(np.array([token_id]))[0][0]])

    def _unread(self, token_id: int, problem: str) -> TableError:
        path, offset = self._place(token_id)
        expected = next(shard.bytes for shard in self.table.shards if shard.file == path.name)
        found = os.fstat(self._fd_of(token_id)).st_size
        if found < expected:
            problem = f"truncated while open, expected {expected} bytes, found {found}"
        return TableError(f"{path}: can't read the record of id {token_id} at {offset}: {problem}.")

    def reopened(self) -> Self:
        return type(self)(reopen_table(self.table), self.verify_checksums, log)

    def close(self) -> None:
        super().close()  # before the lock, which its thread may be waiting for
        if os.getpid() == self._process:
            self.settle()
        with self._lock:
            self._resources.close()
