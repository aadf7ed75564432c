"""The store `memory`: the whole table in RAM."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self

import numpy as np

from lookup_experts.errors import UserError
from lookup_experts.table.files import read_exactly
from lookup_experts.table.host_memory import aligned_buffer, available_memory_bytes
from lookup_experts.table.opening import Table, open_shards
from lookup_experts.table.progress import late_progress
from lookup_experts.table.store import PendingRead, RecordStore
from lookup_experts.units import format_bytes

_LOAD_BYTES = 2**24
_COPIED_AT_ONCE = 2**21
"""Records of the memory store beyond these bytes (experts, not a step's records) are copied by a
thread, beside the caller's work."""


class _Finished:
    """A `PendingRead` that was over when it began."""

    def wait(self) -> None:
        """See `PendingRead.wait`."""


class MemoryStore(RecordStore):
    """The whole table in RAM, loaded when opened; reading is a gather.

    Args:
        records: of another store over this table, uint8 [V, stride]; loaded where there are none.
    """

    name = "memory"
    backend = "ram"

    def __init__(
        self, table: Table, verify_checksums: bool, records: np.ndarray | None = None
    ) -> None:
        super().__init__(table, verify_checksums)
        self._records = self._loaded() if records is None else records
        self._checksums = None  # all were checked once; memory doesn't change

    def _loaded(self) -> np.ndarray:
        num_bytes, available = self.layout.table_bytes, available_memory_bytes()
        if num_bytes > available:
            raise UserError(
                f"The table takes {format_bytes(num_bytes)} of memory, and "
                f"{format_bytes(available)} are available. Use the store 'direct' or 'mmap'."
            )
        records = aligned_buffer(num_bytes, huge_pages=True).reshape(-1, self.layout.stride)
        with ExitStack() as stack:
            fds = open_shards(self.table, 0, stack)
            advance = stack.enter_context(
                late_progress("Loading the table", self.layout.table_bytes)
            )
            threads = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1)))
            for num_bytes in threads.map(
                lambda piece: self._load_piece(fds, records, *piece), self._pieces()
            ):
                advance(num_bytes)
        return records

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """(shard number, first row, rows) of what is loaded at a time."""
        most = max(1, _LOAD_BYTES // self.layout.stride)
        for number, shard in enumerate(self.table.shards):
            for row in range(0, shard.num_ids, most):
                yield number, row, min(most, shard.num_ids - row)

    def _load_piece(
        self, fds: list[int], target: np.ndarray, number: int, row: int, count: int
    ) -> int:
        shard = self.table.shards[number]
        first_id = shard.first_id + row
        records = target[first_id : first_id + count]
        path = self.table.path(shard)
        read_exactly(fds[number], records, self.layout.record_offset(row), path)
        self._check_records(np.arange(first_id, first_id + count), records)
        return records.nbytes

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        """See `Store.read`."""
        self.read_by(self._fetch, ids, out, start)

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

    def reopened(self) -> Self:
        return type(self)(self.table, self.verify_checksums, self._records)

    def close(self) -> None:
        super().close()
        self._records = self._records[:0].copy()
