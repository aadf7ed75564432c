"""The store `direct`: records straight from the disk, past the page cache.

Two back ends bring many records at once: io_uring (`uring.py`), probed when a table is opened,
and where the kernel refuses it a few threads with `preadv`, each with one slice of the batch.

The disk gives whole blocks. Records that are whole blocks themselves, as most wide ones are, are
read straight to where they are wanted. Others are read with their blocks (`blocks.py`) into memory
beside, and copied: a copy takes a few microseconds, reading takes a hundred.
"""

import errno
import os
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from lookup_experts.errors import TableError, UserError
from lookup_experts.table.blocks import BlockReads, most_blocks, plan_blocks
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
    """What carries out many reads at once; see `Ring.read`."""

    def read(
        self,
        fds: ArrayLike,
        offsets: ArrayLike,
        lengths: ArrayLike,
        buffer: np.ndarray,
        targets: ArrayLike,
    ) -> np.ndarray: ...

    def close(self) -> None: ...


class ThreadedReads:
    """`preadv` in long-lived threads, each with one slice of the batch."""

    def __init__(self, num_threads: int = _NUM_THREADS) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="table-read")

    def read(
        self,
        fds: ArrayLike,
        offsets: ArrayLike,
        lengths: ArrayLike,
        buffer: np.ndarray,
        targets: ArrayLike,
    ) -> np.ndarray:
        """As `Ring.read`."""
        reads = np.array([fds, offsets, targets, lengths], np.int64).T.tolist()
        results = np.zeros(len(reads), np.int64)

        def read_slice(part: slice) -> None:
            results[part] = [
                _pread(fd, buffer[target : target + length], offset)
                for fd, offset, target, length in reads[part]
            ]

        bounds = np.linspace(0, len(reads), min(self._num_threads, len(reads)) + 1).astype(int)
        parts = [slice(first, end) for first, end in pairwise(bounds.tolist())]
        waiting: list[Future[None]] = []
        try:
            for part in parts[1:]:
                waiting.append(submit_read(self._threads, read_slice, part))
            read_slice(parts[0])
        finally:
            wait(waiting)  # no thread may write into `buffer` after this call, interrupted or not
        for future in waiting:
            future.result()
        return results

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _pread(fd: int, target: np.ndarray, offset: int) -> int:
    """Bytes read, or an errno below zero."""
    try:
        return os.preadv(fd, [target.data], offset)
    except OSError as error:
        return -(error.errno or errno.EIO)


@dataclass
class _StepRing:
    """A ring for the reads of a step, and memory for blocks that hold more than its records."""

    ring: Ring
    staging: np.ndarray

    def reserve(self, num_bytes: int) -> None:
        if len(self.staging) < num_bytes:
            self.staging = aligned_buffer(1 << (num_bytes - 1).bit_length())


class RingRead:
    """A `PendingRead` that the kernel carries out on a ring of its own.

    Args:
        reads: what to read; whole records into `memory`, or else blocks to be copied from.
        copies: whether they are blocks.
    """

    def __init__(
        self,
        store: "DirectStore",
        ids: np.ndarray,
        memory: np.ndarray,
        slots: np.ndarray,
        reads: BlockReads,
        copies: bool,
    ) -> None:
        self._store, self._ids, self._memory, self._slots = store, ids, memory, slots
        self._reads = reads
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._started_at = time.perf_counter()
        taken = store.take_ring()
        self._taken: _StepRing | None = taken
        if copies:
            taken.reserve(reads.num_bytes)
        self._buffer = taken.staging if copies else memory.reshape(-1)
        self._copies = copies
        # Not `ctypes`, which makes objects first.
        address = self._buffer.__array_interface__["data"][0]
        store.under_way.add(self)  # before it begins, so that an interrupt can't hide it
        try:
            taken.ring.start(
                store.descriptors(reads),
                reads.offsets,
                [address + target for target in reads.targets],
                reads.lengths,
            )
        except OSError:  # nothing was begun; after Ctrl-C it may have been, and `settle` waits
            self._forget(taken)
            raise

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        self._store.check_process()
        with self._lock:
            if self._taken is not None:
                self._end(self._taken)
            if self._error is not None:
                raise self._error

    def _end(self, taken: _StepRing) -> None:
        try:
            results = taken.ring.finish()
            self._store.complete(self._ids.tolist(), self._reads, results, self._buffer)
            if self._copies:
                self._copy()
            self._store.check_slots(self._ids, self._memory, self._slots)
        except OSError as error:
            folder = self._store.table.folder
            self._error = TableError(f"{folder}: can't be read: {say_why(error)}")
        except Exception as error:
            self._error = error
        # Not after Ctrl-C: then the read goes on, and so does the next wait.
        self._forget(taken)
        self._store.count(self._reads, self._started_at)

    def _copy(self) -> None:
        stride = self._memory.shape[1]
        for slot, place in zip(self._slots.tolist(), self._reads.places, strict=True):
            self._memory[slot] = self._buffer[place : place + stride]

    def _forget(self, taken: _StepRing) -> None:
        self._taken = None
        self._store.under_way.discard(self)
        self._store.give_ring_back(taken)


