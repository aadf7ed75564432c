"""MeKi's form (arXiv 2602.03359): one row per layer, static and computed, beside a gate.

    made:  row = norm(static[id] + β · SwiGLU(e)) · α                 [1, U, r]
    read:  norm(W_out · (sigmoid(W_gate · h) + row))                  [..., d]

The names of the parts are those of the authors' demonstration; sizes and behaviour are held to it
by a test.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.errors import UserError
from lookup_experts.model.forms import (
    Defaults,
    LookupBlock,
    RowObserver,
    Sizes,
    is_called_plainly,
    plain_weights,
)
from lookup_experts.model.rows import Addition, StepRows, TokenRows
from lookup_experts.model.settings import LookupSettings

HAS_ROUTER = False


def defaults(hidden_size: int, ffn_size: int) -> Defaults:
    """See `forms`."""
    return Defaults(num_experts=1, expert_size=hidden_size // 2, expert_kind="swiglu")


def check(settings: LookupSettings) -> None:
    """See `forms`."""
    if settings.num_experts != 1:
        raise UserError(
            f"The form 'meki' has one row per layer, not {settings.num_experts}; leave the number "
            "of experts out."
        )
    if settings.expert_kind != "swiglu":
        raise UserError(
            f"The form 'meki' computes its rows by 'swiglu', not {settings.expert_kind!r}; leave "
            "the kind out."
        )


def inputs(embeddings: Tensor, settings: LookupSettings) -> Tensor:
    """See `forms`: the embeddings as they are."""
    return embeddings


def new_maker(settings: LookupSettings, sizes: Sizes) -> "MekiRows":
    """See `forms`."""
    return MekiRows(
        sizes.vocab_size,
        sizes.embedding_size,
        settings.expert_size,
        settings.row_size or sizes.hidden_size,
        settings.norm_eps,
    )


def new_reader(layer: int, settings: LookupSettings, sizes: Sizes) -> "MekiBlock":
    """See `forms`."""
    row_size = settings.row_size or sizes.hidden_size
    return MekiBlock(layer, sizes.hidden_size, row_size, settings.norm_eps)


def initialize(block: Any, init: str, std: float) -> None:
    """See `forms`; `zero` is a last norm of zeros: the block adds nothing, and its first gradient
    is that norm's, from which on everything before it learns."""
    for weight in block.parameters():
        if weight.dim() < 2:  # norms and scales
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, 0.0, std)
    if init == "zero":
        nn.init.zeros_(block.post_norm.weight)


@torch.no_grad()
def resize(block: Any, vocab_size: int, std: float) -> None:
    """See `forms`: the static rows are cut, or gain rows."""
    static: nn.Embedding = block.routed.static
    before = static.weight
    kept = before[:vocab_size]
    added = before.new_empty(vocab_size - len(kept), static.embedding_dim)
    nn.init.normal_(added, 0.0, std)
    static.weight = nn.Parameter(torch.cat([kept, added]), before.requires_grad)
    static.num_embeddings = vocab_size


class MekiRows(nn.Module):
    """What makes a layer's rows.

    Args:
        vocab_size: V.
        embedding_size: e.
        expert_size: D, the hidden size of the SwiGLU.
        row_size: r.
        norm_eps: the epsilon of the RMSNorm on the row.
    """

    def __init__(
        self, vocab_size: int, embedding_size: int, expert_size: int, row_size: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.static = nn.Embedding(vocab_size, row_size)
        self.gate_proj = nn.Linear(embedding_size, expert_size, bias=False)
        self.up_proj = nn.Linear(embedding_size, expert_size, bias=False)
        self.down_proj = nn.Linear(expert_size, row_size, bias=False)
        self.mix_norm: Any = nn.RMSNorm(row_size, eps=norm_eps)
        # FSDP can't cut what has no dimension.
        self.alpha_scale = nn.Parameter(torch.ones(1))
        self.beta_scale = nn.Parameter(torch.ones(1))

    @property
    def identity(self) -> str:
        """What the rows depend on beside the weights; part of a table's fingerprint."""
        return f"meki {self.mix_norm.eps}"

    @property
    def num_experts(self) -> int:
        """1, the rows of one id."""
        return 1

    @property
    def row_size(self) -> int:
        """r"""
        return self.static.embedding_dim

    @property
    def evaluation_numbers(self) -> int:
        """How many numbers are held while one id is evaluated."""
        return 3 * self.gate_proj.out_features + 4 * self.row_size

    @property
    def kept_numbers(self) -> int:
        """See `forms`."""
        return 4 * self.gate_proj.out_features + 3 * self.row_size

    def inputs(self, embeddings: Tensor) -> Tensor:
        """What `forward` takes of embeddings [U, e]."""
        return embeddings

    def forward(self, embeddings: Tensor, unique_ids: Tensor) -> Tensor:
        """Embeddings [U, e] of unique ids [U] -> rows [1, U, r]."""
        computed = self.down_proj(F.silu(self.gate_proj(embeddings)) * self.up_proj(embeddings))
        row = self.mix_norm(self.static(unique_ids) + self.beta_scale * computed)
        return (row * self.alpha_scale).unsqueeze(0)

    def forward_reference(self, embeddings: Tensor, unique_ids: Tensor) -> Tensor:
        """[U, e], [U] -> [U, 1, r]: the same by the formula, in the plainest operations."""
        gated = F.silu(embeddings @ self.gate_proj.weight.T) * (embeddings @ self.up_proj.weight.T)
        row = self.static.weight[unique_ids] + self.beta_scale * (gated @ self.down_proj.weight.T)
        scale = torch.rsqrt(row.square().mean(-1, keepdim=True) + self.mix_norm.eps)
        return (row * scale * self.mix_norm.weight * self.alpha_scale).unsqueeze(1)


class MekiBlock(LookupBlock):
    """What reads the row of a position.

    Args:
        layer: see `LookupBlock`.
        hidden_size: d.
        row_size: r.
        norm_eps: the epsilon of the RMSNorm on what is added.
    """

    def __init__(self, layer: int, hidden_size: int, row_size: int, norm_eps: float) -> None:
        super().__init__(layer)
        self.gate_proj = nn.Linear(hidden_size, row_size, bias=False)
        self.out_proj = nn.Linear(row_size, hidden_size, bias=False)
        self.post_norm = nn.RMSNorm(hidden_size, eps=norm_eps)

    @property
    def kept_numbers(self) -> int:
        """See `forms`."""
        return self.out_proj.out_features + 2 * self.out_proj.in_features

    def forward(
        self, hidden_states: Tensor, rows: TokenRows, observe: RowObserver | None = None
    ) -> Tensor:
        """See `LookupBlock.forward`. There is no weighing to observe."""
        gate = torch.sigmoid(self.gate_proj(hidden_states))
        one = gate.new_ones(rows.num_positions, 1)
        row = rows.mix(self.layer, one, self.maker).view(gate.shape)
        return self.post_norm(self.out_proj(gate + row)).to(hidden_states.dtype)

    def begin(self, hidden_states: Tensor, rows: StepRows) -> Addition | None:
        """See `LookupBlock.begin`."""
        weights = plain_weights(self._modules["gate_proj"], self._modules["out_proj"])
        norm: Any = self._modules["post_norm"]
        scale = norm._parameters.get("weight")
        if (
            weights is None
            or not is_called_plainly(norm, nn.RMSNorm)
            or type(scale) is not nn.Parameter
            or norm.eps is None
        ):
            return None
        gate, out_proj = weights
        return rows.begin_gated(self.layer, hidden_states, gate, out_proj, scale, norm.eps)
