"""MeKi's form taken apart, and its parts on several mixed rows.

    made:  row_j = norm(static_j[id] + β · SwiGLU_j(e)) · α             [N, U, r]
    read:  norm(W_out · (sigmoid(W_gate · h) + sum_j router_j · row_j))  [..., d]

Each part may be left out. With all of `MEKI` and one row this is the form `meki`, which a test
holds it to.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.model.expert_products import expert_outputs, normalize
from lookup_experts.model.forms import LookupBlock, RowObserver, Sizes
from lookup_experts.model.rows import TokenRows

MEKI = ("static", "computed", "row_norm", "gate", "out_norm")
OTHERS = ("product_gate", "input_norm")
"""A gate that multiplies the row, and RMS-normalised embeddings for what is computed."""


class PartsRows(nn.Module):
    """What makes a layer's rows.

    Args:
        parts: of `MEKI` and `OTHERS`; `static`, `computed` or both.
        num_rows: N.
        sizes: of the backbone.
        expert_size: D, the hidden size of each SwiGLU.
        row_size: r.
        eps: of the norms.
    """

    def __init__(
        self,
        parts: Collection[str],
        num_rows: int,
        sizes: Sizes,
        expert_size: int,
        row_size: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_experts, self.row_size, self._eps = num_rows, row_size, eps
        self._normalizes_inputs = "input_norm" in parts
        self.static: Any = None
        self.gate_proj: Any = None
        self.mix_norm: Any = None
        if "static" in parts:
            self.static = nn.Embedding(sizes.vocab_size, num_rows * row_size)
        if "computed" in parts:
            into = (num_rows, expert_size, sizes.embedding_size)
            self.gate_proj = nn.Parameter(torch.empty(into))
            self.up_proj = nn.Parameter(torch.empty(into))
            self.down_proj = nn.Parameter(torch.empty(num_rows, row_size, expert_size))
            self.beta_scale = nn.Parameter(torch.empty(1))
        if "row_norm" in parts:
            self.mix_norm = nn.RMSNorm(row_size, eps=eps)
            self.alpha_scale = nn.Parameter(torch.empty(1))

    def inputs(self, embeddings: Tensor) -> Tensor:
        """What `forward` takes of embeddings [U, e]."""
        return embeddings

    def forward(self, embeddings: Tensor, unique_ids: Tensor) -> Tensor:
        """Embeddings [U, e] of unique ids [U] -> rows [N, U, r]."""
        rows: Any = 0.0
        if self.gate_proj is not None:
            seen = normalize(embeddings, self._eps) if self._normalizes_inputs else embeddings
            into = [self.gate_proj, self.up_proj]
            rows = self.beta_scale * expert_outputs("swiglu", seen, into, self.down_proj)
        if self.static is not None:
            static = self.static(unique_ids).unflatten(1, (self.num_experts, self.row_size))
            rows = rows + static.transpose(0, 1)
        if self.mix_norm is not None:
            rows = self.mix_norm(rows) * self.alpha_scale
        return rows


class PartsBlock(LookupBlock):
    """What reads the rows of a position.

    Args:
        layer: see `LookupBlock`.
        parts: as of `PartsRows`.
        num_rows: N.
        hidden_size: d.
        row_size: r.
        eps: of the norm.
    """

    def __init__(
        self,
        layer: int,
        parts: Collection[str],
        num_rows: int,
        hidden_size: int,
        row_size: int,
        eps: float,
    ) -> None:
        super().__init__(layer)
        self._multiplies = "product_gate" in parts
        self.router: Any = None
        self.gate_proj: Any = None
        self.post_norm: Any = None
        if num_rows > 1:
            self.router = nn.Linear(hidden_size, num_rows, bias=False)
        if "gate" in parts or self._multiplies:
            self.gate_proj = nn.Linear(hidden_size, row_size, bias=False)
        self.out_proj = nn.Linear(row_size, hidden_size, bias=False)
        if "out_norm" in parts:
            self.post_norm = nn.RMSNorm(hidden_size, eps=eps)

    def forward(
        self, hidden_states: Tensor, rows: TokenRows, observe: RowObserver | None = None
    ) -> Tensor:
        """See `LookupBlock.forward`."""
        weights = hidden_states.new_ones(rows.num_positions, 1)
        if self.router is not None:
            weights = self.router(hidden_states).flatten(0, -2).softmax(-1, torch.float32)
        read = rows.mix(self.layer, weights, self.maker).view(*hidden_states.shape[:-1], -1)
        if self.gate_proj is not None:
            gate = torch.sigmoid(self.gate_proj(hidden_states))
            read = gate * read if self._multiplies else gate + read
        added = self.out_proj(read)
        return added if self.post_norm is None else self.post_norm(added)
