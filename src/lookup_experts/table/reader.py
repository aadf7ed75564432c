"""Table form: the rows of a batch's tokens, read from a store.

`TableReader` is the `ExpertSource` of an inference model, and the `EmbeddingSource` of an
embedding whose rows lie in a table. The token ids are known before the first layer runs, so their
records are asked for then, and a block waits for them only when it needs them, after its attention.
"""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.errors import TableError
from lookup_experts.model.rows import TokenRows, check_bounds
from lookup_experts.table.batch import (
    FillingFromStore,
    SlotBatch,
    unique_in_order,
)
from lookup_experts.table.cache import RowCache
from lookup_experts.table.cache_budget import CacheBudget, parse_cache
from lookup_experts.table.counts import most_frequent, read_counts
from lookup_experts.table.device import DeviceReader
from lookup_experts.table.device_cache import CachedRecords
from lookup_experts.table.device_records import CacheCounts, DeviceRecords, HostRecords
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.lanes import Lane, open_lane
from lookup_experts.table.layout import TableShape
from lookup_experts.table.opening import Table, open_table, reopen_table
from lookup_experts.table.progress import late_progress
from lookup_experts.table.reading_thread import ThreadedRead, submit_read
from lookup_experts.table.rows import (
    Decoding,
    MemoryRows,
    PromptBuffers,
    StreamedRows,
    WaitClock,
)
from lookup_experts.table.store import Notify, Store, log
from lookup_experts.table.store_choice import open_store

SLOT_BATCH = 64
"""Most unique ids of a batch that goes through the row cache. Larger ones are prompts, whose
records are streamed."""
GROUP_BYTES = 16 * 2**20
"""What each of the two buffers of a streamed prompt takes, unless one layer is larger."""
KEPT_BYTES = 24 * 2**20
"""Buffers of a streamed prompt up to this size are kept for the next one: a group's bytes and the
blocks at its ends."""


