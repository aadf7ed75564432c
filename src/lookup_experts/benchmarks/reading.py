"""Reading records: how much of the disk's bandwidth a store reaches."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lookup_experts.benchmarks.bandwidth import disk_bytes_per_second
from lookup_experts.benchmarks.timing import median
from lookup_experts.table.format import Table
from lookup_experts.table.store import RecordStore, aligned_buffer

DISK_SAMPLE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ReadResult:
    """Random records in batches, beside large sequential reads of the same file in turn."""

    what: str
    store: str
    backend: str
    encoding: str
    record_bytes: int
    batch: int
    busy_thread: bool
    """Whether another Python thread computed all the while."""
    gb_per_second: float
    disk_gb_per_second: float
    share_of_disk_bandwidth: float
    ms_per_batch: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def measure_read(
    table: Table,
    store: RecordStore,
    batch: int,
    *,
    rounds: int = 5,
    seconds: float = 0.5,
    busy_thread: bool = False,
) -> ReadResult:
    """Read batches of random records for a while, and the disk in large blocks, in turn.

    Args:
        table: whose records to read.
        store: what reads them.
        batch: records per call.
        rounds: how often to take turns.
        seconds: of reading records per round.
        busy_thread: let another Python thread compute all the while.
    """
    layout = table.layout
    random = np.random.default_rng(0)
    out = aligned_buffer(batch * layout.stride).reshape(batch, layout.stride)
    rates, disk_rates, batch_seconds = [], [], []
    path = table.path(table.shards[0])
    largest_start = max(0, table.shards[0].bytes - DISK_SAMPLE_BYTES)
    with _busy(busy_thread):
        for _ in range(rounds):
            start = int(random.integers(0, largest_start + 1)) // 4096 * 4096
            disk_rates.append(disk_bytes_per_second(path, DISK_SAMPLE_BYTES, start))
            times = _read_for(store, layout.shape.vocab_size, out, random, seconds)
            batch_seconds += times
            rates.append(out.nbytes * len(times) / sum(times))
    return ReadResult(
        what="read",
        store=store.name,
        backend=store.backend,
        encoding=layout.encoding.name,
        record_bytes=layout.record_bytes,
        batch=batch,
        busy_thread=busy_thread,
        gb_per_second=median(rates) / 1e9,
        disk_gb_per_second=median(disk_rates) / 1e9,
        share_of_disk_bandwidth=median(
            [rate / disk for rate, disk in zip(rates, disk_rates, strict=True)]
        ),
        ms_per_batch=median(batch_seconds) * 1e3,
    )


def _read_for(
    store: RecordStore,
    vocab_size: int,
    out: np.ndarray,
    random: np.random.Generator,
    seconds: float,
) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds:
        ids = random.choice(vocab_size, len(out), replace=False).astype(np.int64)
        started_at = time.perf_counter()
        store.read(ids, out)
        times.append(time.perf_counter() - started_at)
    return times


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
