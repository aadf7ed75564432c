"""Verifying a table: every record is read and compared with its checksum."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from lookup_experts.table.damage import find_damage
from lookup_experts.table.files import read_exactly
from lookup_experts.table.layout import ShardInfo
from lookup_experts.table.opening import Table
from lookup_experts.table.progress import Progress
from lookup_experts.table.shard import row_chunks, stored_checksums


@dataclass(frozen=True)
class BadRecord:
    """One damaged record."""

    id: int
    file: str
    problem: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_table` found."""

    num_ids: int
    num_bad: int
    bad: tuple[BadRecord, ...]
    """The first of the damaged records, in the order of their ids."""
    num_bytes: int
    seconds: float

    @property
    def intact(self) -> bool:
        return self.num_bad == 0


MAX_BAD_LISTED = 20


def verify_table(table: Table, progress: Progress | None = None) -> VerifyReport:
    """Read every record; check its checksum and that its scales and numbers are finite.

    Holds a few megabytes for each of a few threads.

    Raises:
        TableError: a file can't be read to its end.
    """
    started_at = time.perf_counter()
    num_ids, done, num_bad = table.layout.shape.vocab_size, 0, 0
    listed: list[BadRecord] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for count, bad in threads.map(partial(_verify_chunk, table), _all_chunks(table)):
            listed += bad[: MAX_BAD_LISTED - len(listed)]
            num_bad += len(bad)
            done += count
            if progress:
                progress(done, num_ids)
    seconds = time.perf_counter() - started_at
    return VerifyReport(num_ids, num_bad, tuple(listed), table.layout.table_bytes, seconds)


def _all_chunks(table: Table) -> list[tuple[ShardInfo, int, int]]:
    """(shard, first row, rows) of pieces that cover the table in order."""
    return [
        (shard, first, count)
        for shard in table.shards
        for first, count in row_chunks(shard.num_ids, table.layout.stride)
    ]


def _verify_chunk(table: Table, chunk: tuple[ShardInfo, int, int]) -> tuple[int, list[BadRecord]]:
    shard, first_row, count = chunk
    path, layout = table.path(shard), table.layout
    records = np.empty((count, layout.stride), np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_exactly(fd, records, layout.record_offset(first_row), path)
        checksums = stored_checksums(fd, layout, shard, first_row, count, path)
    finally:
        os.close(fd)
    first_id = shard.first_id + first_row
    return count, [
        BadRecord(first_id + row, shard.file, problem)
        for row, problem in find_damage(layout, records, checksums)
    ]