@dataclass
class ReaderStatistics:
    """What a reader has done since it was opened or reset; times in seconds."""

    store: str
    backend: str
    cache_bytes: int
    """Budget of the row cache."""
    batches: int = 0
    ids_asked: int = 0
    ids_unique: int = 0
    """Summed over batches; a GPU takes each position of a step for an id of its own."""
    cache_hits: int = 0
    """Of the unique ids; those that went past the cache (prompts) don't count."""
    bytes_read: int = 0
    read_seconds: float = 0.0
    """From asking the store to having the records, beside the model's work."""
    wait_seconds: float = 0.0
    """Spent by the model, waiting for records."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class TableReader:
    """An `ExpertSource` that reads a table.

    Args:
        table: an open table.
        store: where its records are read from.
        dtype: what rows are decoded to; the model's.
        device: where rows are needed.
        cache: budget of the row cache, see `parse_cache`; 0 is off. A table in RAM needs none.
        rows_per_token: how many ids a token of text stands for, as with hashed n-grams.
    """

    def __init__(
        self,
        table: Table,
        store: Store,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        cache: int | str | CacheBudget = 0,
        rows_per_token: int = 1,
    ) -> None:
        self.table = table
        self.rows_per_token = rows_per_token
        self._slot_batch = SLOT_BATCH * rows_per_token
        self._store = store
        self._dtype = dtype
        self._clock = WaitClock()
        self._thread = ThreadPoolExecutor(1, "table-reader")
        self._lock = threading.Lock()
        whole = store.whole()
        self._whole = None if whole is None else torch.from_numpy(whole)
        self._budget = parse_cache(cache)
        in_memory = 0 if whole is not None else self._budget.total
        useful_bytes = min(in_memory, table.layout.table_bytes)
        self._cache = RowCache(table.layout.stride, useful_bytes, self._slot_batch)
        self._filling = FillingFromStore(store, self._cache.memory)
        self._slots = torch.from_numpy(self._cache.memory)
        self._prompt_buffers = PromptBuffers(KEPT_BYTES)
        self._dropped: deque[SlotBatch] = deque()
        """Batches whose rows nobody holds any more. Noted here and given back by the next batch:
        the garbage collector drops rows at any moment, even while this thread holds a lock."""
        self.missed: frozenset[int] | None = frozenset()
        """The ids whose records the newest batch had to read; None: all of its ids."""
        self._closed = False
        self._on_device: DeviceReader | None = None
        self._counted_before: list[CacheCounts] = []
        """By devices that the model was moved away from."""
        self._since = ReaderStatistics("", "", 0)
        self._counted = ReaderStatistics(store.name, store.backend, 0)
        self.move_to(device)

    @property
    def cache_bytes(self) -> int:
        """Budget of the row cache; 0 where the whole table is in RAM."""
        return 0 if self._whole is not None else self._budget.total

    def take_cache_memory(self) -> None:
        """Take the budget of the row cache from the kernel now, not record by record.

        For a GPU it is taken in any case.
        """
        if self._on_device is None:
            self._cache.take_memory()

    @torch.no_grad()
    def fill_cache(self) -> int:
        """Bring the most frequent records into the row cache, so that it needn't meet each first.

        By the counts kept with the table (`counts.py`). It takes about as long as reading as many
        bytes, so it is for processes that run for long, and to be called before anything else
        uses the reader. The statistics begin anew.

        Returns:
            How many records the cache has then; 0 without counts or without a cache.

        Raises:
            TableError: the counts or a record are damaged, or can't be read.
        """
        if not self.cache_bytes:
            return 0
        if self._on_device is not None:
            filled = self._on_device.fill_cache()
            self.reset_stats()
            return filled
        counts = read_counts(self.table)
        if counts is None:
            return 0
        ids = most_frequent(counts, self.cache_bytes // self.table.layout.stride)
        with late_progress("Filling the row cache", len(ids) * self.table.layout.stride) as advance:
            # The most frequent batch comes last, since the least recently used go first.
            for batch in torch.from_numpy(ids).flip(0).split(self._slot_batch):
                rows: Any = self.rows(batch.unsqueeze(0).to(self.device))
                rows.wait()
                del rows  # gives its slots back before the next batch takes some
                advance(len(batch) * self.table.layout.stride)
        self.reset_stats()
        return len(ids)

    def check(self) -> None:
        """Tell what went wrong on a device in steps whose end the host has seen.

        Raises:
            TableError: an id is outside of the table, or its record couldn't be read. What came
                out of that step is no numbers.
        """
        if self._on_device is not None:
            self._on_device.check()

    @property
    def device(self) -> torch.device:
        """Where it gives rows."""
        return self._decoding.device

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.table.folder

    # What is read depends on the data; torch.compile breaks its graph here once, at the entrance.
    @torch.compiler.disable
    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: nn.Module | None = None
    ) -> TokenRows:
        """The rows of token_ids [B, T] int64; reading has begun when this returns.

        Args:
            ready: have it finished, too.
            base_model: of no use here; a table knows its rows.

        Raises:
            TableError: an id is outside of the table's vocabulary, or reading can't begin.
        """
        self._require_open()
        if token_ids.device != self._decoding.device:
            self.move_to(token_ids.device)  # where the model was moved to
        if self._on_device is not None and not torch.is_grad_enabled():
            return self._on_device.rows(token_ids, ready)
        if torch.is_grad_enabled() or ready or self._whole is not None:
            rows = self._rows_in_memory(token_ids)
            if ready:
                rows.prepare()
            return rows
        rows_in_slots = None
        if token_ids.numel() <= 4 * self._slot_batch:
            rows_in_slots = self._rows_in_slots(token_ids)
        return rows_in_slots or self._streamed_rows(token_ids)

    def _rows_in_slots(self, token_ids: Tensor) -> MemoryRows | None:
        """Through the row cache; None for a batch of too many unique ids.

        In plain Python, which beats tensor operations for the few ids of a decoding step.
        """
        ids = token_ids.flatten().tolist()
        unique_ids, places = unique_in_order(ids)
        if not ids or len(unique_ids) > self._slot_batch:
            return None
        self._check_bounds(min(unique_ids), max(unique_ids))
        self._release_dropped()
        taken = self._cache.take(unique_ids)
        if taken is None:  # other batches hold the slots
            return None
        self.missed = frozenset(token_id for token_id, _ in taken.missing)
        self._count(len(ids), len(unique_ids), len(unique_ids) - len(taken.missing))
        batch = SlotBatch(self._filling, self._cache, taken)
        try:
            batch.begin()
            return self._rows_of_batch(batch, places, token_ids.shape)
        except BaseException:
            batch.abandon()
            raise

    def _rows_of_batch(self, batch: SlotBatch, places: list[int], shape: torch.Size) -> MemoryRows:
        return MemoryRows(
            self._decoding,
            self._slots,
            self._slot_matrices,
            batch.slots(),
            places,
            shape,
            self._clock,
            pending=batch if batch.is_pending else None,
            on_release=partial(self._dropped.append, batch),
        )

    def _release_dropped(self) -> None:
        while self._dropped:
            try:
                batch = self._dropped.popleft()
            except IndexError:  # another thread was faster
                return
            batch.release()

    def _rows_in_memory(self, token_ids: Tensor) -> MemoryRows:
        """Out of the whole table, or of memory of the batch's own: autograd may hold on to it."""
        unique_ids, index = self._unique(token_ids)
        if self._whole is not None:
            self.missed = frozenset()
            return MemoryRows(
                self._decoding,
                self._whole,
                self._whole_matrices,
                unique_ids,
                index.view(-1),
                index.shape,
                self._clock,
            )
        buffer = aligned_buffer(len(unique_ids) * self.table.layout.stride)
        buffer = buffer.reshape(len(unique_ids), self.table.layout.stride)
        records = torch.from_numpy(buffer)
        return MemoryRows(
            self._decoding,
            records,
            self._decoding.matrices(records),
            torch.arange(len(unique_ids)),
            index.view(-1),
            index.shape,
            self._clock,
            ThreadedRead(submit_read(self._thread, self._store.read, unique_ids.numpy(), buffer)),
        )

    def _streamed_rows(self, token_ids: Tensor) -> StreamedRows:
        unique_ids, index = self._unique(token_ids)
        self.missed = None
        return StreamedRows(
            self._decoding,
            self._store,
            self._thread,
            unique_ids.numpy(),
            index,
            self._clock,
            GROUP_BYTES,
            self._prompt_buffers,
        )

    def _unique(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unique ids on the host, and position -> place among them where the model is."""
        unique_ids, index = torch.unique(token_ids, return_inverse=True)
        unique_ids = unique_ids.cpu()
        if len(unique_ids):
            self._check_bounds(int(unique_ids[0]), int(unique_ids[-1]))
        self._count(token_ids.numel(), len(unique_ids), 0)
        return unique_ids, index

    def _check_bounds(self, low: int, high: int) -> None:
        check_bounds(low, high, self.table.layout.shape.vocab_size)

    def move_to(self, device: torch.device | str) -> None:
        """Give rows on another device from the next batch on.

        On CUDA a part of the row cache is there as well, see `CacheBudget`.
        """
        device = torch.device(device)
        lane = open_lane(device)
        self._leave_device()
        self._decoding = Decoding(
            self.table.layout, self._dtype, device if lane is None else lane.device
        )
        with torch.inference_mode(False):  # autograd may keep them, whoever opened the reader
            self._slot_matrices = self._decoding.matrices(self._slots)
            self._whole_matrices = (
                None if self._whole is None else self._decoding.matrices(self._whole)
            )
        self._on_device = None if lane is None else self._reader_on_device(lane)

    def _reader_on_device(self, lane: Lane) -> DeviceReader:
        return DeviceReader(
            self._decoding,
            self._store,
            self._records_on_device(lane),
            self._thread,
            self._clock,
            lane,
            self._count_on_device,
            GROUP_BYTES,
        )

    def _records_on_device(self, lane: Lane) -> DeviceRecords:
        if self._whole is not None:
            return HostRecords(self._whole.numpy(), lane.device)
        if self._store.name != "direct":
            log(f"A GPU reads a table that isn't in RAM by 'direct', not by {self._store.name!r}.")
        on_device, in_ram = self._budget.split(self.table.layout.table_bytes)
        return CachedRecords(
            self.table,
            lane.device,
            on_device,
            in_ram,
            verify_checksums=self._store.verify_checksums,
        )

    def stats(self) -> ReaderStatistics:
        """The counts since the reader was opened, or since `reset_stats`."""
        now, since = self._totals(), self._since
        values = {
            name: value - getattr(since, name) if isinstance(value, int | float) else value
            for name, value in asdict(now).items()
        }
        return ReaderStatistics(**{**values, "cache_bytes": self.cache_bytes})

    def reset_stats(self) -> None:
        """Count from zero."""
        self._since = self._totals()

    def _totals(self) -> ReaderStatistics:
        with self._lock:
            totals = ReaderStatistics(**asdict(self._counted))
        totals.bytes_read = self._store.bytes_read
        totals.read_seconds = self._store.seconds_reading
        totals.wait_seconds = self._clock.seconds
        for counts in (*self._counted_before, self._counts_on_device()):
            if counts is None:
                continue
            totals.ids_asked += counts.ids
            totals.ids_unique += counts.ids
            totals.cache_hits += counts.hot_hits + counts.ram_hits
            totals.bytes_read += counts.bytes_read
            totals.read_seconds += counts.read_seconds
        return totals

    def _count(self, asked: int, unique: int, hits: int) -> None:
        with self._lock:
            self._counted.batches += 1
            self._counted.ids_asked += asked
            self._counted.ids_unique += unique
            self._counted.cache_hits += hits

    def _count_on_device(self, asked: int, unique: int, found_there: bool) -> None:
        self.missed = None
        if found_there and self._counts_on_device() is not None:
            asked = unique = 0  # counted there
        self._count(asked, unique, 0)

    def _counts_on_device(self) -> CacheCounts | None:
        return None if self._on_device is None else self._on_device.counts()

    def _leave_device(self) -> None:
        counts = self._counts_on_device()
        if counts is not None:
            self._counted_before.append(counts)
        if self._on_device is not None:
            self._on_device.close()
            self._on_device = None

    def close(self) -> None:
        """Stop the reading thread and close the files; what was begun is read to its end."""
        self._closed = True
        self._thread.shutdown()
        self._leave_device()
        self._store.close()
        self._whole = self._whole_matrices = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TableReader":
        """A reader of its own over the same table: moving or closing one, or filling its cache,
        leaves the other as it is. A table in RAM is there once, since nobody writes to it."""
        self._require_open()
        return TableReader(
            self.table,
            self._store.reopened(),
            self._dtype,
            self.device,
            self._budget,
            self.rows_per_token,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """As the path of its table and the options that it was opened with."""
        self._require_open()
        table = replace(self.table, folder=self.folder.absolute())
        store = (self._store.name, self._store.verify_checksums)
        options = (self._dtype, self.device, self._budget, self.rows_per_token)
        return _reopen_reader, (table, *store, *options)

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(f"The reader of the table in {self.folder} is closed.")


def _reopen_reader(
    table: Table,
    store: str,
    verify_checksums: bool,
    dtype: torch.dtype,
    device: torch.device,
    cache: CacheBudget,
    rows_per_token: int,
) -> TableReader:
    """A reader that was pickled, in whatever process.

    Where its device isn't there it begins on the CPU; it follows the model's token ids anyway.

    Raises:
        TableError: the table is no longer there, or is another one.
    """
    table = reopen_table(table)
    opened = open_store(table, store, verify_checksums=verify_checksums, notify=log)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")
    return TableReader(table, opened, dtype, device, cache, rows_per_token)


def open_reader(
    folder: Path,
    *,
    num_layers: int,
    num_experts: int,
    row_size: int,
    fingerprint: str,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    rows_per_token: int = 1,
    device: torch.device | str = "cpu",
    store: str = "auto",
    cache: int | str | CacheBudget = 0,
    verify_checksums: bool = False,
    notify: Notify = log,
) -> TableReader:
    """Open a table for the model that was loaded from the folder around it.

    Args:
        folder: of the table.
        num_layers, num_experts, row_size: of the model: layers with lookup experts, experts of
            each, numbers in a row.
        fingerprint: of what the rows were made from, as the model knows it.
        dtype: what rows are decoded to; the model's.
        vocab_size: of the model; None: whatever the table has.
        rows_per_token: see `TableReader`.
        device: where rows are needed.
        store: `memory`, `mmap`, `direct`, `auto` or `auto:8GB`, see `open_store`.
        cache: budget of the row cache in bytes, or in words like `256MB`; 0 is off. It is RAM, with
            the records of the batch under way (up to `SLOT_BATCH` tokens) beside it; on a GPU half
            of it is the GPU's memory, or as much as is said behind a colon: `256MB:64MB`.
        verify_checksums: compare every record that is read with its checksum.
        notify: told which store was chosen and why, and what could not be had; default: a warning
            of the logger `lookup_experts`.

    Raises:
        TableError: the table is missing, damaged, or of another model.
    """
    budget = parse_cache(cache)  # before anything is opened
    table = open_table_of_model(
        folder,
        num_layers=num_layers,
        num_experts=num_experts,
        row_size=row_size,
        fingerprint=fingerprint,
        vocab_size=vocab_size,
    )
    return read_table(
        table,
        dtype,
        device,
        rows_per_token=rows_per_token,
        store=store,
        cache=budget,
        verify_checksums=verify_checksums,
        notify=notify,
    )


def read_table(
    table: Table,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    rows_per_token: int = 1,
    store: str = "auto",
    cache: int | str | CacheBudget = 0,
    verify_checksums: bool = False,
    notify: Notify = log,
) -> TableReader:
    """A reader of an open table; arguments as of `open_reader`.

    Raises:
        TableError: a shard can't be read, or is damaged.
    """
    budget = parse_cache(cache)
    opened = open_store(table, store, verify_checksums=verify_checksums, notify=notify)
    return TableReader(table, opened, dtype, device, budget, rows_per_token)


def open_table_of_model(
    folder: Path,
    *,
    num_layers: int,
    num_experts: int,
    row_size: int,
    fingerprint: str,
    vocab_size: int | None = None,
) -> Table:
    """The table of a model; arguments as of `open_reader`. No record is read.

    Raises:
        TableError: the table is missing, damaged, or of another model.
    """
    table = open_table(folder)
    vocab_size = vocab_size or table.layout.shape.vocab_size
    _check_match(table, TableShape(vocab_size, num_layers, num_experts, row_size), fingerprint)
    return table


def _check_match(table: Table, expected: TableShape, fingerprint: str) -> None:
    """Raise a `TableError` unless the table was made from this very model."""
    shape = table.layout.shape
    if shape != expected:
        raise TableError(f"{table.folder}: made for {shape}, the model needs {expected}.")
    if table.manifest.fingerprint != fingerprint:
        raise TableError(
            f"{table.folder}: this is the table of another model (fingerprint "
            f"{table.manifest.fingerprint[:12]}, the model's is {str(fingerprint)[:12]}). "
            "Put the table that was made with this model beside it, or make it anew."
        )
