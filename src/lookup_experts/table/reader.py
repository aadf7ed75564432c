"""Table form: the rows of a batch's tokens, read from a store.

`TableExperts` is the `ExpertSource` of an inference model. The token ids are known before the
first layer runs, so their records are asked for then, and a block waits for them only when it
needs them, after its attention.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lookup_experts.errors import TableError
from lookup_experts.model.experts import TokenRows
from lookup_experts.table.format import Table, TableShape, open_table
from lookup_experts.table.store import Store, aligned_buffer, open_store


@dataclass
class ReaderStatistics:
    """What a reader has done since it was opened or reset; times in seconds."""

    store: str
    backend: str
    batches: int = 0
    ids_asked: int = 0
    ids_unique: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    """Spent by the store, beside the model's work."""
    wait_seconds: float = 0.0
    """Spent by the model, waiting for records."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class TableExperts:
    """An `ExpertSource` that reads a table.

    Args:
        table: an open table.
        store: where its records are read from.
        dtype: what rows are decoded to; the model's.
        device: where rows are needed.
    """

    def __init__(
        self,
        table: Table,
        store: Store,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.table = table
        self._store = store
        self._dtype = dtype
        self._device = torch.device(device)
        self._buffers = BufferPool(table.layout.stride)
        self._thread = ThreadPoolExecutor(1, "table-reader")
        self._lock = threading.Lock()
        self._statistics = ReaderStatistics(store.name, store.backend)
        whole = store.whole()
        self._whole = None if whole is None else torch.from_numpy(whole)

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.table.folder

    # What is read depends on the data; torch.compile breaks its graph here once, at the entrance.
    @torch.compiler.disable
    def rows(self, token_ids: Tensor, ready: bool = False) -> TokenRows:
        """The rows of token_ids [B, T] int64; reading has begun when this returns.

        Args:
            ready: have it finished, too.

        Raises:
            TableError: an id is outside of the table's vocabulary.
        """
        if self._whole is not None:
            self._check_range(token_ids)
            self._count(token_ids.numel(), 0)
            return RecordRows(self, token_ids, self._whole, None)
        unique_ids, index = torch.unique(token_ids, return_inverse=True)
        host_ids = unique_ids.cpu()
        self._check_range(host_ids)
        self._count(token_ids.numel(), len(host_ids))
        records = self._buffers.take(len(host_ids), reuse=not torch.is_grad_enabled())
        reading = self._thread.submit(self._store.read, host_ids.numpy(), records.array)
        rows = RecordRows(self, index, torch.from_numpy(records.array), reading, records)
        if ready:
            rows.wait()
        return rows

    def decode(self, records: Tensor, layer: int) -> Tensor:
        """One layer of uint8 [U, stride] -> [U, N, d]; a view where nothing is to be converted."""
        layout = self.table.layout
        shape = layout.shape
        codes = records[:, layout.layer_slice(layer)].to(self._device)
        return layout.encoding.decode(codes, shape.num_experts, shape.hidden_size, self._dtype)

    def move_to(self, device: torch.device | str) -> None:
        """Decode to another device from the next batch on."""
        self._device = torch.device(device)

    def wait(self, reading: "Future[None]") -> None:
        """Let the model wait for its records; an error of the reading thread is raised here."""
        started_at = time.perf_counter()
        reading.result()
        with self._lock:
            self._statistics.wait_seconds += time.perf_counter() - started_at

    def stats(self) -> ReaderStatistics:
        """The counts since the reader was opened, or since `reset_stats`."""
        with self._lock:
            counted = ReaderStatistics(**asdict(self._statistics))
        counted.bytes_read = self._store.bytes_read - self._bytes_before
        counted.read_seconds = self._store.seconds_reading - self._seconds_before
        return counted

    def reset_stats(self) -> None:
        """Count from zero."""
        with self._lock:
            self._statistics = ReaderStatistics(self._store.name, self._store.backend)
        self._bytes_before = self._store.bytes_read
        self._seconds_before = self._store.seconds_reading

    _bytes_before = 0
    _seconds_before = 0.0

    def close(self) -> None:
        """Stop the reading thread and close the files."""
        self._thread.shutdown()
        self._store.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TableExperts":
        return self  # a copy of a model reads the same table

    def _count(self, asked: int, unique: int) -> None:
        with self._lock:
            self._statistics.batches += 1
            self._statistics.ids_asked += asked
            self._statistics.ids_unique += unique

    def _check_range(self, ids: Tensor) -> None:
        if ids.numel() == 0 or ids.device.type != "cpu":
            return
        low, high = (int(bound) for bound in ids.aminmax())
        vocab_size = self.table.layout.shape.vocab_size
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise TableError(
                f"Token id {wrong} is outside of the table's vocabulary (0 to {vocab_size - 1}). "
                "Is this the tokenizer that belongs to the model?"
            )


class RecordRows:
    """The rows of one batch, decoded layer by layer from its records.

    It holds the buffer of its records; the buffer is used again once nobody holds the rows.
    """

    def __init__(
        self,
        reader: TableExperts,
        index: Tensor,
        records: Tensor,
        reading: "Future[None] | None",
        buffer: "Buffer | None" = None,
    ) -> None:
        self.index = index
        self._reader = reader
        self._records = records
        self._reading = reading
        self._buffer = buffer

    def layer(self, layer: int) -> Tensor:
        """[U, N, d]; waits for the records if they aren't there yet."""
        if self._reading is not None:
            self.wait()
        return self._reader.decode(self._records, layer)

    def wait(self) -> None:
        """Return when the records are there."""
        if self._reading is not None:
            self._reader.wait(self._reading)
            self._reading = None

    def __del__(self) -> None:
        buffer, reading = self._buffer, self._reading
        if buffer is None:
            return
        if reading is None or reading.done():
            buffer.give_back()
        else:  # nobody waited: a forward pass that failed; the read must not meet a new owner
            reading.add_done_callback(lambda _: buffer.give_back())


