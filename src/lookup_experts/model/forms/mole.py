"""The paper's form (arXiv 2503.15798, section 3): N experts per layer, mixed by a router.

    made:  rows_j = FFN_j(norm(e))                                    [N, U, r]
    read:  W_out · sum_j softmax(h · router)_j · rows_j               [..., d]

In the paper rows are as wide as the model, r = d, and there is no W_out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.errors import unknown_name
from lookup_experts.model.expert_products import (
    EXPERT_KINDS,
    NormWeight,
    expert_outputs,
    normalize,
)
from lookup_experts.model.fast_linears import PackedLinear
from lookup_experts.model.forms import (
    Defaults,
    LookupBlock,
    RowObserver,
    Sizes,
    is_called_plainly,
    is_unhooked,
    plain_weights,
)
from lookup_experts.model.router_losses import record_logits
from lookup_experts.model.rows import Addition, StepRows, TokenRows
from lookup_experts.model.settings import LookupSettings

HAS_ROUTER = True
_LINEAR_KINDS = (nn.Linear, PackedLinear)
"""Of a router that nobody replaced; its weight is plain."""


def defaults(hidden_size: int, ffn_size: int) -> Defaults:
    """See `forms`."""
    return Defaults(num_experts=4, expert_size=ffn_size, expert_kind="gelu")


def check(settings: LookupSettings) -> None:
    """See `forms`."""
    if settings.expert_kind not in EXPERT_KINDS:
        raise unknown_name("expert kind", settings.expert_kind, EXPERT_KINDS)


def inputs(embeddings: Tensor, settings: LookupSettings) -> Tensor:
    """See `forms`."""
    return normalize(embeddings, settings.norm_eps)


def new_maker(settings: LookupSettings, sizes: Sizes) -> "LayerExperts":
    """See `forms`."""
    return LayerExperts(
        settings.num_experts,
        sizes.embedding_size,
        settings.expert_size,
        settings.row_size or sizes.hidden_size,
        settings.expert_kind,
        settings.norm_eps,
    )


def new_reader(layer: int, settings: LookupSettings, sizes: Sizes) -> "LookupExperts":
    """See `forms`."""
    return LookupExperts(layer, sizes.hidden_size, settings.num_experts, settings.row_size)


def initialize(block: Any, init: str, std: float) -> None:
    """See `forms`; `zero` silences what the experts say, so that the block adds nothing."""
    experts = block.routed
    nn.init.ones_(experts.norm.weight)
    for name, weight in experts.named_parameters(recurse=False):
        if init == "zero" and name == "down_proj":
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 0.0, std)
    nn.init.normal_(block.router.weight, 0.0, std)
    if block.out_proj is not None:
        nn.init.normal_(block.out_proj.weight, 0.0, std)


def resize(block: Any, vocab_size: int, std: float) -> None:
    """See `forms`: experts know embeddings, not ids."""


class LayerExperts(nn.Module):
    """The N routed experts of one layer as batched weights.

    Each expert is an FFN on the RMS-normalised embedding: `gelu`, the paper's,
    `down(gelu(up(x)))` with the exact GELU and no gate, or `swiglu`, `down(silu(gate(x)) * up(x))`.
    Weights keep the layout of `nn.Linear`, [out, in], with the expert in front.

    Args:
        num_experts: N.
        embedding_size: e, what comes in.
        expert_size: D, the hidden size of each expert.
        row_size: r, what goes out.
        kind: one of `EXPERT_KINDS`.
        norm_eps: the epsilon of the RMSNorm on the embedding.
    """

    def __init__(
        self,
        num_experts: int,
        embedding_size: int,
        expert_size: int,
        row_size: int,
        kind: str = "gelu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if kind not in EXPERT_KINDS:
            raise unknown_name("expert kind", kind, EXPERT_KINDS)
        self.kind = kind
        self.norm_eps = norm_eps
        self.norm = NormWeight(embedding_size)
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_size, embedding_size))
        if kind == "swiglu":
            self.gate_proj = nn.Parameter(torch.empty(num_experts, expert_size, embedding_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, row_size, expert_size))

    @property
    def identity(self) -> str:
        """What the rows depend on beside the weights; part of a table's fingerprint."""
        return f"{self.kind} {self.norm_eps}"

    @property
    def num_experts(self) -> int:
        """N"""
        return self.down_proj.shape[0]

    @property
    def row_size(self) -> int:
        """r"""
        return self.down_proj.shape[1]

    @property
    def evaluation_numbers(self) -> int:
        """How many numbers are held while one id is evaluated."""
        num_experts, row_size, expert_size = self.down_proj.shape
        return num_experts * (expert_size * (3 if self.kind == "swiglu" else 2) + 2 * row_size)

    @property
    def kept_numbers(self) -> int:
        """See `forms`."""
        num_experts, row_size, expert_size = self.down_proj.shape
        return num_experts * (expert_size * (3 if self.kind == "swiglu" else 2) + row_size)

    def inputs(self, embeddings: Tensor) -> Tensor:
        """What `forward` takes of embeddings [U, e]."""
        return normalize(embeddings, self.norm_eps)

    def forward(self, normalized: Tensor, unique_ids: Tensor | None = None) -> Tensor:
        """[U, e], what `normalize` gives -> [N, U, r], contiguous; of the ids alone it knows
        nothing."""
        into = [self.up_proj]
        if self.kind == "swiglu":
            into.insert(0, self.gate_proj)
        return expert_outputs(self.kind, self.norm(normalized), into, self.down_proj)

    def forward_reference(self, embeddings: Tensor, unique_ids: Tensor | None = None) -> Tensor:
        """[U, e] -> [U, N, r]: the same from the embeddings themselves, one expert after the
        other."""
        size = embeddings.shape[-1:]
        inputs = F.rms_norm(embeddings, size, self.norm.weight, self.norm_eps)
        outputs = []
        for expert in range(self.up_proj.shape[0]):
            hidden = F.linear(inputs, self.up_proj[expert])
            if self.kind == "swiglu":
                hidden = F.silu(F.linear(inputs, self.gate_proj[expert])) * hidden
            else:
                hidden = F.gelu(hidden)
            outputs.append(F.linear(hidden, self.down_proj[expert]))
        return torch.stack(outputs, dim=1)


