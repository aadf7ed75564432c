"""The auxiliary losses of a router, added to a model's loss while it trains.

Load balance is that of Switch Transformer (arXiv 2101.03961, equations 4 to 6) with Mixtral's
extension to several experts per token; the z-loss is that of ST-MoE (arXiv 2202.08906, equation
5). Both are computed for each layer and averaged over the layers: pooling the layers first, as
transformers does for Mixtral, would let one layer's imbalance cancel that of another.

The model's forward keeps its signature, so any backbone can have them: its hooks begin a record, to
which whoever computes a router's logits adds them, and add the losses to its own. The record is
kept per thread, outside of all modules, so that routers may be copied, wrapped and replaced. In
evaluation mode nothing is recorded and nothing added: a validation loss is the language-model loss
alone.

Shapes: S positions, N experts, k experts per token.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError

IGNORED_LABEL = -100
"""What transformers leaves out of the language-model loss."""


def load_balance_loss(logits: Tensor, num_selected: int, mask: Tensor | None = None) -> Tensor:
    """N · sum over experts of (share of positions that select it) · (its mean probability).

    Args:
        logits: [S, N], what the router gives.
        num_selected: k; the shares add up to it. At perfect balance the loss is k.
        mask: [S], 0 for padding; default: no padding.

    Returns:
        A float32 scalar. Only the probabilities carry a gradient.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    selected = logits.topk(num_selected, dim=-1).indices
    chosen = torch.zeros_like(probabilities).scatter_(1, selected, 1.0)
    shares = _mean_over_positions(chosen, mask)
    return logits.shape[-1] * (shares * _mean_over_positions(probabilities, mask)).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean square of log(sum(exp(logits))): a float32 scalar for logits [S, N]."""
    return _mean_over_positions(logits.float().logsumexp(dim=-1).square(), mask)


def _mean_over_positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """[S, ...] -> [...]"""
    if mask is None:
        return values.mean(dim=0)
    weights = mask.to(values.dtype)
    return torch.tensordot(weights, values, dims=1) / weights.sum()


_of_thread = threading.local()


def record_logits(logits: Tensor) -> None:
    """Take one router's logits [..., N], if the forward pass under way wants them.

    Recomputation in the backward pass is not recorded.
    """
    record: list[Tensor] | None = getattr(_of_thread, "record", None)
    if record is not None:
        record.append(logits)


class RouterLosses:
    """Adds the auxiliary losses of a model's routers to its loss, and keeps account of them.

    Args:
        num_selected: k, how many experts a position's share goes to.
        load_balance: the coefficient of the load-balance loss; 0 is off.
        z: the coefficient of the z-loss; 0 is off.
    """

    def __init__(self, num_selected: int, load_balance: float, z: float) -> None:
        self.num_selected = num_selected
        self.load_balance = load_balance
        self.z = z
        self._sums: Tensor | None = None  # load balance, z, weights

    def of(self, logits: list[Tensor], mask: Tensor | None, weight: Tensor | float) -> Tensor:
        """The weighted sum of the losses of a forward pass.

        Args:
            logits: [..., N] of each layer.
            mask: [S], 0 for padding; None: no padding.
            weight: this micro batch's part of the optimizer step.
        """
        layers = [layer.reshape(-1, layer.shape[-1]) for layer in logits]
        balance = torch.stack([load_balance_loss(x, self.num_selected, mask) for x in layers])
        squares = torch.stack([z_loss(x, mask) for x in layers])
        losses = torch.stack([balance.mean(), squares.mean()]) * weight
        self._account(losses.detach(), weight)
        return self.load_balance * losses[0] + self.z * losses[1]

    def _account(self, losses: Tensor, weight: Tensor | float) -> None:
        weights = torch.as_tensor(weight, dtype=losses.dtype, device=losses.device).reshape(1)
        sums = torch.cat([losses, weights])
        self._sums = sums if self._sums is None else self._sums + sums

    def take_sums(self, device: Any) -> Tensor:
        """[3]: the sums of load balance, z and weights since the last call; float32."""
        sums, self._sums = self._sums, None
        return torch.zeros(3, device=device) if sums is None else sums


def add_router_losses(model: Any, num_selected: int, load_balance: float, z: float) -> None:
    """Let a model's training loss include the auxiliary losses of its routers.

    Sets `model.router_losses`. A micro batch weighs as much as its language-model loss does: where
    the caller gives `num_items_in_batch`, as transformers' Trainer does, by its share of them.

    Args:
        model: a Hugging Face causal LM, called with `labels` by keyword, whose routers'
            logits go to `record_logits`.
        num_selected: k; 1 where no experts are selected (the share of a position then goes to
            the expert of the highest weight, as in Switch Transformer).
        load_balance: the coefficient of the load-balance loss.
        z: the coefficient of the z-loss.
    """
    model.router_losses = RouterLosses(num_selected, load_balance, z)
    model.register_forward_pre_hook(_begin_record)
    model.register_forward_hook(_add_to_loss, with_kwargs=True)


def _begin_record(model: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the model."""
    _of_thread.record = [] if model.training and torch.is_grad_enabled() else None


def _add_to_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the model: its loss, if it gives one, gains the auxiliary losses."""
    logits, _of_thread.record = getattr(_of_thread, "record", None), None
    if not logits or kwargs.get("labels") is None:
        return output
    extra = model.router_losses.of(logits, _flat_mask(kwargs), _weight(kwargs))
    if isinstance(output, tuple):
        _require_gradient(output[0], extra)
        return (output[0] + extra, *output[1:])
    _require_gradient(output.loss, extra)
    output.loss = output.loss + extra
    return output


def _flat_mask(kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.reshape(-1)


def _weight(kwargs: dict[str, Any]) -> Tensor | float:
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    predicted = kwargs["labels"][..., 1:].ne(IGNORED_LABEL).sum()
    return predicted / items


def _require_gradient(loss: Tensor, extra: Tensor) -> None:
    """Without a word, reentrant checkpointing would cut the auxiliary losses off."""
    if loss.requires_grad and not extra.requires_grad:
        raise UserError(
            "The routers' auxiliary losses have no gradient. With gradient checkpointing, use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}; for frozen routers, set both '
            "coefficients to 0."
        )
