"""The contract between a model's blocks and what brings their experts' outputs.

A block adds `rows.mix(layer, weights)` to its FFN's output and never knows where rows come from: an
`ExpertSource` gives those of a batch when its token ids enter the model. Training form computes
them (`experts.py`), table form reads them (`table/reader.py`, which knows of this package only what
is in this file).

Shapes: B batch, T tokens, U unique token ids, N experts, d hidden size.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.errors import TableError


class TokenRows(Protocol):
    """The expert outputs of one batch, layer by layer."""

    @property
    def index(self) -> Tensor:
        """[B, T] int64: position -> place of its token id among the unique ids."""
        ...

    @property
    def num_positions(self) -> int:
        """B·T."""
        ...

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        """[U, N, d]: what the experts of the given layer (0 to L - 1) say of each unique id.

        Args:
            experts: the block's own, for rows that are computed rather than read. They are
                handed in by the block, so that whoever wraps, copies or moves them is heeded.
        """
        ...

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        """[B·T, d]: `mix(layer(layer, experts), index.view(-1), weights)`, weights [B·T, N]."""
        ...


class FusedRows(TokenRows, Protocol):
    """Rows that can also do all of a block's part in one go. Optional, for decoding, where a step
    has many small operations."""

    def route_mix_add(
        self, layer: int, hidden_states: Tensor, router: Tensor, output: Tensor
    ) -> Tensor | None:
        """The FFN's output with what the layer's experts add; no gradients.

        Args:
            hidden_states: [..., d], what the FFN was given; B·T positions.
            router: [N, d], the router's weight.
            output: [..., d], what the FFN gave; it isn't written to.

        Returns:
            Like `output`; None where several operations do it better, or with a clearer error.
        """
        ...


class EmbeddingRows(Protocol):
    """The rows of one batch as an embedding gives them: one per id and layer, not mixed."""

    in_parts: bool
    """Whether layers are read one after the other, so that asking for all costs memory."""

    @property
    def index(self) -> Tensor:
        """See `TokenRows.index`; of ids of any shape."""
        ...

    @property
    def row_size(self) -> int:
        """r, the numbers of one id in one layer."""
        ...

    def layer(self, layer: int) -> Tensor:
        """[U, 1, r]: of the given layer, waited for."""
        ...

    def every_layer(self) -> Tensor:
        """[U, L, 1, r]: of all layers, waited for; not `in_parts`."""
        ...


class EmbeddingSource(Protocol):
    """Where the rows of an embedding come from."""

    def rows(self, token_ids: Tensor) -> EmbeddingRows:
        """Of ids int64 [...]; reading has begun when this returns."""
        ...


class Addition(Protocol):
    """What a block's experts add to its FFN's output, begun with what the FFN is given.

    Attributes:
        is_deferred: whether it had better wait for the addition after this one.
    """

    is_deferred: bool

    def add_to(self, output: Tensor, residual: Tensor | None = None) -> Tensor:
        """The sum; no gradients.

        Args:
            output: [..., d], what the FFN gave, in the model's dtype and on its device; it isn't
                written to.
            residual: like `output`: what else is added.
        """
        ...


class StepRows(TokenRows, Protocol):
    """Rows for which a block's part can begin before its FFN does. Optional, for decoding on a
    GPU. What is begun must be added, or at least asked for; no gradients."""

    def begin_routed(
        self, layer: int, hidden_states: Tensor, router: Tensor, out_proj: Tensor | None
    ) -> Addition | None:
        """Rows weighed by a router.

        Args:
            hidden_states: [..., d], what the FFN is given; B·T positions.
            router: [N, d], the router's weight.
            out_proj: [d, r], the weight of the product behind the sum; None: rows are of d.

        Returns:
            None where other ways do it better, or with a clearer error.
        """
        ...

    def begin_gated(
        self,
        layer: int,
        hidden_states: Tensor,
        gate: Tensor,
        out_proj: Tensor,
        norm: Tensor,
        epsilon: float,
    ) -> Addition | None:
        """One row beside a gate: RMSNorm(out_proj · (sigmoid(gate · h) + row)).

        Args:
            gate: [r, d].
            out_proj: [d, r].
            norm: [d], the weight of the norm.
            epsilon: of the norm.
            others: as in `begin_routed`.
        """
        ...


class ExpertSource(Protocol):
    """Where expert outputs come from."""

    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: nn.Module | None = None
    ) -> TokenRows | None:
        """Take a batch's token ids [B, T] int64; called once per forward, before any layer. None:
        nothing is added in this forward.

        Args:
            ready: True where blocks can't wait for rows later on: in a compiled graph.
            base_model: the model that they enter, for a source that computes rows from its
                embedding.
        """
        ...


def check_bounds(low: int, high: int, vocab_size: int) -> None:
    """Raise a `TableError` unless ids from `low` to `high` are in a table of so many."""
    if low < 0 or high >= vocab_size:
        raise TableError(
            f"Token id {low if low < 0 else high} is outside of the table's vocabulary (0 to "
            f"{vocab_size - 1}). Is this the tokenizer that belongs to the model?"
        )


def leave(rows: TokenRows | None) -> None:
    """Tell rows, if there are any and they ask for it, that their forward pass is over."""
    told = getattr(rows, "leave", None)
    if told is not None:
        told()


def mix(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each position's weighted sum of its token's expert outputs.

    Gathers and adds in one pass, so no [B, T, N, d] tensor is ever made, forward or backward.

    Args:
        rows: [U, N, d] floating point. Any strides of whole rows will do without a copy: a
            slice of flat table records, or the view that `LayerExperts` gives.
        index: [...] int64, position -> place in `rows`.
        weights: [..., N] floating point; rounded to the rows' dtype.

    Returns:
        [..., d] in the rows' dtype.
    """
    num_experts, hidden_size = rows.shape[1:]
    flat, id_step, expert_step = _flat_rows(rows)
    experts = torch.arange(num_experts, device=index.device) * expert_step
    bags = index.reshape(-1, 1) * id_step + experts
    mixed = F.embedding_bag(
        bags,
        flat,
        mode="sum",
        per_sample_weights=weights.reshape(-1, num_experts).to(rows.dtype),
    )
    return mixed.view(*index.shape, hidden_size)


def mix_reference(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`mix` by the book: gather [..., N, d], then an einsum."""
    return torch.einsum("...nd,...n->...d", rows[index], weights.to(rows.dtype))


def _flat_rows(rows: Tensor) -> tuple[Tensor, int, int]:
    """A [M, d] view over [U, N, d], and how many of its rows lie between ids and experts."""
    num_ids, num_experts, hidden_size = rows.shape
    if rows.transpose(0, 1).is_contiguous():
        return rows.transpose(0, 1).reshape(-1, hidden_size), 1, num_ids
    id_stride, expert_stride, unit = rows.stride()
    if unit == 1 and id_stride % hidden_size == 0 and expert_stride == hidden_size:
        id_step = id_stride // hidden_size
        num_rows = (num_ids - 1) * id_step + num_experts if num_ids else 0
        return rows.as_strided((num_rows, hidden_size), (hidden_size, 1)), id_step, 1
    return rows.reshape(-1, hidden_size), num_experts, 1
