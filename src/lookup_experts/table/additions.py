"""What a block's lookup experts add in a step on a GPU: in few operations, at the right time.

What they add depends on the rows and on what the FFN is given, so it can be computed beside the
FFN's own products, on a second stream, or together with an addition that there is anyway. In a CUDA
graph either costs next to nothing on the way from layer to layer; without one, each event and each
call of Python costs more than it saves. So both are done only within `as_captured`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lookup_experts.model.rows import Addition
from lookup_experts.table.encoding import Encoding
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.mixing import (
    add_three,
    gate_project,
    route_mix_add,
    route_mix_project,
)

MOST_POSITIONS = 64
"""For more, a product over all positions at once pays."""
MOST_EXPERTS = 32
MOST_ROUTER_WEIGHTS = 2**14
"""N and N·d of a layer whose router's product each program of a kernel computes anew: so many
weights are a few kilobytes of the GPU's cache, and so many experts fit into registers."""
MOST_HIDDEN = 8192
"""d and r: a program holds so many numbers of a matrix at once, in whole rows."""


class Way(NamedTuple):
    """How something is added in a step that is captured."""

    beside: bool
    """On a second stream, while the FFN computes; else together with the addition."""
    deferred: bool
    """Together with the next addition, the block's own; see `model/deferred.py`."""


WIDE = Way(beside=False, deferred=True)
"""Of rows as wide as the model."""
NARROW = Way(beside=True, deferred=True)
"""Of rows that a product follows."""

_of_thread = threading.local()


@contextmanager
def as_captured() -> Iterator[None]:
    """Within it, this thread computes steps in the way that is best in a CUDA graph: for capturing
    one, and for running once before that, so that all kernels are there."""
    before = getattr(_of_thread, "captures", False)
    _of_thread.captures = True
    try:
        yield
    finally:
        _of_thread.captures = before


