"""Training form: expert outputs computed from the embeddings of a batch's unique token ids.

Exact and differentiable: an expert's output depends on the token id alone, so one evaluation per
unique id serves all its positions, and their gradients add up. A layer's experts are evaluated by
the block that asks for them (`wiring.py`), which hands in its own.

What mixing needs to know of a batch is the same in every layer, so it is found once, at the model's
entrance. `mix_positions` gives what `mix` gives; on a CPU its backward pass is another: `mix`'s
own, that of `F.embedding_bag`, sorts all positions times experts in every layer, and adds up
gradients in the rows' dtype, which in bfloat16 loses 1 % of the gradient of a frequent id.

Shapes: B batch, T tokens, U unique token ids, N experts, e embedding size, d hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lookup_experts.errors import UserError
from lookup_experts.model.forms import get_form
from lookup_experts.model.settings import LookupSettings

_SUM = 0  # the mode's number in aten


class FFNExperts:
    """The `ExpertSource` of a model in training form.

    Args:
        settings: what was attached.
    """

    def __init__(self, settings: LookupSettings) -> None:
        self.settings = settings

    # Finding the unique ids has a result whose size depends on the data, so torch.compile would
    # break its graph here anyway; said once, it is one break at the entrance and none later.
    @torch.compiler.disable
    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: nn.Module | None = None
    ) -> "ComputedRows":
        """See `ExpertSource.rows`."""
        unique_ids, index = torch.unique(token_ids, return_inverse=True)
        inputs = self.inputs(unique_ids, base_model)
        positions = Positions(index, len(unique_ids), self.settings.num_experts)
        # The number of unique ids changes from batch to batch: no graph is to depend on it.
        for tensor in (inputs, unique_ids, positions.starts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return ComputedRows(positions, inputs, unique_ids)

    def inputs(self, unique_ids: Tensor, base_model: Any) -> Tensor:
        """[U, e]: what every layer of `base_model` makes its rows for unique ids [U] from."""
        embedding = base_model.get_input_embeddings()
        _check_one_embedding(embedding)
        _check_range(unique_ids, embedding)
        return get_form(self.settings.row_form).inputs(embedding(unique_ids), self.settings)


def _check_one_embedding(embedding: Any) -> None:
    """Refuse PEFT's mixed batches where they would give one id a row for each sequence."""
    hooks = embedding._forward_pre_hooks.values()
    if any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
        raise UserError(
            "The sequences of a batch can't have different adapters on the embedding "
            "(adapter_names), since experts are looked up by token id. Use one adapter at a time."
        )


def _check_range(unique_ids: Tensor, embedding: Any) -> None:
    # Only where looking costs no synchronisation; on a GPU the embedding itself asserts.
    if unique_ids.device.type != "cpu" or unique_ids.numel() == 0:
        return
    vocab_size = embedding.weight.shape[0]
    for token_id in (int(unique_ids[0]), int(unique_ids[-1])):  # sorted
        if not 0 <= token_id < vocab_size:
            raise UserError(
                f"Token id {token_id} is outside the vocabulary (0 to {vocab_size - 1}). "
                "Is this the tokenizer that belongs to the model?"
            )


class ComputedRows:
    """The rows of `FFNExperts`: a layer is evaluated when it is asked for.

    Evaluating late keeps a layer's experts inside its block, where gradient checkpointing
    recomputes them and FSDP gathers their weights. What layers share has been done: `inputs`
    [U, e] is what their makers see of `unique_ids` [U], and `positions` knows where these stand.
    """

    def __init__(self, positions: "Positions", inputs: Tensor, unique_ids: Tensor) -> None:
        self.index = positions.index
        self._positions = positions
        self._inputs = inputs
        self._unique_ids = unique_ids

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return self.index.numel()

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.layer`."""
        assert experts is not None, "training form: a block has its experts"
        return experts(self._inputs, self._unique_ids).transpose(0, 1)

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        assert experts is not None, "training form: a block has its experts"
        return mix_positions(experts(self._inputs, self._unique_ids), self._positions, weights)


class Positions:
    """Where each unique id of a batch stands.

    Args:
        index: [B, T] int64, position -> place of its id among the unique ids.
        num_ids: U.
        num_experts: N.

    Attributes:
        index: as given.
        bags: [B·T, N] int64: the rows of a flat [N·U, d] that each position adds up.
        order: [B·T] int64, the positions by id.
        starts: [U] int64, where each id's positions begin in `order`.
            Both empty on a device whose backward pass needs neither.
    """

    def __init__(self, index: Tensor, num_ids: int, num_experts: int) -> None:
        self.index = index
        flat = index.reshape(-1)
        self.bags = flat.unsqueeze(1) + torch.arange(num_experts, device=index.device) * num_ids
        self.order = self.starts = flat.new_empty(0)
        if _has_own_backward(index):
            self.order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=num_ids)
            self.starts = counts.cumsum(0) - counts


def mix_positions(rows: Tensor, positions: Positions, weights: Tensor) -> Tensor:
    """Each position's weighted sum of its id's expert outputs; differentiable once.

    No tensor of the size of all positions and experts is made, forward or backward, but the
    weights and the bags.

    Args:
        rows: [N, U, d] floating point, contiguous.
        positions: of the batch.
        weights: [B·T, N] floating point; rounded to the rows' dtype.

    Returns:
        [B·T, d] in the rows' dtype.
    """
    flat, weights = rows.view(-1, rows.shape[-1]), weights.to(rows.dtype)
    if not _has_own_backward(rows):
        return F.embedding_bag(positions.bags, flat, mode="sum", per_sample_weights=weights)
    mixed: Tensor = _MixPositions.apply(
        flat, weights, positions.bags, positions.order, positions.starts
    )
    return mixed


def _has_own_backward(tensor: Tensor) -> bool:
    # CUDA's, of `F.embedding_bag`, adds up in float32 and spreads a frequent id over many blocks.
    return tensor.device.type == "cpu"


class _MixPositions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, weights: Tensor, bags: Tensor, order: Tensor, starts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(flat, weights, bags, order, starts)
        return F.embedding_bag(bags, flat, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weights, bags, order, starts = ctx.saved_tensors
        grad = grad.contiguous()
        wants_flat, wants_weights, *_ = ctx.needs_input_grad
        grad_flat = _rows_gradient(grad, weights, order, starts) if wants_flat else None
        grad_weights = _weights_gradient(grad, flat, bags) if wants_weights else None
        return grad_flat, grad_weights, None, None, None


def _rows_gradient(grad: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """[N·U, d]: each id's sum over its positions, which is a weighted sum of bags as well.

    Bags are added up in float32 whatever the dtype, and different bags by different threads.
    """
    num_positions, num_experts = weights.shape
    firsts = torch.arange(num_experts).unsqueeze(1) * num_positions
    return F.embedding_bag(
        order.repeat(num_experts),
        grad,
        (starts + firsts).view(-1),
        mode="sum",
        per_sample_weights=weights.t().index_select(1, order).reshape(-1),
    )


def _weights_gradient(grad: Tensor, flat: Tensor, bags: Tensor) -> Tensor:
    """[B·T, N]: the product of each position's gradient with each of its rows."""
    num_positions, num_experts = bags.shape
    positions = torch.arange(num_positions)
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad,
        flat,
        bags.view(-1),
        positions * num_experts,
        positions.repeat_interleave(num_experts),
        _SUM,
    )
    return found.view(num_positions, num_experts)
