"""The positions of a batch by their unique ids, and the weighted sum over them in training.

What mixing needs to know of a batch is the same in every layer, so it is found once, at the model's
entrance. `mix_positions` gives what `mix` gives; on a CPU its backward pass is another: `mix`'s
own, that of `F.embedding_bag`, sorts all positions times experts in every layer, and adds up
gradients in the rows' dtype, which in bfloat16 loses 1 % of the gradient of a frequent id.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SUM = 0  # the mode's number in aten


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
