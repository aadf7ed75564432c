"""The paper's layer without the idea of unique ids: every expert is evaluated at every position.

The reference of `FFNExperts`, in the plainest operations: what training cost before, and what it
must give. Tests and `mole bench train` use it; `model.set_expert_source` takes it.
"""

from typing import Any

import torch
from torch import Tensor, nn


class PerPositionRows:
    """The rows of every position of a batch, as if each had an id of its own."""

    def __init__(self, token_ids: Tensor, embeddings: Tensor) -> None:
        self.index = torch.arange(token_ids.numel(), device=token_ids.device).view(token_ids.shape)
        self._token_ids = token_ids.reshape(-1)
        self._embeddings = embeddings

    @property
    def num_positions(self) -> int:
        """See `TokenRows.num_positions`."""
        return self.index.numel()

    def layer(self, layer: int, experts: Any = None) -> Tensor:
        """See `TokenRows.layer`."""
        return experts.forward_reference(self._embeddings, self._token_ids)

    def mix(self, layer: int, weights: Tensor, experts: Any = None) -> Tensor:
        """See `TokenRows.mix`."""
        rows = self.layer(layer, experts)
        return torch.einsum("tnd,tn->td", rows, weights.to(rows.dtype))


class PerPositionExperts:
    """The `ExpertSource` of a model in training form, per position."""

    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: Any = None
    ) -> PerPositionRows:
        """See `ExpertSource.rows`."""
        embedding: nn.Module = base_model.get_input_embeddings()
        return PerPositionRows(token_ids, embedding(token_ids.reshape(-1)))