class StepRecords:
    """The records of a step's positions, in memory of the device that the model is on.

    Args:
        layout: of the records.
        dtype: of the model.
        device: of the model.
        records_of: gives for a layer the memory that holds it, uint8 [M, W], contiguous, and the
            byte of a row where it begins. Called where kernels are queued that read it, so it may
            have that queue wait.
        places: int64 [P], each position's row of the memory; None: the same as the position.
        num_positions: P.
    """

    def __init__(
        self,
        layout: RecordLayout,
        dtype: torch.dtype,
        device: torch.device,
        records_of: Callable[[int], tuple[Tensor, int]],
        places: Tensor | None,
        num_positions: int,
    ) -> None:
        self._layout, self._dtype, self._device = layout, dtype, device
        self._records_of = records_of
        self._places, self._num_positions = places, num_positions
        self._is_captured: bool = getattr(_of_thread, "captures", False)

    def begin_routed(
        self, layer: int, hidden_states: Tensor, router: Tensor, out_proj: Tensor | None
    ) -> Addition | None:
        """See `StepRows.begin_routed`."""
        if not self._fit_router(hidden_states, router):
            return None
        row_size, hidden_size = self._layout.shape.row_size, router.shape[1]
        if out_proj is not None:
            matrix = out_proj
            if (
                matrix.shape != (hidden_size, row_size)
                or not self._are_ours(matrix)
                or self._num_positions > MOST_POSITIONS
            ):
                return None

            def project() -> Tensor:
                records, encoding, offset = self._codes(layer)
                return route_mix_project(
                    records, self._places, hidden_states, router, matrix, encoding, offset
                )

            return self._begin(project, NARROW)
        if hidden_size != row_size:
            return None

        def add(output: Tensor | None, residual: Tensor | None = None) -> Tensor:
            records, encoding, offset = self._codes(layer)
            return route_mix_add(
                records, self._places, hidden_states, router, output, encoding, offset, residual
            )

        if WIDE.beside and self._is_captured:
            return self._begin(lambda: add(None), WIDE)
        return _Later(add, WIDE.deferred and self._is_captured)

    def route_mix_add(
        self, layer: int, hidden_states: Tensor, router: Tensor, output: Tensor
    ) -> Tensor | None:
        """See `FusedRows.route_mix_add`."""
        if (
            not self._fit_router(hidden_states, router)
            or router.shape[1] != self._layout.shape.row_size
            or output.shape != hidden_states.shape
            or not self._are_ours(output)
        ):
            return None
        records, encoding, offset = self._codes(layer)
        return route_mix_add(records, self._places, hidden_states, router, output, encoding, offset)

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
        shape = self._layout.shape
        hidden_size = gate.shape[1]
        if (
            shape.num_experts != 1
            or gate.shape != (shape.row_size, hidden_size)
            or out_proj.shape != (hidden_size, shape.row_size)
            or norm.shape != (hidden_size,)
            or not self._fit(hidden_states, gate)
            or not self._are_ours(out_proj, norm)
            or self._num_positions > MOST_POSITIONS
        ):
            return None

        def project() -> Tensor:
            records, encoding, offset = self._codes(layer)
            return gate_project(
                records,
                self._places,
                hidden_states,
                gate,
                out_proj,
                norm,
                epsilon,
                encoding,
                offset,
            )

        return self._begin(project, NARROW)

    def _codes(self, layer: int) -> tuple[Tensor, Encoding, int]:
        """Where the codes of a layer are, and how to read them, as the kernels take it."""
        records, offset = self._records_of(layer)
        return records, self._layout.encoding, offset

    def _begin(self, compute: Callable[[], Tensor], way: Way) -> Addition:
        if way.beside and self._is_captured:
            return _Beside(compute, self._device, way.deferred)
        return _Later(
            lambda output, residual: _sum(output, compute(), residual),
            way.deferred and self._is_captured,
        )

    def _fit_router(self, hidden_states: Tensor, router: Tensor) -> bool:
        num_experts = self._layout.shape.num_experts
        return (
            router.shape[0] == num_experts <= MOST_EXPERTS
            and router.numel() <= MOST_ROUTER_WEIGHTS
            and self._fit(hidden_states, router)
        )

    def _fit(self, hidden_states: Tensor, matrix: Tensor) -> bool:
        """Whether the kernels can do it, with a matrix [.., d] that the hidden state goes into."""
        hidden_size = matrix.shape[1]
        return (
            hidden_size <= MOST_HIDDEN
            and self._layout.shape.row_size <= MOST_HIDDEN
            and hidden_states.numel() == self._num_positions * hidden_size
            and hidden_states.shape[-1] == hidden_size
            and self._are_ours(hidden_states, matrix)
        )

    def _are_ours(self, *tensors: Tensor) -> bool:
        """Of the model's dtype, and on its device."""
        return self._dtype != torch.float64 and all(  # it is summed in float32
            each.dtype == self._dtype and each.device == self._device for each in tensors
        )


class _Later:
    """Computed when it is added; see `Addition`."""

    def __init__(self, add: Callable[[Tensor, Tensor | None], Tensor], is_deferred: bool) -> None:
        self.is_deferred = is_deferred
        self._add = add

    def add_to(self, output: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Addition.add_to`."""
        return self._add(output, residual)


class _Beside:
    """Computed on a second stream from now on; see `Addition`."""

    def __init__(
        self, compute: Callable[[], Tensor], device: torch.device, is_deferred: bool
    ) -> None:
        self.is_deferred = is_deferred
        model = torch.cuda.current_stream(device)
        side = _side_of(model)
        side.wait_stream(model)
        with torch.cuda.stream(side):
            self._added = compute()
            self._done = torch.cuda.Event()
            self._done.record(side)
        # What it reads must not become anybody else's before the streams are joined.
        self._reads: Callable[[], Tensor] | None = compute

    def add_to(self, output: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Addition.add_to`."""
        if self._reads is not None:
            torch.cuda.current_stream(output.device).wait_event(self._done)
            self._reads = None
        return _sum(output, self._added, residual)


def _sum(output: Tensor, added: Tensor, residual: Tensor | None) -> Tensor:
    return output + added if residual is None else add_three(residual, output, added)


@lru_cache(maxsize=64)
def _side_of(stream: "torch.cuda.Stream") -> "torch.cuda.Stream":
    """One for each of the model's: memory that is given back on it is given out again on it, and
    then whatever still reads that memory is queued on the one stream that it begins after."""
    return torch.cuda.Stream(stream.device)
