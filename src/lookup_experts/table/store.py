"""Where records are read from: `memory`, `mmap` or `direct`.

`open_store` gives a `Store`; `store.read(ids, out)` brings the records of a batch of ids. What a
record means is in `format.py` and `encoding.py`; caching and prefetching are in `cache.py` and
`reader.py`; the store `direct` is in `direct.py`.

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
import logging
import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

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
from lookup_experts.table.scales import PROBLEM, scale_check
from lookup_experts.units import format_bytes, parse_bytes

STORES = ("memory", "mmap", "direct")

_LOAD_BYTES = 2**24
_CHECKED_BYTES = 2**24
_FEW = 64
_COPIED_AT_ONCE = 2**21
"""Records of the memory store beyond these bytes (experts, not a step's records) are copied by a
thread, beside the caller's work."""

Notify = Callable[[str], None]
log: Notify = logging.getLogger("lookup_experts").warning
"""Tells those who didn't say how they want to be told: Python prints it to stderr."""

_Result = TypeVar("_Result")


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
    reads_parts: bool
    """Whether `read` brings parts of records. Checksums cover whole ones: see `check`."""

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """Put the records of `ids`, or the same part of each, into `out`.

        Args:
            ids: int64 [U], unique.
            out: uint8 [U, width], C-contiguous; a whole record has width `stride`. Aligned to
                4096 (`aligned_buffer`, pinned memory), `direct` reads straight into it;
                otherwise it copies.
            start: the first byte of the part; it and `width` are multiples of 4096.

        Raises:
            TableError: an id is outside the table; a record can't be read in full, or is
                damaged: by its scales, or (whole records, with `verify_checksums`) anywhere.
                Names file and id. `out` is then undefined.
        """

    def check(self, ids: np.ndarray) -> None:
        """Compare the whole records of `ids`, of which parts will be read, with their checksums.

        A few are held at a time. Without `verify_checksums` nothing is done.

        Raises:
            TableError: as `read`.
        """

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> "PendingRead":
        """Start to put whole records into rows of `memory`; for small batches.

        Args:
            ids: int64 [U], unique.
            memory: uint8 [M, stride], aligned to 4096.
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


def open_store(
    table: Table,
    kind: str = "auto",
    *,
    verify_checksums: bool = False,
    notify: Notify,
) -> "RecordStore":
    """The store of this kind over `table`; also a context manager that closes it.

    Args:
        kind: "memory", "mmap", "direct", or "auto": memory if the whole table fits half of what
            is available now, else direct; "auto:8GB": if it fits that.
        verify_checksums: check every record that is read (for "memory": all, once, on loading).
        notify: is told, in one line each, what was chosen and what could not be had.

    Raises:
        UserError: unknown kind, or not enough memory, or too many open files.
        TableError: a shard can't be read, or (with `verify_checksums`) is damaged.
    """
    given = kind
    kind, colon, budget = kind.partition(":")
    if kind not in (*STORES, "auto") or (colon and kind != "auto"):
        raise unknown_name("store", given, (*STORES, "auto"))
    if kind == "auto":
        kind = _choose(table.layout.table_bytes, parse_bytes(budget) if colon else None, notify)
    if kind == "memory":
        return MemoryStore(table, verify_checksums)
    if kind == "mmap":
        return MappedStore(table, verify_checksums)
    from lookup_experts.table.direct import DirectStore

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


def submit_read(
    thread: Executor, read: Callable[..., _Result], *arguments: Any
) -> "Future[_Result]":
    """What a thread of ours reads; a `TableError` in it where that thread has ended.

    It is in the future in any case, so a read that can't begin fails like one that breaks off:
    when its records are needed, and the same each time.
    """
    try:
        return thread.submit(_read_in_thread, read, arguments)
    except RuntimeError as error:
        failed: Future[_Result] = Future()
        failed.set_exception(_ended(error))
        return failed


def _read_in_thread(read: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
    try:
        return read(*arguments)
    except Exception:
        raise
    except BaseException as error:  # it is for the thread that it reached, not for the model's
        raise _ended(error) from error


def _ended(error: BaseException) -> TableError:
    why = f"{type(error).__name__}: {error}".removesuffix(": ")
    return TableError(
        f"The thread that reads the table has ended ({why}). Try again; if it stays so, load the "
        "model again."
    )


class ThreadedRead:
    """A `PendingRead` that a thread of ours carries out."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        self._future.result()


class _Finished:
    """A `PendingRead` that was over when it began."""

    def wait(self) -> None:
        """See `PendingRead.wait`."""


class RecordStore(ABC):
    """What all stores share: checking requests and records, finding files, counting."""

    name: str
    backend: str

    def __init__(self, table: Table, verify_checksums: bool) -> None:
        self.table, self.layout = table, table.layout
        self.bytes_read, self.reads, self.seconds_reading = 0, 0, 0.0
        self._first_ids = np.array([shard.first_id for shard in table.shards])
        self._checksums = _all_checksums(table) if verify_checksums else None
        self._scales = scale_check(table.layout)
        self.reads_parts = self.layout.stride >= BLOCK
        self._count_lock = threading.Lock()
        self._closed = False
        self._thread: ThreadPoolExecutor | None = None

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """See `Store.read`."""
        self._check_request(ids, out, start)
        if not len(ids):
            return
        started_at = time.perf_counter()
        num_bytes = self._fetch(ids, out, start)
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

    def close(self) -> None:
        """See `Store.close`."""
        if self._thread is not None:
            self._thread.shutdown()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _fetch(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        """Bring valid ids; how many bytes were read."""

    def _check_request(self, ids: np.ndarray, out: np.ndarray, start: int) -> None:
        width = out.shape[-1] if start else self.layout.stride
        if out.ndim == 2 and self._is_part(start, start + out.shape[1]):
            width = out.shape[1]
        expected = (len(ids), width)
        if out.shape != expected or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"Expected contiguous uint8 {expected}, got {out.dtype} {out.shape} "
                f"with strides {out.strides}."
            )
        self._check_ids(ids)

    def _is_part(self, start: int, stop: int) -> bool:
        """Whether records have these bytes and may be read in such parts."""
        aligned = start % BLOCK == 0 and stop % BLOCK == 0
        return aligned and 0 <= start < stop <= self.layout.stride and self.reads_parts

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


def open_shards(table: Table, flags: int, stack: ExitStack) -> list[int]:
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
    return TableError(f"{path}: can't be opened: {say_why(error)}")


def say_why(error: OSError) -> str:
    """The error in words, and what to do where that is known."""
    hint = " Raise the limit with ulimit -n." if error.errno == errno.EMFILE else ""
    return f"{error.strerror}.{hint}"


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
            fds = open_shards(self.table, 0, stack)
            advance = stack.enter_context(
                late_progress("Loading the table", self.layout.table_bytes)
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

    def _fetch(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        # Ids are in range; any other mode than "raise" writes to `out` without a buffer.
        part = self._records[:, start : start + out.shape[1]]
        np.take(part, ids, axis=0, out=out, mode="clip")
        return out.nbytes

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> PendingRead:
        """See `Store.begin`: copied at once if small, which takes less than asking a thread to."""
        if len(ids) * self.layout.stride > _COPIED_AT_ONCE:
            return super().begin(ids, memory, slots)
        self._check_ids(ids)
        started_at = time.perf_counter()
        for token_id, slot in zip(ids.tolist(), slots.tolist(), strict=True):
            memory[slot] = self._records[token_id]
        self._count(len(ids) * self.layout.stride, time.perf_counter() - started_at)
        return _Finished()

    def whole(self) -> np.ndarray | None:
        return self._records

    def close(self) -> None:
        super().close()
        self._records = self._records[:0].copy()


@contextmanager
def late_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
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

    def _fetch(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        shards, rows = self._locate(ids)
        numbers = np.unique(shards)
        for number in numbers:
            self._check_size(int(number))
            self._announce(int(number), rows[shards == number])
        for number in numbers:
            records = self._records[number][:, start : start + out.shape[1]]
            _gather(records, rows, np.flatnonzero(shards == number), out)
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
