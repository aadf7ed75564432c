"""The auxiliary losses of a router, added to a model's loss while it trains.

Load balance is that of Switch Transformer (arXiv 2101.03961, equations 4 to 6) with Mixtral's
extension to several experts per token; the z-loss is that of ST-MoE (arXiv 2202.08906, equation
5). Both are computed for each layer and averaged over the layers: pooling the layers first, as
transformers does for Mixtral, would let one layer's imbalance cancel that of another.

Everything happens in hooks, so that the model's forward keeps its signature and any backbone can
have them. In evaluation mode nothing is recorded and nothing added: a validation loss is the
language-model loss alone.

Shapes: S positions, N experts, k experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        self._logits: list[Tensor] | None = None  # of a training forward under way
        self._sums: Tensor | None = None  # load balance, z, weights

    def begin(self, training: bool) -> None:
        """Start a forward pass; in training its routers' logits are recorded."""
        self._logits = [] if training else None

    def record(self, logits: Tensor) -> None:
        """Take one router's logits [..., N]. Recomputation in the backward pass is not recorded."""
        if self._logits is not None:
            self._logits.append(logits)

    def end(self, mask: Tensor | None, weight: Tensor | float) -> Tensor | None:
        """The weighted sum of the losses of the forward pass that ends; None outside of training.

        Args:
            mask: [S], 0 for padding; None: no padding.
            weight: this micro batch's part of the optimizer step.
        """
        logits, self._logits = self._logits, None
        if not logits:
            return None
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


def add_router_losses(
    model: Any, routers: Sequence[nn.Module], num_selected: int, load_balance: float, z: float
) -> None:
    """Let a model's training loss include the auxiliary losses of its routers.

    Sets `model.router_losses`. A micro batch weighs as much as its language-model loss does: where
    the caller gives `num_items_in_batch`, as transformers' Trainer does, by its share of them.

    Args:
        model: a Hugging Face causal LM, called with `labels` by keyword.
        routers: modules whose output are the logits [..., N], one per layer.
        num_selected: k; 1 where no experts are selected (the share of a position then goes to
            the expert of the highest weight, as in Switch Transformer).
        load_balance: the coefficient of the load-balance loss.
        z: the coefficient of the z-loss.
    """
    losses = RouterLosses(num_selected, load_balance, z)
    for router in routers:
        router.register_forward_hook(RecordLogits(losses))
    model.register_forward_pre_hook(BeginRecording(losses))
    model.register_forward_hook(AddToLoss(losses), with_kwargs=True)
    model.router_losses = losses


class RecordLogits:
    """Forward hook of a router."""

    def __init__(self, losses: RouterLosses) -> None:
        self.losses = losses

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.losses.record(output)


class BeginRecording:
    """Forward pre-hook of the model."""

    def __init__(self, losses: RouterLosses) -> None:
        self.losses = losses

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.losses.begin(model.training and torch.is_grad_enabled())


class AddToLoss:
    """Forward hook of the model: its loss, if it gives one, gains the auxiliary losses."""

    def __init__(self, losses: RouterLosses) -> None:
        self.losses = losses

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        labels = kwargs.get("labels")
        if labels is None:
            self.losses.begin(training=False)
            return output
        extra = self.losses.end(_flat_mask(kwargs), _weight(kwargs))
        if extra is None:
            return output
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
