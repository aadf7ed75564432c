"""Rows of the whole vocabulary, whichever ids are in a batch.

The number of unique ids changes from batch to batch, and finding them makes a GPU wait; a small
vocabulary is evaluated whole. The rows of an id, and so losses and gradients, are those of
`FFNExperts`, and every shape is known beforehand, as a CUDA graph wants it.
"""

from typing import Any

import torch
from torch import Tensor

from lookup_experts.model.computed_rows import FFNExperts


class EveryId(FFNExperts):
    """`FFNExperts` that evaluate every id."""

    def rows(self, token_ids: Tensor, ready: bool = False, base_model: Any = None) -> Any:
        """See `ExpertSource.rows`."""
        vocab_size = base_model.get_input_embeddings().weight.shape[0]
        every = torch.arange(vocab_size, device=token_ids.device)
        return _Rows(token_ids, made_from=(self.inputs(every, base_model), every))


class MadeRows:
    """An `ExpertSource` of rows that were made before.

    Args:
        layers: [N, V, r] each.
    """

    def __init__(self, layers: list[Tensor]) -> None:
        self._layers = layers

    def rows(self, token_ids: Tensor, ready: bool = False, base_model: Any = None) -> Any:
        """See `ExpertSource.rows`."""
        return _Rows(token_ids, layers=self._layers)


class _Rows:
    """`TokenRows`, made when a layer asks for them, or before."""

    def __init__(
        self,
        index: Tensor,
        made_from: tuple[Tensor, Tensor] | None = None,
        layers: list[Tensor] | None = None,
    ) -> None:
        self.index = index
        self._made_from, self._layers = made_from, layers

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return self.index.numel()

    def layer(self, layer: int, experts: Any = None) -> Tensor:
        """See `TokenRows.layer`."""
        return self._rows_of(layer, experts).transpose(0, 1)

    def mix(self, layer: int, weights: Tensor, experts: Any = None) -> Tensor:
        """See `TokenRows.mix`."""
        # Not `embedding_bag`: the backward pass of this needs no sorting.
        rows = self._rows_of(layer, experts)
        picked = rows.index_select(1, self.index.reshape(-1))
        return (picked * weights.to(rows.dtype).t().unsqueeze(2)).sum(0)

    def _rows_of(self, layer: int, experts: Any) -> Tensor:
        """[N, V, r]"""
        if self._made_from is None:
            assert self._layers is not None
            return self._layers[layer]
        rows: Tensor = experts(*self._made_from)
        return rows
