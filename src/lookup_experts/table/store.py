"""Where records are read from: `memory`, `mmap` or `direct`.

`open_store` gives a `Store`; `store.read(ids, out)` brings the records of a batch of ids. What a
record means is in `format.py` and `encoding.py`; caching and prefetching are in `cache.py` and
`reader.py`; the kernel interface of io_uring is in `uring.py`.

| store | reads from | best when |
|---|---|---|
| memory | a copy of the table in RAM, loaded at the start | it fits |
| mmap | the page cache, which the kernel shrinks under pressure | it nearly fits |
| direct | the disk, past the page cache (O_DIRECT) | it doesn't fit; memory use stays as asked |

A store never changes its way of reading unnoticed: what it falls back to at the start, and why,
goes through `notify` and stays readable in `store.backend`. A shard that is replaced (renamed
over) while open goes on being read in its old state; one that is truncated gives a `TableError`.
"""

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from lookup_experts.errors import TableError, UserError, unknown_name
from lookup_experts.table.format import (
    BLOCK,
    DATA_START,
    ShardInfo,
    Table,
    find_damage,
    read_checksums,
    read_exactly,
)
from lookup_experts.table.uring import Ring
from lookup_experts.units import format_bytes

STORES = ("memory", "mmap", "direct")

_NUM_THREADS = 8
_BOUNCE_BYTES = 2**23
_LOAD_BYTES = 2**24
_RING_REFUSALS = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.ENOMEM,
    errno.EINVAL,
    errno.EOPNOTSUPP,
)
_PASSING_ERRORS = (errno.EINTR, errno.EAGAIN)