class DirectStore(RecordStore):
    """Reads from the disk past the page cache, many records at once."""

    name = "direct"

    def __init__(self, table: Table, verify_checksums: bool, notify: Notify) -> None:
        super().__init__(table, verify_checksums)
        self._shard_starts: list[int] = self._first_ids.tolist()
        record_bytes = most_blocks(self.layout.stride) * BLOCK
        self._bounce = aligned_buffer(max(record_bytes, _BOUNCE_BYTES))
        """For blocks that hold more than is wanted."""
        self._lock = threading.Lock()
        self.under_way: set[RingRead] = set()
        """Reads that may have begun and were not waited for yet; kept, for the kernel writes."""
        self._idle_rings: list[_StepRing] = []
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
                os.preadv(fds[0], [self._bounce[:BLOCK].data], DATA_START)
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
            result = int(ring.read(self._fds[:1], [DATA_START], [BLOCK], self._bounce, [0])[0])
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            failing.pop_all()
        return ring

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> PendingRead:
        """See `Store.begin`: with io_uring the kernel reads beside the caller, without a thread
        that would fight for the interpreter and the cores."""
        if not isinstance(self._backend, Ring) or not 0 < len(ids) <= _STEP_DEPTH:
            return super().begin(ids, memory, slots)
        self._check_ids(ids)
        self.check_process()
        reads, copies = self._plan_step(ids.tolist(), memory, slots.tolist())
        if len(reads.offsets) > _STEP_DEPTH or (copies and reads.num_bytes > _BOUNCE_BYTES):
            return super().begin(ids, memory, slots)
        try:
            return RingRead(self, ids, memory, slots, reads, copies)
        except OSError as error:
            raise TableError(f"{self.table.folder}: can't be read: {say_why(error)}") from error

    def _read_into(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> None:
        """For `begin` without io_uring: whole blocks straight into their slots as well."""
        self.check_process()
        reads, copies = self._plan_step(ids.tolist(), memory, slots.tolist())
        if copies or not len(ids):
            super()._read_into(ids, memory, slots)
            return
        started_at = time.perf_counter()
        with self._lock:
            self._read(ids.tolist(), reads, memory.reshape(-1))
        self.check_slots(ids, memory, slots)
        self.count(reads, started_at)

    def _plan_step(
        self, ids: list[int], memory: np.ndarray, slots: list[int]
    ) -> tuple[BlockReads, bool]:
        """What brings a few records, and whether they must be copied from there to their slots."""
        stride = self.layout.stride
        address = memory.__array_interface__["data"][0]
        if not self.layout.is_whole_blocks or address % BLOCK:
            return plan_blocks(self.layout, self._shard_starts, ids, 0, stride), True
        shards = [bisect_right(self._shard_starts, token_id) - 1 for token_id in ids]
        starts = self._shard_starts
        offsets = [
            DATA_START + (token_id - starts[shard]) * stride
            for token_id, shard in zip(ids, shards, strict=True)
        ]
        sizes = [stride] * len(ids)
        targets = [slot * stride for slot in slots]
        return BlockReads(shards, offsets, sizes, sizes, targets, [], len(ids) * stride), False

    def settle(self) -> None:
        """See `Store.settle`."""
        super().settle()
        for read in list(self.under_way):
            with suppress(Exception):  # told to who waits for it
                read.wait()

    def take_ring(self) -> _StepRing:
        """A ring for one read that was begun; as many exist as reads overlap."""
        with self._count_lock:
            if self._idle_rings:
                return self._idle_rings.pop()
        ring = Ring(_STEP_DEPTH)
        self._resources.callback(ring.close)
        return _StepRing(ring, aligned_buffer(0))

    def give_ring_back(self, ring: _StepRing) -> None:
        """For the next read."""
        with self._count_lock:
            self._idle_rings.append(ring)

    def descriptors(self, reads: BlockReads) -> list[int]:
        """The open file of each read."""
        return [self._descriptors[shard] for shard in reads.shards]

    def complete(
        self, ids: list[int], reads: BlockReads, results: Sequence[int], buffer: np.ndarray
    ) -> None:
        """Take reads up again that came back short.

        Args:
            ids: whose records are read, for messages.
            results: of each read, its bytes or an errno below zero.
            buffer: what was read into.

        Raises:
            TableError: a read can't be completed.
        """
        for number, result in enumerate(results):
            if result < reads.needed[number]:
                self._finish(ids, reads, number, result, buffer)

    def check_slots(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> None:
        """Check the records of `ids` in these rows of `memory`, as far as that was asked for."""
        if self._checksums is not None or self._scales is not None:
            self._check_records(ids, memory[slots])

    def count(self, reads: BlockReads, started_at: float) -> None:
        """Add a read that was begun to the counts."""
        self._count(reads.num_bytes, time.perf_counter() - started_at)

    def check_process(self) -> None:
        """Raise a `UserError` in a process that was forked: it shares the ring with its parent."""
        if os.getpid() != self._process:
            raise UserError("A direct store can't be used after a fork; open it in each process.")

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """See `Store.read`."""
        self.read_by(self._fetch, ids, out, start)

    def _fetch(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        self.check_process()
        are_blocks = self.layout.is_whole_blocks and start % BLOCK == out.shape[1] % BLOCK == 0
        with self._lock:
            if are_blocks and out.ctypes.data % BLOCK == 0:
                return self._read_blocks(ids, out, start)
            return self._read_and_copy(ids, out, start)

    def _read_blocks(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        """Read what is whole blocks straight to where it belongs."""
        shards, rows = self._locate(ids)
        width = out.shape[1]
        reads = BlockReads(
            shards=shards.tolist(),
            offsets=(DATA_START + rows * self.layout.stride + start).tolist(),
            lengths=[width] * len(ids),
            needed=[width] * len(ids),
            targets=[row * width for row in range(len(ids))],
            places=[],
            num_bytes=out.nbytes,
        )
        self._read(ids.tolist(), reads, out.reshape(-1))
        return reads.num_bytes

    def _read_and_copy(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        """Read the blocks into memory beside, piece by piece, and copy what is wanted."""
        width, num_bytes = out.shape[1], 0
        at_once = len(self._bounce) // (most_blocks(width) * BLOCK)
        for first in range(0, len(ids), at_once):
            piece = ids[first : first + at_once].tolist()
            reads = plan_blocks(self.layout, self._shard_starts, piece, start, width)
            self._read(piece, reads, self._bounce)
            for row, place in enumerate(reads.places, first):
                out[row] = self._bounce[place : place + width]
            num_bytes += reads.num_bytes
        return num_bytes

    def _read(self, ids: list[int], reads: BlockReads, buffer: np.ndarray) -> None:
        self.complete(ids, reads, self._results(reads, buffer), buffer)

    def _results(self, reads: BlockReads, buffer: np.ndarray) -> list[int]:
        """Bytes of each read, or an errno below zero; one alone has nothing to overlap with and
        goes straight."""
        if len(reads.offsets) == 1:
            return [self._reread(reads, 0, buffer, 0)]
        fds = self.descriptors(reads)
        try:
            return self._backend.read(
                fds, reads.offsets, reads.lengths, buffer, reads.targets
            ).tolist()
        except OSError as error:
            raise TableError(f"{self.table.folder}: can't be read: {say_why(error)}") from error

    def _reread(self, reads: BlockReads, number: int, buffer: np.ndarray, done: int) -> int:
        """Read on from `done` bytes; bytes read, or an errno below zero."""
        target, length = reads.targets[number], reads.lengths[number]
        rest = buffer[target + done : target + length]
        return _pread(self._descriptors[reads.shards[number]], rest, reads.offsets[number] + done)

    def _finish(
        self, ids: list[int], reads: BlockReads, number: int, result: int, buffer: np.ndarray
    ) -> None:
        """Take a read up again that came back short; an error if it can't be completed."""
        if result < 0 and -result not in _PASSING_ERRORS:
            raise self._unread(ids, reads, number, 0, os.strerror(-result))
        done = max(0, result) // BLOCK * BLOCK  # direct reads start at multiples of a block
        rest = self._reread(reads, number, buffer, done)
        if rest < 0:
            raise self._unread(ids, reads, number, done, os.strerror(-rest))
        if done + rest < reads.needed[number]:
            problem = f"got {done + rest} of {reads.needed[number]} bytes"
            raise self._unread(ids, reads, number, done + rest, problem)

    def _unread(
        self, ids: list[int], reads: BlockReads, number: int, got: int, problem: str
    ) -> TableError:
        """The error for a read of which so many bytes came."""
        shard = self.table.shards[reads.shards[number]]
        found = os.fstat(self._descriptors[reads.shards[number]]).st_size
        if found < shard.bytes:
            problem = f"truncated while open, expected {shard.bytes} bytes, found {found}"
        # The first record that isn't there as a whole; which part of it was wanted is no matter.
        row = (reads.offsets[number] + got - DATA_START) // self.layout.stride
        token_id = min(
            (token_id for token_id in ids if token_id >= shard.first_id + row),
            default=shard.first_id + row,
        )
        path, offset = self._place(token_id)
        own_id = self.table.own_id(token_id)
        return TableError(f"{path}: can't read the record of id {own_id} at {offset}: {problem}.")

    def reopened(self) -> Self:
        return type(self)(reopen_table(self.table), self.verify_checksums, log)

    def close(self) -> None:
        super().close()  # before the lock, which its thread may be waiting for
        if os.getpid() == self._process:
            self.settle()
        with self._lock:
            self._resources.close()