class BufferPool:
    """Aligned record buffers that are used again.

    Args:
        stride: bytes per record.
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._lock = threading.Lock()
        self._free: list[np.ndarray] = []

    def take(self, num_records: int, reuse: bool) -> "Buffer":
        """A buffer of [num_records, stride].

        Args:
            reuse: False where autograd may hold on to it: then it is new, and never given again.
        """
        num_bytes = max(1, num_records) * self._stride
        memory = self._take_free(num_bytes) if reuse else None
        if memory is None:
            # Powers of two, so that batches of many sizes share few buffers.
            memory = aligned_buffer(1 << (num_bytes - 1).bit_length() if reuse else num_bytes)
        array = memory[: num_records * self._stride].reshape(num_records, self._stride)
        return Buffer(array, memory, self if reuse else None)

    def give_back(self, memory: np.ndarray) -> None:
        """Keep the largest buffer for the next batch; a smaller one is let go."""
        with self._lock:
            self._free = [max((memory, *self._free), key=len)]

    def _take_free(self, num_bytes: int) -> np.ndarray | None:
        with self._lock:
            if self._free and len(self._free[0]) >= num_bytes:
                return self._free.pop()
            return None


@dataclass
class Buffer:
    """A batch's share of a pool's memory."""

    array: np.ndarray
    memory: np.ndarray
    pool: BufferPool | None

    def give_back(self) -> None:
        """Let the next batch have the memory; once."""
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.give_back(self.memory)


def open_reader(
    folder: Path,
    model: Any,
    store: str = "auto",
    verify_checksums: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> TableExperts:
    """Open the table of an inference folder for the model that was loaded from it.

    Args:
        folder: the inference folder; the table is in its folder `table`.
        model: an attached model in table form.
        store: `memory`, `mmap`, `direct` or `auto`.
        verify_checksums: compare every record that is read with its checksum.
        notify: told which store was chosen and why.

    Raises:
        TableError: the table is missing, damaged, or of another model.
    """
    table = open_table(folder / "table")
    check_match(table, model)
    embedding: nn.Module = model.get_input_embeddings()
    weight = next(embedding.parameters())
    opened = open_store(table, store, verify_checksums=verify_checksums, notify=notify)
    return TableExperts(table, opened, weight.dtype, weight.device)


def check_match(table: Table, model: Any) -> None:
    """Raise a `TableError` unless the table was folded from this very model."""
    settings = model.lookup_settings
    shape = table.layout.shape
    expected = TableShape(
        shape.vocab_size, len(settings.layers), settings.num_experts, model.config.hidden_size
    )
    if shape != expected:
        raise TableError(f"{table.folder}: made for {shape}, the model needs {expected}.")
    if table.manifest.fingerprint != settings.fingerprint:
        raise TableError(
            f"{table.folder}: this is the table of another model (fingerprint "
            f"{table.manifest.fingerprint[:12]}, the model's is {str(settings.fingerprint)[:12]}). "
            "Put the table that was built with this model beside it, or fold the model again."
        )
