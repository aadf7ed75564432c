"""Reading records: how much of the disk's bandwidth a store reaches."""

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lookup_experts import console
from lookup_experts.benchmarks.machine import disk_bytes_per_second
from lookup_experts.benchmarks.models import Case, random_table
from lookup_experts.benchmarks.plots import draw_bars
from lookup_experts.benchmarks.processes import DiskCounter
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.timing import median, pair_ratios
from lookup_experts.table.direct import ThreadedReads
from lookup_experts.table.format import BLOCK
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.opening import Table
from lookup_experts.table.reader import SLOT_BATCH
from lookup_experts.table.store import PendingRead, RecordStore
from lookup_experts.table.store_choice import open_store

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


def bench_read(
    case: Case, store: str, batches: Sequence[int], work: Path, results: Results
) -> None:
    """`mole bench read`: batches of each size, in all ways that the reader knows for it."""
    table = random_table(case, work)
    with open_store(table, store, notify=console.say) as opened:
        for batch in batches:
            for way in WAYS:
                if way.under_way == 1 or batch <= SLOT_BATCH:
                    results.add(measure_read(table, opened, batch, way))
    results.finish(draw)


def measure_read(table: Table, store: RecordStore, batch: int, way: ReadingWay) -> Result:
    """Read batches of random records for a while, the disk in large blocks, and places of the
    records' size by plain reads, in turn.

    Args:
        table: whose records to read.
        store: what reads them.
        batch: records per call.
        way: how they are read.

    Returns:
        `disk_...` and `share_of_disk_bandwidth` are of the large blocks. `plain_...` is of as many
        random reads of the same size at once, by `preadv` in threads of their own and without a
        table: what the disk gives for such reads. `page_cache_bypassed` tells whether the kernel
        brought from the disk at least what the store says it read; None for a store that doesn't
        read past the page cache.
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
            with _interpreter_as(way):
                rates.append(_bytes_per_second(store, ids, memory, SECONDS))
            bypassed.append(disk.bytes_read() >= store.bytes_read - bytes_before)
    return {
        "what": "read",
        "store": store.name,
        "backend": store.backend,
        "encoding": layout.encoding.name,
        "record_bytes": layout.record_bytes,
        "batch": batch,
        **asdict(way),
        "gb_per_second": median(rates) / 1e9,
        "disk_gb_per_second": median(disk_rates) / 1e9,
        "share_of_disk_bandwidth": median(pair_ratios(rates, disk_rates)),
        "plain_gb_per_second": median(plain_rates) / 1e9,
        "share_of_plain_reads": median(pair_ratios(rates, plain_rates)),
        "ms_per_batch": batch * layout.stride / median(rates) * 1e3,
        "page_cache_bypassed": all(bypassed) if store.name == "direct" else None,
    }


def draw(results: list[Result], path: Path) -> None:
    """The share of what large sequential reads reach."""
    draw_bars(
        path,
        f"Reading records of {results[0]['record_bytes'] / 1e3:.0f} kB",
        "share of the disk's bandwidth",
        [
            f"{result['under_way']} × {result['batch']} records"
            + ("\nbusy thread" if result["busy_thread"] else "")
            + (f", {result['switch_interval_ms']:g} ms" if result["busy_thread"] else "")
            for result in results
        ],
        [result["share_of_disk_bandwidth"] for result in results],
        mark=1.0,
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


def _batches_per_second(
    read: Callable[[], object], seconds: float, finish: Callable[[], object] = lambda: None
) -> float:
    """Call `read` again and again for so long."""
    batches, started_at = 0, time.perf_counter()
    while time.perf_counter() - started_at < seconds:
        read()
        batches += 1
    finish()
    return batches / (time.perf_counter() - started_at)


def _bytes_per_second(
    store: RecordStore, ids: Iterator[np.ndarray], memory: np.ndarray, seconds: float
) -> float:
    """Keep as many batches under way as `memory`, uint8 [under_way, batch, stride], holds."""
    slots = np.arange(memory.shape[1])
    pending: deque[PendingRead] = deque()
    buffers = itertools.cycle(memory)

    def begin_next() -> None:
        if len(pending) == len(memory):
            pending.popleft().wait()
        pending.append(store.begin(next(ids), next(buffers), slots))

    def wait_for_all() -> None:
        for read in pending:
            read.wait()

    if len(memory) == 1:
        rate = _batches_per_second(lambda: store.read(next(ids), memory[0]), seconds)
    else:
        rate = _batches_per_second(begin_next, seconds, wait_for_all)
    return rate * memory[0].nbytes


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

    def read() -> None:
        offsets = random.integers(0, num_places, num_reads) * BLOCK
        threads.read(fds, offsets, lengths, buffer, targets)

    try:
        yield lambda seconds: _batches_per_second(read, seconds) * num_reads * num_bytes
    finally:
        threads.close()
        os.close(fd)


@contextmanager
def _interpreter_as(way: ReadingWay) -> Iterator[None]:
    """Another thread that keeps the interpreter busy, where it is wanted, and for how long."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    before = sys.getswitchinterval()
    sys.setswitchinterval(way.switch_interval_ms / 1e3)
    thread = threading.Thread(target=compute if way.busy_thread else stop.wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
