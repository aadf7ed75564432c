"""What a block of a model in vLLM gains: an FFN that its experts add to.

As in `model/wiring.py` the FFN has a child `lookup_experts`, and what that gives is added to its
output. Here no hook does it but the FFN's own `forward`, in a class made of its own: so the names
of the backbone's parameters stay as they are, and a compiled graph has one opaque operation for it.
What that operation needs of a step lies elsewhere than in the graph, as with vLLM's attention: it
finds its block by name in the forward context.

Shapes: T tokens of a step, d hidden size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from lookup_experts.model.forms import LookupBlock
from lookup_experts.vllm_plugin.step import Step

OPERATION = "lookup_experts::add_in_block"


class PlacedBlock:
    """What the operation finds by a block's name.

    Args:
        block: reads the rows of its tokens.
        step: the one under way, of its model.
    """

    def __init__(self, block: LookupBlock, step: Step) -> None:
        self._block = block
        self._step = step

    def add_to(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """The FFN's output [T, d] with what the experts add, a new tensor; `hidden_states` [T, d]
        is what the FFN was given."""
        shape = output.shape
        rows = self._step.rows_for(hidden_states)
        batch = (1, *shape[-2:])
        added = self._block.add_to(output.view(batch), hidden_states.view(batch), rows)
        return added.view(shape)


class FFNWithExperts:
    """What an FFN with experts does differently."""

    lookup_name: str
    """By which the operation finds its block."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        return torch.ops.lookup_experts.add_in_block(hidden_states, output, self.lookup_name)


@cache
def _with_experts(ffn: Any, forward: Any) -> Any:
    """The class of FFNs once they have experts.

    Args:
        ffn: their class.
        forward: what they do instead of what their class says; None: nothing.
    """
    plain = ffn if forward is None else type(ffn.__name__, (ffn,), {"forward": forward})
    return type(f"{ffn.__name__}WithExperts", (FFNWithExperts, plain), {})


def place_block(ffn: Any, block: LookupBlock, name: str, step: Step, vllm_config: Any) -> None:
    """Have what `block` gives added to the output of `ffn`, from now on.

    Args:
        name: of the FFN, as no other of vLLM's layers is called.
        step: of its model.
        vllm_config: with the context in which the operation looks.
    """
    ffn.add_module("lookup_experts", block)
    ffn.lookup_name = f"{name}.lookup_experts"
    # vLLM gives the modules that it takes from transformers a `forward` of their own.
    own_forward = ffn.__dict__.pop("forward", None)
    plain: Any = type(ffn)
    ffn.__class__ = _with_experts(plain, getattr(own_forward, "__func__", None))
    step.num_blocks += 1
    known = vllm_config.compilation_config.static_forward_context
    assert ffn.lookup_name not in known, f"two blocks are called {ffn.lookup_name}"
    known[ffn.lookup_name] = PlacedBlock(block, step)


def _add_in_block(hidden_states: Tensor, output: Tensor, block: str) -> Tensor:
    return get_forward_context().no_compile_layers[block].add_to(output, hidden_states)


def _shape_of_sum(hidden_states: Tensor, output: Tensor, block: str) -> Tensor:
    return torch.empty_like(output)


_library = Library("lookup_experts", "FRAGMENT")
direct_register_custom_op(
    OPERATION.partition("::")[2],
    _add_in_block,
    fake_impl=_shape_of_sum,
    target_lib=_library,
)
