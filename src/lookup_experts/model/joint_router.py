"""The router's product as part of the FFN's first one, for steps of decoding on a CPU.

Router and FFN look at the same hidden states. For a few positions a 16-bit product of its own takes
the router longer to begin than to compute, in every layer; as further rows of the FFN's first
weight it takes next to nothing. `join_routers` lays both weights in one piece of memory, in which
each stays what it was: names, shapes and what is saved don't change.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.model.experts import LookupExperts, is_called_plainly

MOST_POSITIONS = 64
"""Of a step. Beyond it (prompts) a product of its own costs nothing worth saving."""


class JointLinear(nn.Linear):
    """An FFN's first linear layer, below whose weight lies that of the block's router.

    Written for the fewest instructions: they take longer than the router's product.

    Attributes:
        joint: [D + N, d], of which `weight` and the router's weight are views.
        router_part: [N, d], the view that the router's weight is.
        asked: the newest step's input, and the router's logits [B·T, N] for it. One attribute, so
            that a thread sees both of one step.
    """

    joint: Tensor
    router_part: Tensor
    asked: tuple[Tensor, Tensor] | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """[..., d] -> [..., D]"""
        num_positions = input.numel() // self.in_features
        if not 1 < num_positions <= MOST_POSITIONS or not self._can_join():
            return super().forward(input)
        both, size = F.linear(input, self.joint), self.out_features
        width = both.shape[-1]
        logits = both.as_strided((num_positions, width - size), (width, 1), size)
        self.asked = (input, logits)
        return both.narrow(-1, 0, size)

    def _can_join(self) -> bool:
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            # A weight that was moved, or given another dtype, is no view any more.
            and self.joint.data_ptr() == self._parameters["weight"].data_ptr()  # type: ignore[union-attr]
        )

    def logits_of(self, hidden_states: Tensor, router: nn.Linear) -> Tensor | None:
        """The router's logits; None unless this layer has just been given these hidden states."""
        asked, self.asked = self.asked, None
        if asked is None or asked[0] is not hidden_states:
            return None
        is_router = router._parameters["weight"].data_ptr() == self.router_part.data_ptr()  # type: ignore[union-attr]
        return asked[1] if is_router and is_called_plainly(router, nn.Linear) else None


def join_routers(model: Any) -> None:
    """Lay each router of an attached model below its FFN's first linear layer, in place.

    Where that can't be done, or would not pay (a GPU, float32, quantised layers), nothing happens.
    """
    for lookup in model.lookup_attachment.modules:
        ffn = next(
            module for module in model.modules() if getattr(module, "lookup_experts", 0) is lookup
        )
        first = next((m for m in ffn.children() if type(m) is nn.Linear), None)
        if first is not None and _can_join(first, lookup.router):
            _join(first, lookup)


def _can_join(first: nn.Linear, router: nn.Linear) -> bool:
    return (
        is_called_plainly(first, nn.Linear)
        and first.bias is None
        and first.in_features == router.in_features
        and first.weight.dtype == router.weight.dtype == torch.bfloat16
        and first.weight.device.type == router.weight.device.type == "cpu"
    )


@torch.no_grad()
def _join(first: nn.Linear, lookup: LookupExperts) -> None:
    joint = torch.cat([first.weight, lookup.router.weight])
    ffn_part, router_part = joint[: first.out_features], joint[first.out_features :]
    first.weight.data, lookup.router.weight.data = ffn_part, router_part
    first.__class__ = JointLinear
    vars(first).update(joint=joint, router_part=router_part, asked=None)
    lookup.joined = (first,)
