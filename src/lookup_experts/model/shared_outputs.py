"""Gradient accumulation without evaluating the experts once per micro batch.

    with shared_expert_outputs(model, [batch["input_ids"] for batch in batches]):
        for batch in batches:
            model(**batch).loss.backward()
    optimizer.step()

Between the micro batches of an optimizer step the experts don't change, so their outputs over all
of the step's unique ids are computed once, with the first forward pass. Each micro batch gets them
as they are; its gradients with respect to them are added up in a ledger; and the last micro batch's
backward pass hands the sums on to the experts and to the embedding. Gradients are those of plain
accumulation, up to the order in which numbers are added.

Because experts and embedding get all of it within one backward pass, DistributedDataParallel
sees what it expects: `no_sync()` around all micro batches but the last, as always.

What is held from the first forward pass to the last backward pass, for U unique ids in the whole
step: outputs and sums, 2·L·N·U·d numbers, and the hidden states of the experts, L·N·U·D.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lookup_experts.errors import UserError
from lookup_experts.model.computed_rows import FFNExperts, Positions, mix_positions
from lookup_experts.model.wiring import routed_experts


@contextmanager
def shared_expert_outputs(model: Any, token_ids: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the experts of an attached model are evaluated once for several micro batches.

    Exactly the given micro batches must be computed within it, each with its backward pass before
    the next forward pass. Forward passes without gradients are not counted.

    Args:
        model: an attached model in training form; one wrapped in DistributedDataParallel too.
        token_ids: the ids of each micro batch, int64 of any shape.

    Raises:
        UserError: the model has no experts in training form, or they are sharded by FSDP, whose
            weights are whole only inside their own block.
        RuntimeError: more, fewer or other micro batches than were given, or a backward pass that
            is missing or comes too late: gradients would be wrong.
    """
    attached = getattr(model, "module", model)
    experts = getattr(attached, "expert_source", None)
    if not isinstance(experts, FFNExperts):
        raise UserError(
            "shared_expert_outputs needs a model with lookup experts in training form; got "
            f"{type(attached).__name__} with {type(experts).__name__ if experts else 'no experts'}."
        )
    first = routed_experts(attached)[0]
    if any(hasattr(weight, "device_mesh") for weight in first.parameters()):
        raise UserError(
            "Expert outputs can't be shared between micro batches under FSDP: the weights are "
            "whole only inside their own block. Leave sharing out, or train with DDP."
        )
    if not token_ids:
        raise UserError("shared_expert_outputs was given no micro batch.")
    shared = SharedOutputs(experts, token_ids)
    attached.set_expert_source(shared)
    try:
        yield
        shared.check_complete()
    finally:
        attached.set_expert_source(experts)


class SharedOutputs:
    """The `ExpertSource` within `shared_expert_outputs`."""

    def __init__(self, experts: FFNExperts, token_ids: Sequence[Tensor]) -> None:
        self._experts = experts
        self._num_batches = len(token_ids)
        self._unique_ids = torch.cat([ids.reshape(-1) for ids in token_ids]).unique()
        self._batches_begun = 0
        self._outputs: list[Tensor] = []
        self._ledgers: list[Ledger] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has no part in these micro batches: it computes its own outputs."""
        return FFNExperts, (self._experts.settings,)

    @torch.compiler.disable
    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: nn.Module | None = None
    ) -> Any:
        """See `ExpertSource.rows`."""
        if not torch.is_grad_enabled():
            return self._experts.rows(token_ids, ready, base_model)
        if self._batches_begun == self._num_batches:
            raise RuntimeError(
                f"shared_expert_outputs was given the token ids of {self._num_batches} micro "
                "batches; this forward pass is one more."
            )
        self._batches_begun += 1
        if not self._outputs:
            inputs = self._experts.inputs(self._unique_ids, base_model)
            self._outputs = [
                experts(inputs, self._unique_ids) for experts in routed_experts(base_model)
            ]
            self._ledgers = [Ledger(outputs.requires_grad) for outputs in self._outputs]
        index = self._index(token_ids)
        positions = Positions(index, len(self._unique_ids), self._experts.settings.num_experts)
        return SharedRows(positions, self._hand_out())

    def _index(self, token_ids: Tensor) -> Tensor:
        index = torch.searchsorted(self._unique_ids, token_ids)
        index = index.clamp(max=len(self._unique_ids) - 1)
        found = (self._unique_ids[index] == token_ids).all()
        message = "A micro batch has token ids that shared_expert_outputs was not given."
        if token_ids.device.type == "cpu":
            if not found:
                raise RuntimeError(message)
        else:  # without waiting for the device
            torch._assert_async(found, message)
        return index

    def _hand_out(self) -> list[Tensor]:
        """Each layer's outputs, connected so that gradients go to the ledger or on to the experts.

        The last micro batch's own are let go of here, so that its backward pass frees them.
        """
        handed: list[Tensor] = []
        last = self._batches_begun == self._num_batches
        for outputs, ledger in zip(self._outputs, self._ledgers, strict=True):
            if not ledger.is_open:
                handed.append(outputs)
            elif last:
                handed.append(_Settle.apply(outputs, ledger))
            else:
                handed.append(_Note.apply(outputs.detach().requires_grad_(), ledger))
        if last:
            self._outputs = []
        return handed

    def check_complete(self) -> None:
        """Have all micro batches been computed, and the experts got their gradients?"""
        if self._batches_begun < self._num_batches:
            raise RuntimeError(
                f"shared_expert_outputs was given the token ids of {self._num_batches} micro "
                f"batches, but only {self._batches_begun} were computed: the experts have no "
                "gradients."
            )
        if any(ledger.is_open for ledger in self._ledgers):
            raise RuntimeError(
                "The last micro batch had no backward pass within shared_expert_outputs: the "
                "experts have no gradients."
            )


class SharedRows:
    """One micro batch's view of the shared outputs, [N, U, d] for each layer."""

    def __init__(self, positions: Positions, outputs: list[Tensor]) -> None:
        self.index = positions.index
        self._positions = positions
        self._outputs = outputs

    @property
    def num_positions(self) -> int:
        return self.index.numel()

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.layer`."""
        return self._outputs[layer].transpose(0, 1)

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        return mix_positions(self._outputs[layer], self._positions, weights)


class Ledger:
    """The sum of one layer's gradients [N, U, d], in float32 where they are shorter.

    Attributes:
        is_open: gradients are expected: those of frozen experts never are.
    """

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open
        self._sum: Tensor | None = None

    def note(self, grad: Tensor) -> Tensor:
        """Add a micro batch's gradient; the sum so far."""
        if not self.is_open:
            raise RuntimeError(
                "A micro batch's backward pass came after the last one's: each must come before "
                "the next forward pass where expert outputs are shared."
            )
        if self._sum is None:
            self._sum = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        else:
            self._sum += grad
        return self._sum

    def settle(self, grad: Tensor) -> Tensor:
        """The sum of all gradients, the last one's included, in its dtype."""
        total = self.note(grad).to(grad.dtype)
        self._sum, self.is_open = None, False
        return total


class _Note(torch.autograd.Function):
    """Hands outputs on unchanged; their gradient stops in the ledger."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, ledger: Ledger) -> Tensor:
        ctx.ledger = ledger
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.ledger.note(grad)
        return None, None


class _Settle(torch.autograd.Function):
    """Hands outputs on unchanged; their gradient is all that the ledger has and its own."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, ledger: Ledger) -> Tensor:
        ctx.ledger = ledger
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ledger.settle(grad), None
