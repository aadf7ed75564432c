"""The paper's layer without the idea of unique ids: every expert is evaluated at every position.

The reference of `FFNExperts`, in the plainest operations: what training cost before, and what it
must give. Tests and `mole bench train` use it; `model.set_expert_source` takes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lookup_experts.model.experts import LayerExperts


class PerPositionRows:
    """The rows of every position of a batch, as if each had an id of its own."""

    def __init__(self, index: Tensor, embeddings: Tensor, layers: Sequence[LayerExperts]) -> None:
        self.index = index
        self._embeddings = embeddings
        self._layers = layers

    @property
    def num_positions(self) -> int:
        return self.index.numel()

    def layer(self, layer: int) -> Tensor:
        return self._layers[layer].forward_reference(self._embeddings)

    def mix(self, layer: int, weights: Tensor) -> Tensor:
        rows = self.layer(layer)
        return torch.einsum("tnd,tn->td", rows, weights.to(rows.dtype))


class PerPositionExperts:
    """Training form, per position. The arguments are those of `FFNExperts`."""

    def __init__(self, embedding: nn.Module, layers: Sequence[LayerExperts]) -> None:
        self._embedding = embedding
        self._layers = layers

    def rows(self, token_ids: Tensor, ready: bool = False) -> PerPositionRows:
        index = torch.arange(token_ids.numel(), device=token_ids.device).view(token_ids.shape)
        return PerPositionRows(index, self._embedding(token_ids.reshape(-1)), self._layers)