Notify = Callable[[str], None]


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

    def read(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Put the records of `ids` into `out`.

        Args:
            ids: int64 [U], unique.
            out: uint8 [U, stride], C-contiguous. Aligned to 4096 (`aligned_buffer`, pinned
                memory), `direct` reads straight into it; otherwise it copies.

        Raises:
            TableError: an id is outside the table; a record can't be read in full, or is
                damaged (with `verify_checksums`). Names file and id. `out` is then undefined.
        """

    def whole(self) -> np.ndarray | None:
        """All records, uint8 [V, stride], where they are in memory anyway; else None."""

    def close(self) -> None:
        """Give back files, threads and memory."""


def open_store(
    table: Table,
    kind: str = "auto",
    *,
    memory_budget_bytes: int | None = None,
    verify_checksums: bool = False,
    notify: Notify,
) -> "RecordStore":
    """The store of this kind over `table`; also a context manager that closes it.

    Args:
        kind: "memory", "mmap", "direct", or "auto": memory if the whole table fits the budget,
            else direct.
        memory_budget_bytes: for "auto"; None for half of the memory available now.
        verify_checksums: check every record that is read (for "memory": all, once, on loading).
        notify: is told, in one line each, what was chosen and what could not be had.

    Raises:
        UserError: unknown kind, or not enough memory, or too many open files.
        TableError: a shard can't be read, or (with `verify_checksums`) is damaged.
    """
    if kind not in (*STORES, "auto"):
        raise unknown_name("store", kind, (*STORES, "auto"))
    if kind == "auto":
        kind = _choose(table.layout.table_bytes, memory_budget_bytes, notify)
    if kind == "memory":
        return MemoryStore(table, verify_checksums)
    if kind == "mmap":
        return MappedStore(table, verify_checksums)
    return DirectStore(table, verify_checksums, notify)


def _choose(table_bytes: int, budget: int | None, notify: Notify) -> str:
    budget = available_memory_bytes() // 2 if budget is None else budget
    kind, verb = ("memory", "fits") if table_bytes <= budget else ("direct", "does not fit")
    sizes = f"the table ({format_bytes(table_bytes)}) {verb} in {format_bytes(budget)}"
    notify(f"Store: {kind}, because {sizes}.")
    return kind


def available_memory_bytes() -> int:
    """What can be allocated without swapping, within the machine and the control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return min([free, *_cgroup_headroom()])


def _cgroup_headroom() -> Iterator[int]:
    """What each control group (version 2) above this process still allows; page cache is free."""
    entry = Path("/proc/self/cgroup").read_text().splitlines()[-1]
    own = Path("/sys/fs/cgroup") / entry.rpartition(":")[2].lstrip("/")
    for group in (own, *own.parents):
        limit = group / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield max(0, int(text) - used + int(stat.get("inactive_file", 0)))


def aligned_buffer(num_bytes: int) -> np.ndarray:
    """Zeros, uint8 [num_bytes], at a multiple of 4096; the kernel takes it back when unused."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, max(1, num_bytes), flags=flags), np.uint8, num_bytes)


# ------------------------------------------------------------------------------- common to all


class RecordStore:
    """What all stores share: checking requests and records, finding files, counting."""

    name: str
    backend: str

    def __init__(self, table: Table, verify_checksums: bool) -> None:
        self.table, self.layout = table, table.layout
        self.bytes_read, self.reads, self.seconds_reading = 0, 0, 0.0
        self._first_ids = np.array([shard.first_id for shard in table.shards])
        self._checksums = _all_checksums(table) if verify_checksums else None
        self._count_lock = threading.Lock()
        self._closed = False

    def read(self, ids: np.ndarray, out: np.ndarray) -> None:
        """See `Store.read`."""
        self._check_request(ids, out)
        if not len(ids):
            return
        started_at = time.perf_counter()
        num_bytes = self._fetch(ids, out)
        self._check_records(ids, out)
        self._count(num_bytes, time.perf_counter() - started_at)

    def whole(self) -> np.ndarray | None:
        """See `Store.whole`."""
        return None

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fetch(self, ids: np.ndarray, out: np.ndarray) -> int:
        """Bring valid ids; how many bytes were read."""
        raise NotImplementedError

    def _check_request(self, ids: np.ndarray, out: np.ndarray) -> None:
        if self._closed:
            raise ValueError(f"The {self.name} store over {self.table.folder} is closed.")
        expected = (len(ids), self.layout.stride)
        if out.shape != expected or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"Expected contiguous uint8 {expected}, got {out.dtype} {out.shape} "
                f"with strides {out.strides}."
            )
        vocab_size = self.layout.shape.vocab_size
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise TableError(
                f"Token id {wrong} is not in the table, whose ids are 0 to {vocab_size - 1}."
            )

    def _check_records(self, ids: np.ndarray, out: np.ndarray) -> None:
        if self._checksums is None:
            return
        for row, problem in find_damage(self.layout, out, self._checksums[ids]):
            raise self._damaged(int(ids[row]), problem)

    def _damaged(self, token_id: int, problem: str) -> TableError:
        path, _ = self._place(token_id)
        return TableError(f"{path}: the record of id {token_id} is damaged: {problem}.")

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


def _open_shards(table: Table, flags: int, stack: ExitStack) -> list[int]:
    """A descriptor for each shard, closed by `stack`; EINVAL (no direct reads) as an `OSError`."""
    fds: list[int] = []
    for shard in table.shards:
        try:
            fds.append(os.open(table.path(shard), os.O_RDONLY | os.O_CLOEXEC | flags))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise
            raise _not_opened(table.path(shard), error) from error
        stack.callback(os.close, fds[-1])
    return fds


def _not_opened(path: Path, error: OSError) -> TableError:
    hint = " Raise the limit with ulimit -n." if error.errno == errno.EMFILE else ""
    return TableError(f"{path}: can't be opened: {error.strerror}.{hint}")


# -------------------------------------------------------------------------------------- memory


class MemoryStore(RecordStore):
    """The whole table in RAM, loaded when opened; reading is a gather."""

    name = "memory"
    backend = "ram"

    def __init__(self, table: Table, verify_checksums: bool) -> None:
        super().__init__(table, verify_checksums)
        num_bytes, available = self.layout.table_bytes, available_memory_bytes()
        if num_bytes > available:
            raise UserError(
                f"The table takes {format_bytes(num_bytes)} of memory, and "
                f"{format_bytes(available)} are available. Use the store 'direct' or 'mmap'."
            )
        self._records = aligned_buffer(num_bytes).reshape(-1, self.layout.stride)
        self._load()
        self._checksums = None  # all were checked once; memory doesn't change

    def _load(self) -> None:
        with ExitStack() as stack:
            fds = _open_shards(self.table, 0, stack)
            advance = stack.enter_context(
                _late_progress("Loading the table", self.layout.table_bytes)
            )
            threads = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1)))
            for num_bytes in threads.map(
                lambda piece: self._load_piece(fds, *piece), self._pieces()
            ):
                advance(num_bytes)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """(shard number, first row, rows) of what is loaded at a time."""
        most = max(1, _LOAD_BYTES // self.layout.stride)
        for number, shard in enumerate(self.table.shards):
            for row in range(0, shard.num_ids, most):
                yield number, row, min(most, shard.num_ids - row)

    def _load_piece(self, fds: list[int], number: int, row: int, count: int) -> int:
        shard = self.table.shards[number]
        first_id = shard.first_id + row
        records = self._records[first_id : first_id + count]
        path = self.table.path(shard)
        read_exactly(fds[number], records, self.layout.record_offset(row), path)
        self._check_records(np.arange(first_id, first_id + count), records)
        return records.nbytes

    def _fetch(self, ids: np.ndarray, out: np.ndarray) -> int:
        # Ids are in range; any other mode than "raise" writes to `out` without a buffer.
        np.take(self._records, ids, axis=0, out=out, mode="clip")
        return out.nbytes

    def whole(self) -> np.ndarray | None:
        return self._records

    def close(self) -> None:
        super().close()
        self._records = self._records[:0].copy()


@contextmanager
def _late_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to call with bytes done; a bar appears on stderr after two seconds."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(description), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total_bytes)
    started_at = time.perf_counter()

    def advance(num_bytes: int) -> None:
        bar.advance(task, num_bytes)
        if not bar.live.is_started and time.perf_counter() - started_at > 2:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()


# ---------------------------------------------------------------------------------------- mmap


class MappedStore(RecordStore):
    """Shards mapped into memory; the kernel is asked for all pages of a batch before the first.

    A file truncated in the middle of a read ends the process (SIGBUS); one truncated before it
    is found by its size.
    """

    name = "mmap"
    backend = "page cache"

    def __init__(self, table: Table, verify_checksums: bool) -> None:
        super().__init__(table, verify_checksums)
        with ExitStack() as stack:
            self._maps = [
                stack.enter_context(_map_shard(table.path(shard), shard)) for shard in table.shards
            ]
            self._resources = stack.pop_all()
        self._records = [
            np.frombuffer(mapped, np.uint8, shard.num_ids * self.layout.stride, DATA_START).reshape(
                shard.num_ids, self.layout.stride
            )
            for mapped, shard in zip(self._maps, table.shards, strict=True)
        ]

    def _fetch(self, ids: np.ndarray, out: np.ndarray) -> int:
        shards, rows = self._locate(ids)
        numbers = np.unique(shards)
        for number in numbers:
            self._check_size(int(number))
            self._announce(int(number), rows[shards == number])
        for number in numbers:
            _gather(self._records[number], rows, np.flatnonzero(shards == number), out)
        return out.nbytes

    def _check_size(self, number: int) -> None:
        shard, found = self.table.shards[number], self._maps[number].size()
        if found < shard.bytes:
            raise _truncated(self.table.path(shard), shard, found)

    def _announce(self, number: int, rows: np.ndarray) -> None:
        """Have the kernel start reading; page faults alone would wait for one after the other."""
        starts = np.unique((DATA_START + rows * self.layout.stride) // mmap.PAGESIZE)
        length = max(self.layout.stride, mmap.PAGESIZE)
        for start in (starts * mmap.PAGESIZE).tolist():
            self._maps[number].madvise(mmap.MADV_WILLNEED, start, length)

    def close(self) -> None:
        super().close()
        self._records.clear()  # a map can't be closed while arrays look into it
        self._resources.close()


def _map_shard(path: Path, shard: ShardInfo) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found < shard.bytes:
                raise _truncated(path, shard, found)
            return mmap.mmap(file.fileno(), shard.bytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _not_opened(path, error) from error


def _gather(records: np.ndarray, rows: np.ndarray, where: np.ndarray, out: np.ndarray) -> None:
    """`out[where] = records[rows[where]]`, without a copy in between where `where` is a run."""
    first, last = int(where[0]), int(where[-1])
    if last - first + 1 == len(where):
        np.take(records, rows[where], axis=0, out=out[first : last + 1], mode="clip")
    else:
        out[where] = records[rows[where]]


def _truncated(path: Path, shard: ShardInfo, found: int) -> TableError:
    return TableError(f"{path}: truncated while open, expected {shard.bytes} bytes, found {found}.")


# -------------------------------------------------------------------------------------- direct


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
        waiting = [self._threads.submit(read_slice, part) for part in parts[1:]]
        try:
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


class DirectStore(RecordStore):
    """Reads from the disk past the page cache, many records at once."""

    name = "direct"

    def __init__(self, table: Table, verify_checksums: bool, notify: Notify) -> None:
        super().__init__(table, verify_checksums)
        self._read_bytes = max(self.layout.stride, BLOCK)
        """One read: a record, or the block that holds it."""
        bounce_rows = min(max(1, _BOUNCE_BYTES // self._read_bytes), 256)
        self._bounce = aligned_buffer(bounce_rows * self._read_bytes).reshape(bounce_rows, -1)
        self._lock = threading.Lock()
        self._process = os.getpid()
        with ExitStack() as stack:
            fds, way = self._open_files(stack, notify)
            self._fds = np.array(fds, np.int32)
            self._backend, reader = self._open_backend(notify)
            stack.callback(self._backend.close)
            self.backend = reader + way
            self._resources = stack.pop_all()

    def _open_files(self, stack: ExitStack, notify: Notify) -> tuple[list[int], str]:
        """Descriptors of the shards, and what to add to the name of the back end."""
        try:
            with ExitStack() as attempt:
                fds = _open_shards(self.table, os.O_DIRECT, attempt)
                os.preadv(fds[0], [self._bounce[0, :BLOCK].data], DATA_START)
                stack.enter_context(attempt.pop_all())
                return fds, ""
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise TableError(
                    f"{self.table.folder}: can't be read: {error.strerror}."
                ) from error
        notify(
            f"The file system of {self.table.folder} has no direct reads (O_DIRECT): "
            "reading through the page cache, which takes memory beyond the row cache."
        )
        return _open_shards(self.table, 0, stack), " through the page cache"

    def _open_backend(self, notify: Notify) -> tuple[Backend, str]:
        try:
            return self._probed_ring(), "io_uring"
        except OSError as error:
            if error.errno not in _RING_REFUSALS:
                raise UserError(f"io_uring can't be set up: {error.strerror}.") from error
            notify(f"No io_uring here ({error.strerror}): reading with {_NUM_THREADS} threads.")
        return ThreadedReads(), f"preadv x{_NUM_THREADS} threads"

    def _probed_ring(self) -> Ring:
        """A ring that has read a block; an `OSError` where that doesn't work."""
        ring = Ring()
        try:
            target = self._bounce[:1, :BLOCK]
            result = int(ring.read_rows(self._fds[:1], np.array([DATA_START]), target)[0])
            if result < 0:
                raise OSError(-result, os.strerror(-result))
        except BaseException:
            ring.close()
            raise
        return ring

    def _fetch(self, ids: np.ndarray, out: np.ndarray) -> int:
        if os.getpid() != self._process:
            raise UserError("A direct store can't be used after a fork; open it in each process.")
        with self._lock:
            if self._read_bytes == self.layout.stride and out.ctypes.data % BLOCK == 0:
                self._read(ids, out)
            else:
                self._read_and_copy(ids, out)
        return len(ids) * self._read_bytes

    def _read_and_copy(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Read into the aligned bounce buffer, piece by piece, and copy the records out."""
        for first in range(0, len(ids), len(self._bounce)):
            piece = ids[first : first + len(self._bounce)]
            blocks = self._bounce[: len(piece)]
            inner = self._read(piece, blocks)
            records = blocks.reshape(len(piece), -1, self.layout.stride)
            out[first : first + len(piece)] = records[np.arange(len(piece)), inner]

    def _read(self, ids: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Read the record or block of each id into a row of `target`, uint8 [n, _read_bytes].

        Returns:
            int64 [n]: which record of its row each id is (0 where a row is one record).
        """
        shards, rows = self._locate(ids)
        offsets = DATA_START + rows * self.layout.stride
        starts = offsets // BLOCK * BLOCK
        results = self._read_rows(self._fds[shards], starts, target)
        needed = offsets - starts + self.layout.stride
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
            raise TableError(f"{self.table.folder}: can't be read: {error.strerror}.") from error

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

    def close(self) -> None:
        with self._lock:
            super().close()
            self._resources.close()
