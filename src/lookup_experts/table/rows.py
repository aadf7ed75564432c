"""The rows of one batch in table form, in the ways that they can lie in memory.

`MemoryRows`: records lie whole in memory, in slots of the row cache, in the whole table, or in
memory of the batch's own. For decoding, for tables in RAM, and under autograd.

`StreamedRows`: records are read a few layers at a time into two buffers. For prompts: memory is
bounded, and reading goes ahead of the compute.

Both are `TokenRows` (`model/rows.py`). Float encodings are mixed straight out of the records;
the others are decoded layer by layer, once per unique id.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.model.rows import mix
from lookup_experts.table.format import BLOCK
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.reading_thread import submit_read
from lookup_experts.table.store import PendingRead, Store

DECODED_BYTES = 16 * 2**20
"""Encoded records are decoded for all layers at once up to this size, beyond it layer by layer."""
WHOLE_BYTES = 2 * BLOCK
"""Records up to this size are small; see `plan_groups`."""
MODE_SUM = 0
"""Of `torch.embedding_bag`."""


@dataclass(frozen=True)
class Decoding:
    """How records become rows."""

    layout: RecordLayout
    dtype: torch.dtype
    """Of the rows; the model's."""
    device: torch.device
    """Where the rows are needed."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one expert's row in a float record."""
        return self.layout.shape.row_size * self.dtype.itemsize

    @property
    def is_view(self) -> bool:
        """Whether rows are views into the records."""
        return self.layout.encoding.torch_dtype == self.dtype and self.device.type == "cpu"

    def matrices(self, records: Tensor) -> tuple[Tensor, ...] | None:
        """Records uint8 [M, stride] as what they are, matrices of rows [.., r] of this dtype; None
        where they are no such thing.

        One for each layer, which begins where the layer does in the first record. So a token's
        rows have the same numbers in all of them, `rows_per_record` from record to record.
        """
        if not self.is_view or records.shape[1] % self.row_bytes:
            return None
        shape = self.layout.shape
        flat = records.view(self.dtype).reshape(-1, shape.row_size)
        return tuple(flat[layer * shape.num_experts :] for layer in range(shape.num_layers))

    @property
    def rows_per_record(self) -> int:
        """Rows from one record to the next in `matrices`."""
        return self.layout.stride // self.row_bytes

    def decoded_bytes(self, num_ids: int) -> int:
        """What all rows of so many records take when they are decoded."""
        shape = self.layout.shape
        return num_ids * shape.num_layers * shape.num_experts * self.row_bytes

    def decode(self, codes: Tensor) -> Tensor:
        """One layer of records, uint8 [U, layer_bytes] -> [U, N, r]."""
        return self.layout.encoding.decode(*self._of_layer(codes))

    def decode_records(self, records: Tensor) -> Tensor:
        """All layers of records, uint8 [U, stride] -> [U, L, N, r]."""
        shape = self.layout.shape
        codes = records[:, : self.layout.record_bytes].reshape(-1, self.layout.layer_bytes)
        return self.decode(codes).view(-1, shape.num_layers, shape.num_experts, shape.row_size)

    def decode_unscaled(self, codes: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Encoding.decode_unscaled`; of one layer of records, uint8 [U, layer_bytes]."""
        return self.layout.encoding.decode_unscaled(*self._of_layer(codes))

    def _of_layer(self, codes: Tensor) -> tuple[Tensor, int, int, torch.dtype]:
        shape = self.layout.shape
        moved = codes.to(self.device, non_blocking=True)
        return moved, shape.num_experts, shape.row_size, self.dtype


class WaitClock:
    """Adds up the time that models spent waiting for records."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wait(self, pending: PendingRead) -> None:
        """Wait and count."""
        started_at = time.perf_counter()
        try:
            pending.wait()
        finally:
            self.seconds += time.perf_counter() - started_at


class MemoryRows:
    """Rows of records that lie, or will lie, whole in memory.

    Args:
        decoding: how records become rows.
        memory: uint8 [M, stride] on the CPU.
        matrices: `decoding.matrices(memory)`, which needn't be found out at every step.
        slots: U numbers: which rows of `memory` are the records of the unique ids.
        places: B·T numbers, position -> place in `slots`; a list if `slots` is one, for the few
            of a decoding step, else int64.
        shape: (B, T).
        clock: counts the waiting.
        pending: what brings the records; None if they are there.
        on_release: called when nobody holds the rows any more; the records may then be
            overwritten.
    """

    in_parts = False

    def __init__(
        self,
        decoding: Decoding,
        memory: Tensor,
        matrices: tuple[Tensor, ...] | None,
        slots: Tensor | list[int],
        places: Tensor | list[int],
        shape: torch.Size,
        clock: WaitClock,
        pending: PendingRead | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        self._decoding = decoding
        self._memory = memory
        self._slots = slots
        self._places = places
        self._shape = shape
        self._pending = pending
        self._clock = clock
        self._borrowed = on_release is not None
        if on_release is not None:
            weakref.finalize(self, on_release).atexit = False
        self._matrices = matrices
        """Of each layer; None as long as the records are not decoded."""
        self._only: tuple[Tensor, ...] | None = None
        """The rows [N, r] of each layer, for one position in bfloat16."""
        if matrices is not None:
            self._lay_out(matrices, _select(slots, places), decoding.rows_per_record)

    @property
    def row_size(self) -> int:
        """See `EmbeddingRows.row_size`."""
        return self._decoding.layout.shape.row_size

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return len(self._places)

    @property
    def index(self) -> Tensor:
        """See `TokenRows.index`."""
        places = torch.as_tensor(self._places, dtype=torch.int64, device=self._decoding.device)
        return places.view(self._shape)

    def _lay_out(
        self, matrices: tuple[Tensor, ...], records: Tensor | list[int], rows_per_record: int
    ) -> None:
        """Prepare `mix` straight out of the layers' matrices: which rows each position adds up.

        Args:
            records: B·T numbers: which record is the position's.
            rows_per_record: rows of a matrix from one record to the next.
        """
        num_experts = self._decoding.layout.shape.num_experts
        device = matrices[0].device
        if len(records) == 1 and matrices[0].dtype == torch.bfloat16 and device.type == "cpu":
            # A small product is begun sooner than a sum of bags. Not in float32, where it would
            # add up in another order than the experts in training form do.
            first = int(records[0]) * rows_per_record
            self._only = tuple(matrix.narrow(0, first, num_experts) for matrix in matrices)
            return
        self._starts, experts = bag_pattern(len(records), num_experts, device)
        first_rows = torch.as_tensor(records, device=device) * rows_per_record
        self._bags = (first_rows.unsqueeze(1) + experts).view(-1)

    def _decode_at_once(self) -> None:
        """Decode all layers together: for a few records that is hardly more work than one layer,
        and a layer's own operations are then as few as with floats."""
        layout = self._decoding.layout
        shape = layout.shape
        slots = torch.as_tensor(self._slots)
        records = self._memory.index_select(0, slots)[:, : layout.record_bytes]
        layers = records.view(len(slots), shape.num_layers, layout.layer_bytes).transpose(0, 1)
        rows = self._decoding.decode(layers.reshape(-1, layout.layer_bytes))
        rows_per_layer = len(slots) * shape.num_experts
        matrices = rows.reshape(shape.num_layers, rows_per_layer, shape.row_size)
        self._matrices = matrices.unbind()
        self._lay_out(self._matrices, self._places, shape.num_experts)

    def wait(self) -> None:
        """Return when the records are there."""
        if self._pending is not None:
            self._clock.wait(self._pending)
            self._pending = None  # not before: rows that could not be read stay an error

    def prepare(self) -> None:
        """Wait for the records, and decode them if they are few."""
        self.wait()
        num_ids = len(self._slots)
        if self._matrices is None and self._decoding.decoded_bytes(num_ids) <= DECODED_BYTES:
            self._decode_at_once()

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.layer`."""
        self.wait()
        codes = self._memory[:, self._decoding.layout.layer_slice(layer)]
        return self._decoding.decode(codes.index_select(0, torch.as_tensor(self._slots)))

    def every_layer(self) -> Tensor:
        """See `EmbeddingRows.every_layer`."""
        self.wait()
        records = self._memory.index_select(0, torch.as_tensor(self._slots))
        return self._decoding.decode_records(records)

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        # Autograd may keep the rows longer than the records stay; so it gets a copy.
        if weights.requires_grad and self._borrowed:
            return mix(self.layer(layer), self.index.view(-1), weights)
        if self._pending is not None or self._matrices is None:
            self.prepare()
        if self._only is not None:
            return torch.mm(weights.to(torch.bfloat16), self._only[layer])
        if self._matrices is None:
            return mix(self.layer(layer), self.index.view(-1), weights)
        matrix = self._matrices[layer]
        weights = weights if weights.dtype == matrix.dtype else weights.to(matrix.dtype)
        # Not by way of `torch.nn.functional`, whose checks take longer than a small sum.
        total, *_ = torch.embedding_bag(
            matrix,
            self._bags,
            self._starts,
            False,
            MODE_SUM,
            False,
            weights.view(-1),
        )
        return total

    def route_mix_add(
        self, layer: int, hidden_states: Tensor, router: Tensor, output: Tensor
    ) -> Tensor | None:
        """See `FusedRows.route_mix_add`; for one position in bfloat16 alone."""
        if len(self._places) != 1:
            return None
        if self._pending is not None or self._matrices is None:
            self.prepare()
        if self._only is None:
            return None
        rows = self._only[layer]
        if (
            not (hidden_states.dtype == router.dtype == output.dtype == rows.dtype)
            or not (hidden_states.is_cpu and router.is_cpu and output.is_cpu)
            or not (hidden_states.dim() == output.dim() == 3 and output.shape[2] == rows.shape[1])
        ):
            return None
        # [1, 1, d] all along: no view is made of what comes in or goes out.
        weights = F.linear(hidden_states, router).softmax(dim=-1)
        return torch.baddbmm(output, weights, rows.unsqueeze(0))


def _select(slots: Tensor | list[int], places: Tensor | list[int]) -> Tensor | list[int]:
    """`slots[places]`"""
    if isinstance(slots, Tensor):
        return slots[torch.as_tensor(places)]
    return [slots[place] for place in places]


@lru_cache(maxsize=16)
def bag_pattern(
    num_positions: int, num_experts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each position's rows begin in a flat list of rows, int64 [B·T], and the rows of one
    position, int64 [N]."""
    with torch.inference_mode(False):
        starts = torch.arange(0, num_positions * num_experts, num_experts, device=device)
        return starts, torch.arange(num_experts, device=device)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are read together, and the bytes of a record that hold them."""

    layers: range
    start: int
    stop: int


def plan_groups(layout: RecordLayout, num_ids: int, group_bytes: int) -> list[LayerGroup]:
    """Neighbouring layers in groups of about `group_bytes` for `num_ids` ids.

    The first group is one layer, since the model waits for it; none is less. Small records that
    are no more than that together are one group: the disk gives whole blocks, and would have to
    give theirs once more for each part.
    """
    num_layers = layout.shape.num_layers
    if layout.stride <= WHOLE_BYTES and num_ids * layout.stride <= group_bytes:
        return [LayerGroup(range(num_layers), 0, layout.stride)]
    size = max(1, min(num_layers, group_bytes // max(1, num_ids * layout.layer_bytes)))
    bounds = [0, *range(1, num_layers, size), num_layers]
    groups = []
    for first, end in pairwise(bounds):
        start, stop = first * layout.layer_bytes, end * layout.layer_bytes
        if layout.is_whole_blocks:  # then so are the groups, which are read without a copy
            start, stop = start // BLOCK * BLOCK, -(-stop // BLOCK) * BLOCK
        groups.append(LayerGroup(range(first, end), start, stop))
    return groups


class PromptBuffers:
    """The two buffers of a streamed prompt, kept for the next one.

    Memory that the kernel hands out anew is zeroed page by page, which takes about as much of the
    processor's time as the reading itself. One pair is kept; prompts at the same time get pairs of
    their own.

    Args:
        most_bytes: of each buffer that is kept. So much is asked for in any case, but pages that
            nothing is read into take no memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: deque[list[np.ndarray]] = deque(maxlen=1)

    def take(self, num_bytes: int) -> list[np.ndarray]:
        """Two buffers, uint8, of at least so many bytes each; nobody else has them."""
        try:
            buffers = self._kept.pop()
        except IndexError:
            buffers = []
        if buffers and num_bytes <= len(buffers[0]):
            return buffers
        return [aligned_buffer(max(num_bytes, self._most_bytes)) for _ in range(2)]

    def give_back(self, buffers: list[np.ndarray]) -> None:
        """Whoever took them is done. Takes no lock: garbage collection may come here anywhere."""
        if len(buffers[0]) <= self._most_bytes:
            self._kept.append(buffers)


class StreamedRows:
    """Rows of a long prompt: groups of layers are read ahead of the compute into two buffers.

    Blocks ask for layers in order; asking for an earlier one starts again from there.

    Args:
        decoding: how records become rows.
        store: where records are read from, in parts.
        thread: reads one group after the other.
        ids: int64 [U], unique.
        index: int64 [B, T], position -> place in `ids`.
        clock: counts the waiting.
        group_bytes: what each of the two buffers may take.
        buffers: where they come from, and go when nobody holds the rows any more.
    """

    in_parts = True

    def __init__(
        self,
        decoding: Decoding,
        store: Store,
        thread: Executor,
        ids: np.ndarray,
        index: Tensor,
        clock: WaitClock,
        group_bytes: int,
        buffers: PromptBuffers,
    ) -> None:
        self.index = index
        self._decoding = decoding
        self._store = store
        self._thread = thread
        self._ids = ids
        self._clock = clock
        self._groups = plan_groups(decoding.layout, len(ids), group_bytes)
        self._group_of = [number for number, group in enumerate(self._groups) for _ in group.layers]
        widest = max(group.stop - group.start for group in self._groups)
        pair = buffers.take(len(ids) * widest)
        self._buffers = [buffer[: len(ids) * widest] for buffer in pair]
        # A read under way holds the rows, so it is over by then.
        weakref.finalize(self, buffers.give_back, pair).atexit = False
        # A part of a record doesn't tell whether it is intact; whole ones are checked when read.
        parts_of = ids if len(self._groups) > 1 else ids[:0]
        self._intact = submit_read(thread, store.check, parts_of)
        self._reading: dict[int, Future[np.ndarray]] = {}
        self._start_from(0)

    def _start_from(self, group: int) -> None:
        """Read this group and the next; whatever else is being read comes to its end first."""
        for future in self._reading.values():
            future.exception()
        self._reading = {}
        self._current = group
        self._read_ahead(group)
        self._read_ahead(group + 1)

    def _read_ahead(self, number: int) -> None:
        if number < len(self._groups):
            self._reading[number] = submit_read(self._thread, self._read, number)

    def _read(self, number: int) -> np.ndarray:
        self._intact.result()  # read by this thread before
        group = self._groups[number]
        width = group.stop - group.start
        out = self._buffers[number % 2][: len(self._ids) * width].reshape(-1, width)
        self._store.read(self._ids, out, group.start)
        return out

    @property
    def row_size(self) -> int:
        """See `EmbeddingRows.row_size`."""
        return self._decoding.layout.shape.row_size

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return self.index.numel()

    def wait(self) -> None:
        """Nothing can be had ready beforehand: reading goes on while the model computes."""

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.layer`; never a view of a buffer, which is soon read into again."""
        rows = self._decoding.decode(self._codes(layer))
        return rows.clone() if self._decoding.is_view else rows

    def _codes(self, layer: int) -> Tensor:
        """The layer of the records, uint8 [U, layer_bytes]; right until another is asked for."""
        number = self._group_of[layer]
        if number != self._current:
            if number != self._current + 1:
                self._start_from(number)
            else:
                self._reading.pop(self._current)
                self._current = number
                self._read_ahead(number + 1)  # into the buffer of the group that is done with
        future = self._reading[number]
        if not future.done():
            self._clock.wait(_FutureWait(future))
        records = torch.from_numpy(future.result())
        layout, start = self._decoding.layout, self._groups[number].start
        part = layout.layer_slice(layer)
        return records[:, part.start - start : part.stop - start]

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        index = self.index.view(-1)
        if weights.requires_grad:
            return mix(self.layer(layer), index, weights)
        codes = self._codes(layer)
        unscaled = self._decoding.decode_unscaled(codes)
        if unscaled is None:
            return mix(self._decoding.decode(codes), index, weights)
        rows, factors = unscaled
        return mix(rows, index, weights * factors.index_select(0, index))


class _FutureWait:
    """A future as a `PendingRead`; its error, if any, is for who asks for the result."""

    def __init__(self, future: "Future[np.ndarray]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.exception()
