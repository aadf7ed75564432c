"""The rows of a long prompt on a device: read ahead and copied ahead, a few layers at a time.

As `StreamedRows` (`rows.py`) does in RAM: a thread reads groups of layers into two buffers. Here
these are page-locked, and each has its twin on the device, to which the thread has the lane copy
it. A buffer on the host is read into again when the copy out of it is over, which the thread
waits for; one on the device when the blocks that read it are done, which the lane waits for.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np
from torch import Tensor, nn

from lookup_experts.model.rows import mix
from lookup_experts.table.lanes import Lane, Mark
from lookup_experts.table.mixing import decode_and_mix
from lookup_experts.table.reading_thread import submit_read
from lookup_experts.table.rows import Decoding, LayerGroup, WaitClock, plan_groups
from lookup_experts.table.store import Store

Piece = tuple[Tensor, Mark]
"""uint8 [U, width] on the device, and the mark to wait for."""


class PromptRows:
    """Blocks ask for layers in order; asking for an earlier one starts again from there.

    Args:
        decoding: how records become rows.
        store: where records are read from, in parts.
        thread: reads one group after the other.
        ids: int64 [U], unique, at least one.
        index: int64 [B, T] on the device, position -> place in `ids`.
        clock: counts the waiting.
        group_bytes: about what each of the four buffers may take.
        lane: to the device.
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
        lane: Lane,
    ) -> None:
        self.index = index
        self._decoding, self._thread, self._clock, self._lane = decoding, thread, clock, lane
        groups = plan_groups(decoding.layout, len(ids), group_bytes)
        self._groups = groups
        self._group_of = [number for number, group in enumerate(groups) for _ in group.layers]
        # A part of a record doesn't tell whether it is intact; whole ones are checked when read.
        intact = submit_read(thread, store.check, ids if len(groups) > 1 else ids[:0])
        self._reader = _GroupReader(store, ids, groups, lane, intact)
        self._reading: dict[int, Future[Piece]] = {}
        self._start_from(0)

    def _start_from(self, group: int) -> None:
        """Read this group and the next; whatever else is being read comes to its end first."""
        for future in self._reading.values():
            future.exception()
        self._reading = {}
        self._current = group
        self._there: Piece | None = None
        self._read_ahead(group)
        self._read_ahead(group + 1)

    def _read_ahead(self, number: int) -> None:
        """Into the buffers of a group whose blocks, if it had any, are in the model's queue."""
        if number < len(self._groups):
            queue = self._lane.model_queue()
            done = self._lane.mark_of(queue)
            self._reading[number] = submit_read(self._thread, self._reader.read, number, done)

    def _records(self, layer: int) -> Tensor:
        """The layer's group, uint8 [U, width], which the model's queue waits for."""
        number = self._group_of[layer]
        if number != self._current:
            if number != self._current + 1:
                self._start_from(number)
            else:
                self._reading.pop(self._current)
                self._current, self._there = number, None
                self._read_ahead(number + 1)
        if self._there is None:
            future = self._reading[number]
            if not future.done():
                self._clock.wait(_Ended(future))
            self._there = future.result()
            self._lane.lead(self._there[1])
        return self._there[0]

    def _offset(self, layer: int) -> int:
        """Where the layer begins in its group."""
        group = self._groups[self._group_of[layer]]
        return self._decoding.layout.layer_slice(layer).start - group.start

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
        """See `TokenRows.layer`; a copy, since the buffers are soon read into again."""
        start = self._offset(layer)
        stop = start + self._decoding.layout.layer_bytes
        return self._decoding.decode(self._records(layer)[:, start:stop].clone())

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        if weights.requires_grad:
            return mix(self.layer(layer), self.index.view(-1), weights)
        layout = self._decoding.layout
        return decode_and_mix(
            self._records(layer),
            self.index.view(-1),
            weights,
            layout.encoding,
            layout.shape.row_size,
            self._offset(layer),
            self._decoding.dtype,
        )


class _GroupReader:
    """Two buffers on the host and two on the device; used by the reading thread alone."""

    def __init__(
        self,
        store: Store,
        ids: np.ndarray,
        groups: Sequence[LayerGroup],
        lane: Lane,
        intact: "Future[None]",
    ) -> None:
        self._store, self._ids, self._groups, self._lane = store, ids, groups, lane
        widest = max(group.stop - group.start for group in groups)
        num_buffers = min(2, len(groups))
        self._host = [lane.host_memory(len(ids) * widest) for _ in range(num_buffers)]
        self._device = [lane.device_memory(len(ids), widest).view(-1) for _ in range(num_buffers)]
        self._copied: list[Mark | None] = [None] * num_buffers
        self._intact = intact

    def read(self, number: int, done: Mark) -> Piece:
        """Bring a group to the device.

        Args:
            done: reached when nothing reads the buffers' last group any more.
        """
        buffer = number % len(self._host)
        copied = self._copied[buffer]
        if copied is not None:
            copied.wait()
        self._intact.result()  # read by this thread before
        group = self._groups[number]
        width = group.stop - group.start
        source = self._host[buffer][: len(self._ids) * width]
        self._store.read(self._ids, source.numpy().reshape(-1, width), group.start)
        target = self._device[buffer][: len(self._ids) * width]
        self._lane.follow(done)
        mark = self._copied[buffer] = self._lane.copy([target], [source])
        return target.view(-1, width), mark


class _Ended:
    """A future as a `PendingRead`; its error, if any, is for who asks for the result."""

    def __init__(self, future: "Future[Piece]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.exception()
