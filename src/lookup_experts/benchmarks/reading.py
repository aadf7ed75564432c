"""Reading records: how much of the disk's bandwidth a store reaches."""

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lookup_experts.benchmarks.ceilings import DiskCounter, disk_bytes_per_second
from lookup_experts.benchmarks.timing import median
from lookup_experts.table.direct import ThreadedReads
from lookup_experts.table.format import BLOCK
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.opening import Table
from lookup_experts.table.store import PendingRead, RecordStore

DISK_SAMPLE_BYTES = 256 * 2**20
NUM_RANDOM_BATCHES = 512
PLAIN_THREADS = 64
ROUNDS = 5
SECONDS = 0.5
"""Of each way of reading, in each round."""


@dataclass(frozen=True)
class ReadingWay:
    """How batches are read."""

    under_way: int
    """Batches that are read at once: as soon as one has come, the next is asked for. With one,
    the disk idles between batches; prompts are read with more. For small batches only
    (`Store.begin`)."""
    busy_thread: bool
    """Whether another Python thread computes while records are read."""
    switch_interval_ms: float = 5.0
    """For how long that thread may keep the interpreter from who has waited for a read
    (`sys.setswitchinterval`; 5 ms unless it is set)."""


WAYS = (
    ReadingWay(under_way=1, busy_thread=False),
    ReadingWay(under_way=8, busy_thread=False),
    ReadingWay(under_way=1, busy_thread=True),
    ReadingWay(under_way=1, busy_thread=True, switch_interval_ms=0.5),
    ReadingWay(under_way=8, busy_thread=True),
)
"""What `mole bench read` measures."""


