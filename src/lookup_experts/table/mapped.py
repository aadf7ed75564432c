"""The store `mmap`: records out of the kernel's page cache."""

import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from lookup_experts.errors import TableError
from lookup_experts.table.format import DATA_START
from lookup_experts.table.layout import ShardInfo
from lookup_experts.table.opening import Table, not_opened, reopen_table
from lookup_experts.table.store import RecordStore


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

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """See `Store.read`."""
        self.read_by(self._fetch, ids, out, start)

    def _fetch(self, ids: np.ndarray, out: np.ndarray, start: int) -> int:
        shards, rows = self._locate(ids)
        numbers = np.unique(shards)
        for number in numbers:
            self._check_size(int(number))
            self._announce(int(number), rows[shards == number], start, out.shape[1])
        for number in numbers:
            records = self._records[number][:, start : start + out.shape[1]]
            _gather(records, rows, np.flatnonzero(shards == number), out)
        return out.nbytes

    def _check_size(self, number: int) -> None:
        shard, found = self.table.shards[number], self._maps[number].size()
        if found < shard.bytes:
            raise _truncated(self.table.path(shard), shard, found)

    def _announce(self, number: int, rows: np.ndarray, start: int, width: int) -> None:
        """Have the kernel start reading; page faults alone would wait for one after the other."""
        begins = DATA_START + rows * self.layout.stride + start
        firsts = begins // mmap.PAGESIZE
        # Records of one page are all announced with it: as far as any of them may reach.
        pages = int(((begins + width - 1) // mmap.PAGESIZE - firsts).max()) + 1
        mapped = self._maps[number]
        for first in (np.unique(firsts) * mmap.PAGESIZE).tolist():
            length = min(pages * mmap.PAGESIZE, len(mapped) - first)
            mapped.madvise(mmap.MADV_WILLNEED, first, length)

    def reopened(self) -> Self:
        return type(self)(reopen_table(self.table), self.verify_checksums)

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
        raise not_opened(path, error) from error


def _gather(records: np.ndarray, rows: np.ndarray, where: np.ndarray, out: np.ndarray) -> None:
    """`out[where] = records[rows[where]]`, without a copy in between where `where` is a run."""
    first, last = int(where[0]), int(where[-1])
    if last - first + 1 == len(where):
        np.take(records, rows[where], axis=0, out=out[first : last + 1], mode="clip")
    else:
        out[where] = records[rows[where]]


def _truncated(path: Path, shard: ShardInfo, found: int) -> TableError:
    return TableError(f"{path}: truncated while open, expected {shard.bytes} bytes, found {found}.")
