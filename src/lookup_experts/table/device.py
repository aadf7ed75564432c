"""Table form where the model runs on a GPU: the row cache is there, the table is not.

`DeviceReader` does on a device what `TableExperts` does in RAM. The token ids come to the host,
once and by themselves (`Lane.to_host`); the host knows which records lie in slots on the device,
reads the others and queues their copies beside the compute (`transfer.py`). Blocks mix straight
out of encoded records (`mixing.py`). Nothing else lets the host wait for the device.

What a compiled graph reads has fixed addresses and shapes: the slots, and three rows of numbers
for each shape of batch. Its entrance runs outside of the graph and brings everything first
(`ready`). The numbers are a new small tensor each time, which a graph copies to its own place:
were they one tensor for all batches, rows that somebody still holds would turn into others'.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn

from lookup_experts.model.rows import Addition, TokenRows, mix
from lookup_experts.table.additions import StepRecords
from lookup_experts.table.batch import SlotBatch, check_bounds, unique_in_order
from lookup_experts.table.cache import SlotCache
from lookup_experts.table.device_prompt import PromptRows
from lookup_experts.table.lanes import Lane, Mark
from lookup_experts.table.mixing import decode_and_mix, prepare
from lookup_experts.table.rows import Decoding, WaitClock
from lookup_experts.table.store import Store
from lookup_experts.table.transfer import PinnedRing, Transfer, Transfers

Count = Callable[[int, int, frozenset[int] | None], None]
"""Told (ids asked, unique ids, those among them that the cache didn't have) of every batch; None
for a batch that went past the cache."""


class DeviceRows:
    """Rows of records that lie, or will lie, whole on the device.

    Args:
        decoding: how records become rows.
        memory: uint8 [M, stride] on the device.
        numbers: int64 [3, B·T] on the device: for each position its record's place in `memory`,
            and its token id's place among the unique ones; and the place in `memory` of each
            unique id, with zeros behind them.
        num_ids: how many unique ids there are.
        shape: (B, T).
        arrival: what brings the records; None if they are there.
        is_step: whether positions are so few that a block's part is best done by `StepRecords`.
    """

    def __init__(
        self,
        decoding: Decoding,
        memory: Tensor,
        numbers: Tensor,
        num_ids: int,
        shape: torch.Size,
        arrival: "SlotArrival | None",
        is_step: bool,
    ) -> None:
        self._decoding, self._memory, self._arrival = decoding, memory, arrival
        self._numbers, self._num_ids, self._shape = numbers, num_ids, shape
        self._record_of_position = numbers[0]
        self._step = None
        if is_step:
            self._step = StepRecords(
                decoding.layout, decoding.dtype, memory, numbers[0], numbers.shape[1]
            )

    @property
    def index(self) -> Tensor:
        """See `TokenRows.index`; made when it is asked for, which a step of decoding never does."""
        return self._numbers[1].view(self._shape)

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return self._record_of_position.numel()

    def wait(self) -> None:
        """Return when the model's queue waits for all records, and the host for none."""
        if self._arrival is not None:
            self._arrival.lead(self._decoding.layout.shape.num_layers - 1)
            self._arrival = None

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.layer`."""
        if self._arrival is not None:
            self._arrival.lead(layer)
        layout = self._decoding.layout
        record_of_id = self._numbers[2, : self._num_ids]
        codes = self._memory[:, layout.layer_slice(layer)].index_select(0, record_of_id)
        return self._decoding.decode(codes)

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        if weights.requires_grad:
            return mix(self.layer(layer), self.index.view(-1), weights)
        if self._arrival is not None:
            self._arrival.lead(layer)
        layout = self._decoding.layout
        return decode_and_mix(
            self._memory,
            self._record_of_position,
            weights,
            layout.encoding,
            layout.shape.row_size,
            layer * layout.layer_bytes,
            self._decoding.dtype,
        )

    def route_mix_add(
        self, layer: int, hidden_states: Tensor, router: Tensor, output: Tensor
    ) -> Tensor | None:
        """See `FusedRows.route_mix_add`."""
        if self._step is None:
            return None
        if self._arrival is not None:
            self._arrival.lead(layer)
        return self._step.route_mix_add(layer, hidden_states, router, output)

    def begin_routed(
        self, layer: int, hidden_states: Tensor, router: Tensor, out_proj: Tensor | None
    ) -> Addition | None:
        """See `StepRows.begin_routed`; None as long as records arrive, for which the FFN needn't
        wait."""
        if self._step is None or self._arrival is not None:
            return None
        return self._step.begin_routed(layer, hidden_states, router, out_proj)

    def begin_gated(
        self,
        layer: int,
        hidden_states: Tensor,
        gate: Tensor,
        out_proj: Tensor,
        norm: Tensor,
        epsilon: float,
    ) -> Addition | None:
        """See `StepRows.begin_gated`; None as long as records arrive."""
        if self._step is None or self._arrival is not None:
            return None
        return self._step.begin_gated(layer, hidden_states, gate, out_proj, norm, epsilon)


class SlotArrival:
    """Makes the model's queue wait for a batch's records, layer by layer.

    Args:
        batch: what is being read, by this batch and by others for it.
        transfers: who copies it.
    """

    def __init__(
        self, batch: SlotBatch, transfers: Transfers, lane: Lane, clock: WaitClock
    ) -> None:
        self._batch, self._transfers, self._lane, self._clock = batch, transfers, lane, clock
        self._marks: list[tuple[int, Mark]] | None = None
        self._layers_there = 0

    def lead(self, layer: int) -> None:
        """Let the model's queue wait for this layer and those before it; the host waits for the
        disk if that is still reading, never for the device."""
        if layer < self._layers_there:
            return
        if self._marks is None:
            self._clock.wait(self._batch)
            self._marks = self._marks_of_batch()
        for layers_there, mark in self._marks:
            if layer < layers_there:
                self._lane.lead(mark)
                self._layers_there = layers_there
                return

    def _marks_of_batch(self) -> list[tuple[int, Mark]]:
        if isinstance(self._batch.read, Transfer) and not self._batch.shares:
            return self._batch.read.marks
        assert self._transfers.last is not None
        return [(self._transfers.num_layers, self._transfers.last)]


class DeviceReader:
    """Gives the rows of batches on a device.

    Args:
        decoding: how records become rows; its device is the lane's.
        store: where records are read from.
        thread: reads prompts.
        clock: counts the waiting for records.
        lane: to the device.
        count: told of every batch.
        cache_bytes: budget of the slots on the device: what is asked for is what they take, in
            whole records, but never less than one batch needs.
        slot_batch: the most unique ids of a batch that goes through slots.
        group_bytes: about what each of a prompt's buffers may take.
    """

    def __init__(
        self,
        decoding: Decoding,
        store: Store,
        thread: Executor,
        clock: WaitClock,
        lane: Lane,
        count: Count,
        cache_bytes: int,
        slot_batch: int,
        group_bytes: int,
    ) -> None:
        self._decoding, self._store, self._thread = decoding, store, thread
        self._clock, self._lane, self._count = clock, lane, count
        self._slot_batch, self._group_bytes = slot_batch, group_bytes
        layout = decoding.layout
        shape = layout.shape
        prepare(layout.encoding, shape.num_experts, shape.row_size, lane.device)
        cached = min(cache_bytes, layout.table_bytes) // layout.stride
        num_slots = max(cached, slot_batch)
        self._cache = SlotCache(num_slots, cached)
        self._memory = lane.device_memory(num_slots, layout.stride, lasting=True)
        self._ring = PinnedRing(lane, layout.stride, slot_batch, clock)
        self._transfers = Transfers(store, layout, lane, self._memory, self._ring)
        self._dropped: deque[tuple[SlotBatch, Any]] = deque()
        """Batches whose rows nobody holds any more, and the model's queue that read them; given
        back by the next batch, since rows may be collected at any moment, under any lock."""

    @property
    def device_bytes(self) -> int:
        """What the slots take on the device."""
        return self._memory.numel()

    def rows(self, token_ids: Tensor, ready: bool) -> TokenRows:
        """See `TableExperts.rows`."""
        ids = self._lane.to_host(token_ids.reshape(-1))
        self._release_dropped()
        if 0 < len(ids) <= 4 * self._slot_batch:
            rows = self._rows_in_slots(ids.tolist(), token_ids.shape, ready)
            if rows is not None:
                return rows
        unique_ids, index = np.unique(ids, return_inverse=True)
        if len(ids):
            self._check_bounds(int(unique_ids[0]), int(unique_ids[-1]))
        self._count(len(ids), len(unique_ids), None)
        if ready or not len(ids):
            return self._rows_of_their_own(unique_ids, index, token_ids.shape)
        return PromptRows(
            self._decoding,
            self._store,
            self._thread,
            unique_ids,
            self._lane.to_device(index).view(token_ids.shape),
            self._clock,
            self._group_bytes,
            self._lane,
        )

    def _check_bounds(self, low: int, high: int) -> None:
        check_bounds(low, high, self._decoding.layout.shape.vocab_size)

    def _rows_in_slots(self, ids: list[int], shape: torch.Size, ready: bool) -> DeviceRows | None:
        """Through the cache; None for too many unique ids, or if other batches hold the slots.

        In plain Python, which beats arrays for the few ids of a decoding step.
        """
        unique_ids, places = unique_in_order(ids)
        if len(unique_ids) > self._slot_batch:
            return None
        self._check_bounds(min(unique_ids), max(unique_ids))
        taken = self._cache.take(unique_ids)
        if taken is None:
            return None
        batch = SlotBatch(self._transfers, self._cache, taken)
        with ExitStack() as failing:
            failing.callback(batch.abandon)
            self._count(len(ids), len(unique_ids), batch.missing_ids)
            batch.begin()
            rows = self._rows_of_batch(batch, places, shape)
            if ready:
                rows.wait()
            failing.pop_all()
        finalize(rows, self._dropped.append, (batch, self._lane.model_queue())).atexit = False
        return rows

    def _rows_of_batch(self, batch: SlotBatch, places: list[int], shape: torch.Size) -> DeviceRows:
        before = self._transfers.last
        if before is not None:  # hits may have been copied for another queue
            self._lane.lead(before)
        arrival = None
        if batch.is_pending:
            arrival = SlotArrival(batch, self._transfers, self._lane, self._clock)
        slots = batch.slots()
        return self._device_rows(self._memory, slots, places, shape, arrival, is_step=True)

    def _device_rows(
        self,
        memory: Tensor,
        record_of_id: Sequence[int] | np.ndarray,
        places: Sequence[int] | np.ndarray,
        shape: torch.Size,
        arrival: SlotArrival | None,
        is_step: bool,
    ) -> DeviceRows:
        """
        Args:
            record_of_id: [U], the place in `memory` of each unique id.
            places: [B·T], position -> place in `record_of_id`.
        """
        numbers = np.zeros((3, len(places)), np.int64)
        numbers[1] = places
        numbers[2, : len(record_of_id)] = record_of_id
        numbers[0] = numbers[2][numbers[1]]
        return DeviceRows(
            self._decoding,
            memory,
            self._lane.to_device(numbers),
            len(record_of_id),
            shape,
            arrival,
            is_step,
        )

    def _rows_of_their_own(
        self, unique_ids: np.ndarray, index: np.ndarray, shape: torch.Size
    ) -> DeviceRows:
        """In memory for this batch alone: all of a prompt's records, before a graph that can't
        wait for them."""
        layout = self._decoding.layout
        memory = self._lane.device_memory(len(unique_ids), layout.stride)
        transfers = Transfers(self._store, layout, self._lane, memory, self._ring)
        places = np.arange(len(unique_ids))
        pieces = range(0, len(unique_ids), self._slot_batch)
        reads = [
            transfers.begin(
                unique_ids[first : first + self._slot_batch],
                places[first : first + self._slot_batch],
            )
            for first in pieces
        ]
        for read in reads:
            self._clock.wait(read)
        if transfers.last is not None:
            self._lane.lead(transfers.last)
        return self._device_rows(memory, places, index, shape, None, is_step=False)

    def _release_dropped(self) -> None:
        while self._dropped:
            try:
                batch, queue = self._dropped.popleft()
            except IndexError:  # another thread was faster
                return
            self._lane.follow(self._lane.mark_of(queue))  # what reads the slots now is queued there
            batch.release()

    def close(self) -> None:
        """Let what was queued come to its end."""
        self._release_dropped()
        if self._transfers.last is not None:
            self._transfers.last.wait()
