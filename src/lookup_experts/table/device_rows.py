"""The rows of a batch whose records the device finds itself (`device_records.py`).

The device copies records from where they are into a stage, a few layers at a time, on a stream
beside the model's, and a block waits there, not on the host, for the layers that it mixes. A step
of decoding stages one record per position. A prompt stages each id once, in two buffers that its
groups of layers take in turn, so that memory stays bounded.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from lookup_experts.model.rows import Addition, mix
from lookup_experts.table.additions import StepRecords
from lookup_experts.table.device_records import DeviceRecords
from lookup_experts.table.gather import QUAD, unique_places
from lookup_experts.table.lanes import Lane, Mark
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.mixing import decode_and_mix
from lookup_experts.table.rows import Decoding, LayerGroup

STEP_POSITIONS = 64
"""Most positions of a step of decoding, whose records are staged as they come; beyond it ids are
made unique first."""
AT_ONCE_BYTES = 2**19
"""Stages up to this size are filled at once. Larger ones take the bus longer than the first
block's attention, so the first layers are brought first."""


def stage_groups(layout: RecordLayout, num_rows: int, group_bytes: int) -> tuple[LayerGroup, ...]:
    """All layers in groups of about `group_bytes` for so many records; the first of few layers,
    since the model waits for it."""
    num_layers, layer_bytes = layout.shape.num_layers, layout.layer_bytes
    per_layer = max(1, num_rows * layer_bytes)
    if num_rows * layout.stride <= AT_ONCE_BYTES:
        bounds = [0, num_layers]
    else:
        first = max(1, min(num_layers, AT_ONCE_BYTES // 2 // per_layer))
        size = max(1, group_bytes // per_layer)
        bounds = [0, *range(first, num_layers, size), num_layers]
    return tuple(
        LayerGroup(
            range(begin, end),
            begin * layer_bytes // QUAD * QUAD,
            -(-end * layer_bytes // QUAD) * QUAD,
        )
        for begin, end in pairwise(bounds)
    )


class StagedRows:
    """Rows of records on their way to a stage; `FusedRows` and `StepRows`.

    Blocks ask for layers in order; asking for an earlier group than those in the stage brings it
    anew.

    Args:
        decoding: how records become rows.
        records: within reach of the device.
        ids: int64 [P], what is staged in this order; see `DeviceRecords.locate`.
        index: int64 [B·T], position -> place in `ids`.
        shape: (B, T).
        groups: of layers, in order.
        lane: beside the model's queue.
        in_order: whether `index` is 0, 1, 2 …
    """

    def __init__(
        self,
        decoding: Decoding,
        records: DeviceRecords,
        ids: Tensor,
        index: Tensor,
        shape: torch.Size,
        groups: Sequence[LayerGroup],
        lane: Lane,
        in_order: bool = False,
    ) -> None:
        self._decoding, self._records, self._ids, self._lane = decoding, records, ids, lane
        self._index, self._shape, self._groups = index, shape, groups
        self._group_of = [number for number, group in enumerate(groups) for _ in group.layers]
        self._stages: list[Tensor] = [
            torch.empty(
                len(ids) * max(group.stop - group.start for group in groups[buffer::2]),
                dtype=torch.uint8,
                device=lane.device,
            )
            for buffer in range(min(2, len(groups)))
        ]
        self._step = None
        if len(index) <= STEP_POSITIONS:
            places = None if in_order else index
            self._step = StepRecords(
                decoding.layout, decoding.dtype, lane.device, self._staged, places, len(index)
            )
        self._marks: dict[int, Mark] = {}
        """Of groups that were brought and not waited for."""
        self._is_there = False
        self._start_from(0)

    def _start_from(self, number: int) -> None:
        self._current = number
        self._bring(number, number + 1)

    def _bring(self, *numbers: int) -> None:
        """Fill buffers with groups, once all that the model's queue was told so far is done."""
        self._places: Tensor | None = None
        with self._records.order:
            for number in numbers:
                if number < len(self._groups):
                    buffer = self._stages[number % 2]
                    self._marks[number] = self._lane.beside(
                        partial(self._fill, number), [buffer, self._ids]
                    )

    def _fill(self, number: int) -> None:
        if self._places is None:
            self._places = self._records.locate(self._ids)
        self._records.gather(self._places, self._groups[number].start, self._stage(number))

    def _stage(self, number: int) -> Tensor:
        """uint8 [P, W] of a group."""
        group = self._groups[number]
        width = group.stop - group.start
        return self._stages[number % 2][: len(self._ids) * width].view(-1, width)

    def _staged(self, layer: int) -> tuple[Tensor, int]:
        """The stage that holds a layer, for which the model's queue waits, and the byte of its
        rows where the layer begins."""
        number = self._group_of[layer]
        if not self._is_there:
            self._wait_for(number)
        start = layer * self._decoding.layout.layer_bytes - self._groups[number].start
        return self._stage(number), start

    def _wait_for(self, number: int) -> None:
        if number > 0 and number == self._current + 1:
            # All blocks of the group before are in the model's queue.
            self._current = number
            if len(self._groups) > 2:
                self._bring(number + 1)
        elif number != self._current and not (len(self._groups) == 2 and number == 0):
            self._start_from(number)
        mark = self._marks.pop(number, None)
        if mark is not None:
            self._lane.lead(mark)

    def wait(self) -> None:
        """Have the model's queue wait for all of at most two groups; blocks then find rows without
        a word to the device, as a compiled graph needs it."""
        for number in range(len(self._groups)):
            self._wait_for(number)
        self._is_there = True

    def leave(self) -> None:
        """Have the model's queue wait for what was brought and not asked for: what is queued next
        begins after it, and a capture ends with all that it began."""
        while self._marks:
            self._lane.lead(self._marks.popitem()[1])

    @property
    def index(self) -> Tensor:
        """See `TokenRows.index`."""
        return self._index.view(self._shape)

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return self._index.numel()

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.layer`; a copy, since a buffer is filled again."""
        stage, start = self._staged(layer)
        codes = stage[:, start : start + self._decoding.layout.layer_bytes]
        return self._decoding.decode(codes.clone())

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        if weights.requires_grad:
            return mix(self.layer(layer), self._index, weights)
        stage, start = self._staged(layer)
        layout, dtype = self._decoding.layout, self._decoding.dtype
        row_size = layout.shape.row_size
        return decode_and_mix(stage, self._index, weights, layout.encoding, row_size, start, dtype)

    def route_mix_add(
        self, layer: int, hidden_states: Tensor, router: Tensor, output: Tensor
    ) -> Tensor | None:
        """See `FusedRows.route_mix_add`."""
        if self._step is None:
            return None
        return self._step.route_mix_add(layer, hidden_states, router, output)

    def begin_routed(
        self, layer: int, hidden_states: Tensor, router: Tensor, out_proj: Tensor | None
    ) -> Addition | None:
        """See `StepRows.begin_routed`."""
        if self._step is None:
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
        """See `StepRows.begin_gated`."""
        if self._step is None:
            return None
        return self._step.begin_gated(layer, hidden_states, gate, out_proj, norm, epsilon)


def staged_rows(
    decoding: Decoding,
    records: DeviceRecords,
    token_ids: Tensor,
    ready: bool,
    group_bytes: int,
    lane: Lane,
    positions: Tensor,
) -> StagedRows:
    """The rows of token_ids [B, T] on the device.

    Args:
        ready: whether blocks can't wait later on: everything is staged, then.
        group_bytes: about what each of a prompt's two buffers may take.
        positions: int64 [0, 1, 2 …], at least `STEP_POSITIONS` of them.
    """
    ids = token_ids.reshape(-1).to(torch.int64)
    in_order = len(ids) <= STEP_POSITIONS
    if in_order:
        index = positions[: len(ids)]
    else:
        ids, index = unique_places(ids)
    groups = stage_groups(decoding.layout, len(ids), group_bytes)
    if ready:
        layers = decoding.layout.shape.num_layers
        groups = (LayerGroup(range(layers), 0, decoding.layout.stride),)
    # In a compiled graph the kernels are operations that take places.
    rows = StagedRows(
        decoding, records, ids, index, token_ids.shape, groups, lane, in_order and not ready
    )
    if ready:
        rows.wait()
    return rows