@dataclass(frozen=True)
class ReadResult:
    """Random records in batches, beside large sequential reads of the same file in turn."""

    what: str
    store: str
    backend: str
    encoding: str
    record_bytes: int
    batch: int
    under_way: int
    """See `ReadingWay`, as the next two."""
    busy_thread: bool
    switch_interval_ms: float
    gb_per_second: float
    disk_gb_per_second: float
    share_of_disk_bandwidth: float
    plain_gb_per_second: float
    """As many random reads of the same size at once, by `preadv` in threads of their own and
    without a table: what the disk gives for such reads."""
    share_of_plain_reads: float
    ms_per_batch: float
    page_cache_bypassed: bool | None = None
    """Whether the kernel brought from the disk at least what the store says it read; None for a
    store that doesn't read past the page cache."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what doesn't apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def measure_read(
    table: Table,
    store: RecordStore,
    batch: int,
    way: ReadingWay,
) -> ReadResult:
    """Read batches of random records for a while, the disk in large blocks, and places of the
    records' size by plain reads, in turn.

    Args:
        table: whose records to read.
        store: what reads them.
        batch: records per call.
        way: how they are read.
    """
    layout = table.layout
    random = np.random.default_rng(0)
    under_way = way.under_way
    memory = aligned_buffer(under_way * batch * layout.stride).reshape(under_way, batch, -1)
    rates, disk_rates, plain_rates, bypassed = [], [], [], []
    path = table.path(table.shards[0])
    largest_start = max(0, table.shards[0].bytes - DISK_SAMPLE_BYTES)
    with _plain_reads(path, under_way * batch, layout.stride, random) as plain:
        for _ in range(ROUNDS):
            start = int(random.integers(0, largest_start + 1)) // 4096 * 4096
            disk_rates.append(disk_bytes_per_second(path, DISK_SAMPLE_BYTES, start))
            plain_rates.append(plain(SECONDS))
            ids = _random_batches(random, layout.shape.vocab_size, batch)
            disk, bytes_before = DiskCounter(), store.bytes_read
            with _busy(way.busy_thread), _switching_after(way.switch_interval_ms / 1e3):
                rates.append(_bytes_per_second(store, ids, memory, SECONDS))
            bypassed.append(disk.bytes_read() >= store.bytes_read - bytes_before)
    return ReadResult(
        what="read",
        store=store.name,
        backend=store.backend,
        encoding=layout.encoding.name,
        record_bytes=layout.record_bytes,
        batch=batch,
        **asdict(way),
        gb_per_second=median(rates) / 1e9,
        disk_gb_per_second=median(disk_rates) / 1e9,
        share_of_disk_bandwidth=median(
            [rate / disk for rate, disk in zip(rates, disk_rates, strict=True)]
        ),
        plain_gb_per_second=median(plain_rates) / 1e9,
        share_of_plain_reads=median(
            [rate / plain for rate, plain in zip(rates, plain_rates, strict=True)]
        ),
        ms_per_batch=batch * layout.stride / median(rates) * 1e3,
        page_cache_bypassed=all(bypassed) if store.name == "direct" else None,
    )


def _random_batches(
    random: np.random.Generator, vocab_size: int, batch: int
) -> Iterator[np.ndarray]:
    """Batches of different ids without end; drawn before they are timed, and gone through anew."""
    batches = [
        random.choice(vocab_size, batch, replace=False).astype(np.int64)
        for _ in range(NUM_RANDOM_BATCHES)
    ]
    return itertools.cycle(batches)


def _bytes_per_second(
    store: RecordStore, ids: Iterator[np.ndarray], memory: np.ndarray, seconds: float
) -> float:
    """Keep as many batches under way as `memory`, uint8 [under_way, batch, stride], holds."""
    if len(memory) == 1:
        return _bytes_per_second_in_turn(store, ids, memory[0], seconds)
    slots = np.arange(memory.shape[1])
    pending: deque[PendingRead] = deque()
    buffers = itertools.cycle(memory)
    begun = 0
    started_at = time.perf_counter()
    while time.perf_counter() - started_at < seconds:
        if len(pending) == len(memory):
            pending.popleft().wait()
        pending.append(store.begin(next(ids), next(buffers), slots))
        begun += 1
    for read in pending:
        read.wait()
    return begun * memory[0].nbytes / (time.perf_counter() - started_at)


def _bytes_per_second_in_turn(
    store: RecordStore, ids: Iterator[np.ndarray], out: np.ndarray, seconds: float
) -> float:
    """One batch after the other."""
    batches = 0
    started_at = time.perf_counter()
    while time.perf_counter() - started_at < seconds:
        store.read(next(ids), out)
        batches += 1
    return batches * out.nbytes / (time.perf_counter() - started_at)


@contextmanager
def _plain_reads(
    path: Path, num_reads: int, num_bytes: int, random: np.random.Generator
) -> Iterator[Callable[[float], float]]:
    """A function that reads `num_bytes` from random blocks of a file, so many times at once, again
    and again for so many seconds, a thread for each up to `PLAIN_THREADS`: bytes per second.

    Whole blocks are read, as they must be; only the bytes asked for count."""
    length = -(-num_bytes // BLOCK) * BLOCK
    buffer = aligned_buffer(num_reads * length)
    lengths, targets = np.full(num_reads, length), np.arange(num_reads) * length
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    threads = ThreadedReads(min(num_reads, PLAIN_THREADS))
    fds = np.full(num_reads, fd)
    num_places = (os.fstat(fd).st_size - length) // BLOCK + 1

    def measure(seconds: float) -> float:
        batches = 0
        started_at = time.perf_counter()
        while time.perf_counter() - started_at < seconds:
            offsets = random.integers(0, num_places, num_reads) * BLOCK
            threads.read(fds, offsets, lengths, buffer, targets)
            batches += 1
        return batches * num_reads * num_bytes / (time.perf_counter() - started_at)

    try:
        yield measure
    finally:
        threads.close()
        os.close(fd)


@contextmanager
def _switching_after(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _busy(wanted: bool) -> Iterator[None]:
    """Another thread that keeps the interpreter busy, where it is wanted."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()