class LookupExperts(LookupBlock):
    """A router on the hidden state, and the mixed rows of the tokens.

    Args:
        layer: see `LookupBlock`.
        hidden_size: d.
        num_experts: N.
        row_size: r; None: d, the paper's.
    """

    def __init__(
        self, layer: int, hidden_size: int, num_experts: int, row_size: int | None = None
    ) -> None:
        super().__init__(layer)
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.out_proj: nn.Linear | None = None
        if row_size is not None and row_size != hidden_size:
            self.out_proj = nn.Linear(row_size, hidden_size, bias=False)

    @property
    def kept_numbers(self) -> int:
        """See `forms`; the index and the weights of the sum aside."""
        return 0 if self.out_proj is None else self.out_proj.in_features

    def forward(
        self, hidden_states: Tensor, rows: TokenRows, observe: RowObserver | None = None
    ) -> Tensor:
        """See `LookupBlock.forward`."""
        added = self.mixed(hidden_states, rows, observe)
        if self.out_proj is not None:
            apart = added.to(self.out_proj.weight.dtype).view(*hidden_states.shape[:-1], -1)
            added = self.out_proj(apart)
        return added.view(hidden_states.shape).to(hidden_states.dtype)

    def mixed(
        self, hidden_states: Tensor, rows: TokenRows, observe: RowObserver | None = None
    ) -> Tensor:
        """[B·T, r] in the rows' dtype: each position's rows, weighed by the router."""
        weights = self.router_weights(hidden_states)
        if observe is not None:
            observe(self.layer, weights)
        return rows.mix(self.layer, weights, self.maker)

    def router_weights(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [B·T, N], a softmax over all experts, computed in float32.

        The router sees the hidden states in their own shape: whose adapters differ between the
        sequences of a batch needs to know these apart.

        The result is float32 where gradients are taken, else in the dtype of the hidden states:
        the kernels compute the softmax of a shorter type in float32 and round its result, so that
        is what rounding afterwards gives, for one operation less.
        """
        logits = self.router_logits(hidden_states)
        if torch.is_grad_enabled():
            record_logits(logits)
            return logits.softmax(dim=-1, dtype=torch.float32)
        return logits.softmax(dim=-1)

    def router_logits(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [B·T, N]"""
        router: Any = self._modules["router"]
        # In a step of decoding, calling a module takes longer than this product.
        is_plain = type(router) in _LINEAR_KINDS and is_unhooked(router)
        logits: Tensor = (router.forward if is_plain else router)(hidden_states)
        return logits.flatten(0, -2)

    def begin(self, hidden_states: Tensor, rows: StepRows) -> Addition | None:
        """See `LookupBlock.begin`."""
        router, out_proj = self._modules["router"], self._modules.get("out_proj")
        weights = plain_weights(*[router] if out_proj is None else [router, out_proj])
        if weights is None:
            return None
        return rows.begin_routed(
            self.layer, hidden_states, weights[0], None if out_proj is None else weights[1]
        )

    def add_to(
        self,
        output: Tensor,
        hidden_states: Tensor,
        rows: TokenRows,
        observe: RowObserver | None = None,
    ) -> Tensor:
        """See `LookupBlock.add_to`."""
        if self.out_proj is not None:
            return self._add_narrow(output, hidden_states, rows, observe)
        # In a step of decoding, calls and new tensors take longer than the numbers in them.
        added = None if observe is not None else self._fused(output, hidden_states, rows)
        if added is not None:
            return added
        mixed = self.mixed(hidden_states, rows, observe)
        if mixed.dtype != output.dtype:
            return output + mixed.to(hidden_states.dtype).view(output.shape)
        return mixed.view_as(output).add_(output)

    def _add_narrow(
        self,
        output: Tensor,
        hidden_states: Tensor,
        rows: TokenRows,
        observe: RowObserver | None,
    ) -> Tensor:
        out_proj: Any = self._modules["out_proj"]
        mixed = self.mixed(hidden_states, rows, observe)
        weight = out_proj._parameters.get("weight")
        if is_called_plainly(out_proj, nn.Linear) and (
            output.dtype == mixed.dtype == weight.dtype and type(output) is Tensor
        ):
            flat = output.reshape(-1, output.shape[-1])
            return torch.addmm(flat, mixed, weight.t()).view(output.shape)
        apart = mixed.view(*hidden_states.shape[:-1], -1)
        return output + out_proj(apart).to(output.dtype).view(output.shape)

    def _fused(self, output: Tensor, hidden_states: Tensor, rows: TokenRows) -> Tensor | None:
        """The FFN's output [..., d] with what the experts add, by `FusedRows`.

        None where the rows are none of these, or where the router or a tensor is of a kind of its
        own (an adapter, a quantised weight). The result of the operations apart, `mixed`, is
        rounded more often in a 16-bit type.
        """
        route_mix_add = getattr(rows, "route_mix_add", None)
        if route_mix_add is None:
            return None
        router: Any = self._modules["router"]
        weight = router._parameters.get("weight")
        if (
            type(router) not in _LINEAR_KINDS
            or not is_unhooked(router)
            or type(weight) is not nn.Parameter
            or router._parameters["bias"] is not None
            or not (type(hidden_states) is type(output) is Tensor)
        ):
            return None
        return route_mix_add(self.layer, hidden_states, weight, output)
