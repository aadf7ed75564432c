"""What a block of a model in vLLM gains: an FFN that its experts add to.

As in `model/wiring.py` the FFN has a child `lookup_experts`, and what that gives is added to its
output. Here no hook does it but the FFN's own `forward`, in a class made of its own: so the names
of the backbone's parameters stay as they are.

What the child computes is part of a compiled graph; the rows of a step are not. Their weighted sum
is one operation that no graph looks into, and that finds its block by name in the forward context,
as vLLM's attention does.

Shapes: T tokens of a step, N rows of a token and layer, d hidden size, r numbers of a row.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from lookup_experts.model.forms import LookupBlock
from lookup_experts.vllm_plugin.step import Step

OPERATION = "lookup_experts::mix_rows_of_step"


class PlacedBlock:
    """What the operation finds by a block's name.

    Args:
        block: reads the rows of its tokens.
        step: the one under way, of its model.
    """

    def __init__(self, block: LookupBlock, step: Step) -> None:
        self._block = block
        self._step = step

    def mix(self, weights: Tensor) -> Tensor:
        """[T, r]: the rows of a step's tokens, by weights [T, N]."""
        rows = self._step.rows_for(len(weights))
        return rows.mix(self._block.layer, weights, self._block.maker)


class RowsInGraph:
    """The `TokenRows` of a step as a graph sees them: it can have them mixed.

    Args:
        name: of the block that asks.
        hidden_states: [..., d], what its FFN is given.
        row_size: r.
    """

    def __init__(self, name: str, hidden_states: Tensor, row_size: int) -> None:
        self.num_positions = hidden_states.numel() // hidden_states.shape[-1]
        self._name = name
        self._dtype = hidden_states.dtype
        self._row_size = row_size

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """See `TokenRows.mix`."""
        return torch.ops.lookup_experts.mix_rows_of_step(
            weights.to(self._dtype), self._name, self._row_size
        )


class FFNWithExperts:
    """What an FFN with experts does differently."""

    lookup_name: str
    """By which the operation finds its block."""
    lookup_row_size: int
    """r"""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        rows = RowsInGraph(self.lookup_name, hidden_states, self.lookup_row_size)
        return output + self.lookup_experts(hidden_states, rows)  # type: ignore[attr-defined]


@cache
def _with_experts(ffn: Any, forward: Any) -> Any:
    """The class of FFNs once they have experts.

    Args:
        ffn: their class.
        forward: what they do instead of what their class says; None: nothing.
    """
    plain = ffn if forward is None else type(ffn.__name__, (ffn,), {"forward": forward})
    return type(f"{ffn.__name__}WithExperts", (FFNWithExperts, plain), {})


def place_block(
    ffn: Any, block: LookupBlock, row_size: int, name: str, step: Step, vllm_config: Any
) -> None:
    """Have what `block` gives added to the output of `ffn`, from now on.

    Args:
        row_size: r.
        name: of the FFN, as no other of vLLM's layers is called.
        step: of its model.
        vllm_config: with the context in which the operation looks.
    """
    ffn.add_module("lookup_experts", block)
    ffn.lookup_name = f"{name}.lookup_experts"
    ffn.lookup_row_size = row_size
    # vLLM gives the modules that it takes from transformers a `forward` of their own.
    own_forward = ffn.__dict__.pop("forward", None)
    plain: Any = type(ffn)
    ffn.__class__ = _with_experts(plain, getattr(own_forward, "__func__", None))
    step.num_blocks += 1
    known = vllm_config.compilation_config.static_forward_context
    assert ffn.lookup_name not in known, f"two blocks are called {ffn.lookup_name}"
    known[ffn.lookup_name] = PlacedBlock(block, step)


class RouterInFloat32(nn.Linear):
    """A router that multiplies in float32. For a product as small, torch takes twice as long in
    bfloat16."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., d] -> [..., N] in float32."""
        return F.linear(states.float(), self.weight)


@torch.no_grad()
def widen_routers(model: Any) -> None:
    """Let the routers of a model that has its weights multiply in float32."""
    for block in model.modules():
        router = block._modules.get("router") if isinstance(block, LookupBlock) else None
        if router is not None:
            router.weight.data = router.weight.data.float()
            router.__class__ = RouterInFloat32


def _mix(weights: Tensor, block: str, row_size: int) -> Tensor:
    return get_forward_context().no_compile_layers[block].mix(weights)


def _shape_of_mixed(weights: Tensor, block: str, row_size: int) -> Tensor:
    return weights.new_empty(weights.shape[0], row_size)


_library = Library("lookup_experts", "FRAGMENT")
direct_register_custom_op(
    OPERATION.partition("::")[2], _mix, fake_impl=_shape_of_mixed, target_lib=_library
)
