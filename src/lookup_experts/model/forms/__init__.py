"""How a row is made in training, and how it is read: a file for each form.

A form is a module of this package, named as in `LookupSettings.row_form`, that has

- `new_maker(settings, sizes)`: the module that makes a layer's rows in training form. Called with
  what `inputs` gives for U unique ids, [U, e], and the ids themselves, int64 [U], it gives rows
  [N, U, r], contiguous.
- `inputs(embeddings, settings)`: what every layer's maker sees of embeddings [U, e].
- `new_reader(layer, settings, sizes)`: a `LookupBlock`, which reads the rows in a block.
- `HAS_ROUTER`: whether several rows are mixed by a router, whose weights an observer is told.
- `defaults(hidden_size, ffn_size)`: the `Defaults` of what was left open.
- `check(settings)`: raises a `UserError` for settings that don't fit the form.
- `initialize(block, init, std)`: gives a block's weights, reader and maker, their first values.
- `resize(block, vocab_size, std)`: makes a block's maker one for so many ids; what it has of new
  ones begins as in `initialize`.

Makers and readers have `kept_numbers`: about how many numbers autograd keeps for a backward pass,
of one unique id and of one position.

What makes a row is folded into the table; what reads it stays with the model.

Shapes: B batch, T tokens, U unique token ids, N rows per id and layer, r numbers of a row, e
embedding size, d hidden size.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.model.rows import Addition, StepRows, TokenRows

RowObserver = Callable[[int, Tensor], None]
"""Told how every block weighs its rows, as (layer, weights [B·T, N])."""


def get_form(name: str) -> Any:
    """The module of a form."""
    form: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return form


@dataclass(frozen=True)
class Sizes:
    """Of the backbone that rows are made for."""

    vocab_size: int
    embedding_size: int
    """e"""
    hidden_size: int
    """d"""


@dataclass(frozen=True)
class Defaults:
    """Of a form: what `LookupSettings` has where nothing was said."""

    num_experts: int
    expert_size: int
    expert_kind: str


def shapes_of_layer(settings: Any, sizes: Sizes) -> tuple[Any, Any]:
    """The maker and the reader of one layer on the meta device: shapes without memory.

    Args:
        settings: a `LookupSettings`.
        sizes: of the backbone.
    """
    form = get_form(settings.row_form)
    with torch.device("meta"):
        return form.new_maker(settings, sizes), form.new_reader(0, settings, sizes)


class LookupBlock(nn.Module):
    """What a block gains: it reads the rows of its tokens. In training form its child `routed`
    makes them.

    Args:
        layer: the block's place among the blocks that have experts, 0 to L - 1.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, rows: TokenRows, observe: RowObserver | None = None
    ) -> Tensor:
        """[..., d], the input of the block's FFN -> [..., d], what is added to its output."""
        raise NotImplementedError

    def begin(self, hidden_states: Tensor, rows: StepRows) -> Addition | None:
        """What `add_to` would do, begun before the FFN computes; no gradients.

        None where `rows` can't, or where a part of the block is of a kind of its own: an adapter,
        a quantised weight, somebody's hook.
        """
        return None

    def add_to(
        self,
        output: Tensor,
        hidden_states: Tensor,
        rows: TokenRows,
        observe: RowObserver | None = None,
    ) -> Tensor:
        """`output`, [..., d], with what `forward` gives, in fewer operations; no gradients.

        `output` isn't written to: it may be kept by others.
        """
        return output + self(hidden_states, rows, observe).view(output.shape)

    @property
    def maker(self) -> Any:
        """What makes the rows, in training form; None where they come from a table."""
        return self._modules.get("routed")


def plain_weights(*modules: Any) -> list[nn.Parameter] | None:
    """The weights of linear maps without a bias, to compute with; None where calling one of them
    does anything else, or a weight is of a kind of its own (quantised)."""
    weights = [module._parameters.get("weight") for module in modules]
    for module, weight in zip(modules, weights, strict=True):
        if (
            not is_called_plainly(module, nn.Linear)
            or type(weight) is not nn.Parameter
            or module._parameters["bias"] is not None
        ):
            return None
    return weights


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing beside: no adapter took its
    place, and nobody hooks it."""
    return type(module) is kind and is_unhooked(module)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says and nothing beside."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )
