"""What tests of reading share: every way to read, and the rows that must come out."""

import errno
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from lookup_experts.model.rows import TokenRows, mix_reference
from lookup_experts.model.wiring import routed_experts
from lookup_experts.table import reader as reader_module
from lookup_experts.table import uring
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.opening import Table
from lookup_experts.table.reader import TableReader
from lookup_experts.table.store import RecordStore
from lookup_experts.table.store_choice import open_store
from lookup_experts.table.uring import Ring

WAYS = ("memory", "mmap", "io_uring", "threads", "page cache")
"""The stores, `direct` in each way that it may read."""

ONE_BLOCK = {"num_layers": 2, "num_experts": 2, "row_size": 512, "encoding": "float16"}
"""A record of 4096 bytes."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def has_ring() -> bool:
    try:
        Ring(2).close()
    except OSError:
        return False
    return True


needs_ring = pytest.mark.skipif(not has_ring(), reason="no io_uring here")


def ways_here() -> list[str]:
    return [way for way in WAYS if way != "io_uring" or has_ring()]


@contextmanager
def open_by(way: str, table: Table, verify_checksums: bool = False) -> Iterator[RecordStore]:
    """A store over `table` that reads in this way."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "threads":
            patch.setattr(uring, "_syscall", _refuse)
        if way == "page cache":
            patch.setattr(os, "open", _open_without_direct)
        kind = way if way in ("memory", "mmap") else "direct"
        store = open_store(
            table, kind, verify_checksums=verify_checksums, notify=lambda message: None
        )
    with store:
        yield store


def _refuse(*_: int) -> int:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


_real_open = os.open


def _open_without_direct(path, flags, *rest, **named):
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return _real_open(path, flags, *rest, **named)


@contextmanager
def open_reader_by(
    way: str,
    table: Table,
    dtype: torch.dtype | None = None,
    cache_bytes: int = 0,
    verify_checksums: bool = False,
) -> Iterator[TableReader]:
    """A reader over `table`, of the stored dtype where none is given."""
    dtype = dtype or table.layout.encoding.torch_dtype or torch.float32
    with open_by(way, table, verify_checksums) as store:
        reader = TableReader(table, store, dtype, cache=cache_bytes)
        yield reader
        reader.close()


class Expected:
    """The rows of a table by the book: decoded from its bytes, without a reader."""

    def __init__(self, table: Table, records: np.ndarray, dtype: torch.dtype | None = None) -> None:
        self.layout = table.layout
        self.dtype = dtype or table.layout.encoding.torch_dtype or torch.float32
        self._records = torch.from_numpy(records)

    @property
    def num_layers(self) -> int:
        return self.layout.shape.num_layers

    def layer(self, layer: int, ids: Tensor) -> Tensor:
        """[B, T, N, d]."""
        shape, encoding = self.layout.shape, self.layout.encoding
        codes = self._records[ids.flatten()][:, self.layout.layer_slice(layer)].clone()
        rows = encoding.decode(codes, shape.num_experts, shape.row_size, self.dtype)
        return rows.view(*ids.shape, shape.num_experts, shape.row_size)

    def weights(self, ids: Tensor, layer: int) -> Tensor:
        """Some router weights, [B·T, N]."""
        generator = torch.Generator().manual_seed(layer)
        drawn = torch.rand(ids.numel(), self.layout.shape.num_experts, generator=generator)
        return drawn.to(self.dtype)

    def mixed(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        """[B·T, d]."""
        rows = self.layer(layer, ids).flatten(0, -3)
        return mix_reference(rows, torch.arange(len(rows)), weights)

    def block(self, layer: int, ids: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Some hidden states [B, T, d], a router [N, d] and an FFN's output [B, T, d]; and that
        output with what the experts add."""
        shape = self.layout.shape
        generator = torch.Generator().manual_seed(layer)
        size = (2, *ids.shape, shape.row_size)
        states, output = torch.randn(size, generator=generator).to(self.dtype).unbind()
        router = torch.randn(shape.num_experts, shape.row_size, generator=generator)
        router = (router / shape.row_size**0.5).to(self.dtype)
        weights = (states.float() @ router.float().T).softmax(dim=-1)
        mixed = torch.einsum("...nd,...n->...d", self.layer(layer, ids).float(), weights)
        return (states, router, output), (output.float() + mixed).to(self.dtype)

    def assert_right(
        self, rows: TokenRows, ids: Tensor, layers: Sequence[int] | None = None
    ) -> None:
        """Whether these are the rows of `ids` [B, T], bit for bit, their mixes, and all of a block
        where the rows can do that."""
        assert rows.index.shape == ids.shape
        for layer in range(self.num_layers) if layers is None else layers:
            if hasattr(rows, "route_mix_add"):  # before anything else brings the layer
                given, expected = self.block(layer, ids)
                found = rows.route_mix_add(layer, *given)
                if found is not None:
                    self.assert_close(found, expected)
            assert torch.equal(rows.layer(layer)[rows.index], self.layer(layer, ids))
            weights = self.weights(ids, layer)
            self.assert_close(rows.mix(layer, weights), self.mixed(layer, ids, weights))
        if not getattr(rows, "in_parts", True):  # what an embedding asks for
            every = [self.layer(layer, ids) for layer in range(self.num_layers)]
            found = rows.every_layer()[rows.index]
            assert torch.equal(found, torch.stack(every, dim=-3))

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        assert found.dtype == self.dtype
        tolerance = _TOLERANCE[self.dtype]
        scale = 1 + float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def empty_slots(num_slots: int, stride: int) -> np.ndarray:
    """Aligned memory for records, full of rubbish."""
    memory = aligned_buffer(num_slots * stride).reshape(num_slots, stride)
    memory[:] = 0xAA
    return memory


def open_files() -> int:
    """Of this process, without those that only garbage of earlier tests still holds."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    """Memory of this process, without what it maps from files (other processes share that)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


@contextmanager
def open_on(lane, table, way="threads", dtype=None, cache_bytes=0, group_bytes=2**24):
    """A reader whose device is at the end of this lane; what is missing there is read by a thread
    of the test."""
    from miss_worker_here import workers_here  # which is built on this file's stores

    dtype = dtype or table.layout.encoding.torch_dtype or torch.float32
    with pytest.MonkeyPatch.context() as patch, open_by(way, table) as store, workers_here(patch):
        patch.setattr(reader_module, "open_lane", lambda device: lane)
        patch.setattr(reader_module, "GROUP_BYTES", group_bytes)
        reader = TableReader(table, store, dtype, cache=cache_bytes)
        try:
            yield reader
        finally:
            reader.close()


class RowsInTraining:
    """The rows of a model in training form, each layer from its own experts."""

    def __init__(self, model: Any, token_ids: Tensor) -> None:
        self._rows = model.expert_source.rows(token_ids, base_model=model.base_model)
        self._experts = routed_experts(model)
        self.index = self._rows.index

    def layer(self, layer: int) -> Tensor:
        return self._rows.layer(layer, self._experts[layer])


@st.composite
def batches(draw, vocab_size: int):
    """Token ids [B, T], around the sizes where the way changes; some with few unique ones."""
    length = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 255, 256, 257]))
    most = draw(st.sampled_from([1, min(vocab_size, 5), vocab_size]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    ids = torch.from_numpy(random.integers(0, most, length))
    return ids.view(-1, 3) if length % 3 == 0 else ids.view(1, -1)
