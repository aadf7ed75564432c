"""Routed experts on the token embedding, their router, and the weighted sum.

The layer of Mixture of Lookup Experts (arXiv 2503.15798, section 3):

    h' = h + FFN_shared(h) + sum_j softmax(h r)_j * FFN_j(e)

`FFN_shared` is the backbone's own FFN and is not here. Where the outputs `FFN_j(e)` come from is
an `ExpertSource`: `FFNExperts` evaluates them (training form); `table/reader.py` has the other
one, which reads them from a table. `attach.py` puts `LookupExperts` into a model's blocks.

Shapes: B batch, T tokens, U unique token ids, N experts, L layers with experts, d hidden size,
e embedding size, D hidden size of an expert.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.expert_products import expert_outputs
from lookup_experts.model.positions import Positions, mix_positions
from lookup_experts.model.rows import ExpertSource, TokenRows

EXPERT_KINDS = ("gelu", "swiglu")

RouterObserver = Callable[[int, Tensor], None]


class LayerExperts(nn.Module):
    """The N routed experts of one layer as batched weights.

    Each expert is an FFN on the RMS-normalised embedding: `gelu`, the paper's,
    `down(gelu(up(x)))` with the exact GELU and no gate, or `swiglu`, `down(silu(gate(x)) * up(x))`.
    Weights keep the layout of `nn.Linear`, [out, in], with the expert in front.

    Args:
        num_experts: N.
        embedding_size: e, what comes in.
        expert_size: D, the hidden size of each expert.
        hidden_size: d, what goes out.
        kind: one of `EXPERT_KINDS`.
        norm_eps: the epsilon of the RMSNorm on the embedding.
    """

    def __init__(
        self,
        num_experts: int,
        embedding_size: int,
        expert_size: int,
        hidden_size: int,
        kind: str = "gelu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if kind not in EXPERT_KINDS:
            raise unknown_name("expert kind", kind, EXPERT_KINDS)
        self.kind = kind
        self.norm = nn.RMSNorm(embedding_size, eps=norm_eps)
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_size, embedding_size))
        if kind == "swiglu":
            self.gate_proj = nn.Parameter(torch.empty(num_experts, expert_size, embedding_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))

    @property
    def num_experts(self) -> int:
        """N."""
        return self.down_proj.shape[0]

    def forward(self, embeddings: Tensor) -> Tensor:
        """[U, e] -> [U, N, d]. The result is a view of [N, U, d], which `mix` takes as it is."""
        return self.outputs(normalize(embeddings, self.norm.eps)).transpose(0, 1)

    def outputs(self, normalized: Tensor) -> Tensor:
        """[N, U, d] from what `normalize` gives, [U, e]."""
        inputs = (normalized * self.norm.weight).to(self.norm.weight.dtype)
        into = [self.up_proj]
        if self.kind == "swiglu":
            into.insert(0, self.gate_proj)
        return expert_outputs(self.kind, inputs, into, self.down_proj)

    def forward_reference(self, embeddings: Tensor) -> Tensor:
        """The same, one expert after the other."""
        inputs = self.norm(embeddings)
        outputs = []
        for expert in range(self.up_proj.shape[0]):
            hidden = F.linear(inputs, self.up_proj[expert])
            if self.kind == "swiglu":
                hidden = F.silu(F.linear(inputs, self.gate_proj[expert])) * hidden
            else:
                hidden = F.gelu(hidden)
            outputs.append(F.linear(hidden, self.down_proj[expert]))
        return torch.stack(outputs, dim=1)


def normalize(embeddings: Tensor, eps: float | None) -> Tensor:
    """RMS normalisation without its weight, which is all that layers differ in.

    [U, e] -> [U, e], float32 where embeddings are shorter: rounded once, after the weight.
    """
    precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return F.rms_norm(precise, precise.shape[-1:], eps=eps)


class EvaluatedRows:
    """The rows of `FFNExperts`: a layer is evaluated when it is asked for.

    Evaluating late keeps a layer's experts inside its block, where gradient checkpointing
    recomputes them and FSDP gathers their weights. What layers share has been done: `normalized`
    [U, e] is what `normalize` gives, and `positions` knows where the ids stand.
    """

    def __init__(
        self, positions: Positions, normalized: Tensor, layers: Sequence[LayerExperts]
    ) -> None:
        self.index = positions.index
        self._positions = positions
        self._normalized = normalized
        self._layers = layers

    @property
    def num_positions(self) -> int:
        return self.index.numel()

    def layer(self, layer: int) -> Tensor:
        return self._layers[layer].outputs(self._normalized).transpose(0, 1)

    def mix(self, layer: int, weights: Tensor) -> Tensor:
        outputs = self._layers[layer].outputs(self._normalized)
        return mix_positions(outputs, self._positions, weights)


class FFNExperts:
    """Training form: every layer's experts, evaluated on the embeddings of the unique ids.

    Exact and differentiable: an expert's output depends on the token id alone, so one evaluation
    per unique id serves all its positions, and their gradients add up.

    Args:
        embedding: the backbone's input embedding (its scaling, if it has one, included).
        layers: the experts of each layer, in order.
    """

    def __init__(self, embedding: nn.Module, layers: Sequence[LayerExperts]) -> None:
        self._embedding = embedding
        self.layers = layers

    # Finding the unique ids has a result whose size depends on the data, so torch.compile would
    # break its graph here anyway; said once, it is one break at the entrance and none later.
    @torch.compiler.disable
    def rows(self, token_ids: Tensor, ready: bool = False) -> EvaluatedRows:
        unique_ids, index = torch.unique(token_ids, return_inverse=True)
        normalized = self.normalized(unique_ids)
        positions = Positions(index, len(unique_ids), self.layers[0].num_experts)
        # The number of unique ids changes from batch to batch: no graph is to depend on it.
        torch._dynamo.maybe_mark_dynamic(normalized, 0)
        torch._dynamo.maybe_mark_dynamic(positions.starts, 0)
        return EvaluatedRows(positions, normalized, self.layers)

    def normalized(self, unique_ids: Tensor) -> Tensor:
        """[U, e]: what every layer's experts see of unique ids [U], but for the layer's weight."""
        self._check_range(unique_ids)
        return normalize(self._embedding(unique_ids), self.layers[0].norm.eps)

    def _check_range(self, unique_ids: Tensor) -> None:
        # Only where looking costs no synchronisation; on a GPU the embedding itself asserts.
        vocab_size = getattr(self._embedding, "num_embeddings", None)
        if vocab_size is None or unique_ids.device.type != "cpu" or unique_ids.numel() == 0:
            return
        for token_id in (int(unique_ids[0]), int(unique_ids[-1])):  # sorted
            if not 0 <= token_id < vocab_size:
                raise UserError(
                    f"Token id {token_id} is outside the vocabulary (0 to {vocab_size - 1}). "
                    "Is this the tokenizer that belongs to the model?"
                )


class TokenContext:
    """Hands a batch's rows from the model's entrance to its blocks.

    Each thread has its own, so that several can use one model at the same time.

    Attributes:
        source: where rows come from.
        observe: told every block's router weights, as (layer, weights [B·T, N]); None: nobody.
    """

    def __init__(self, source: ExpertSource | None = None) -> None:
        self.source = source
        self.observe: RouterObserver | None = None
        self._of_thread = threading.local()

    @property
    def rows(self) -> TokenRows | None:
        """Of the forward pass under way in this thread, or the last one."""
        return getattr(self._of_thread, "rows", None)

    @rows.setter
    def rows(self, rows: TokenRows | None) -> None:
        self._of_thread.rows = rows

    def enter(self, token_ids: Tensor) -> None:
        """Start a forward pass over token_ids [B, T]."""
        if self.source is None:
            raise RuntimeError("The model has routers but no expert source; use set_expert_source.")
        self.rows = None  # gives the last batch's buffer back before the next one is asked for
        self.rows = self.source.rows(token_ids, ready=torch.compiler.is_compiling())

    @contextmanager
    def restored(self, rows: TokenRows | None) -> Iterator[None]:
        """Within it, blocks see the given rows: recomputation in the backward pass needs the
        rows of its own forward pass, whatever has been forwarded since."""
        current, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = current

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenContext":
        # Without the rows: they belong to one forward pass and may be part of an autograd graph,
        # which can't be copied.
        memo[id(self)] = copied = TokenContext()
        copied.source = deepcopy(self.source, memo)
        return copied


class LookupExperts(nn.Module):
    """What a block gains: a router on the hidden state and the mixed rows of its tokens.

    Args:
        layer: the block's place among the blocks that have experts, 0 to L - 1.
        hidden_size: d.
        num_experts: N.
        context: shared by all blocks of the model.
        experts: the block's experts in training form; None where rows come from a table.
    """

    def __init__(
        self,
        layer: int,
        hidden_size: int,
        num_experts: int,
        context: TokenContext,
        experts: LayerExperts | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.context = context
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.joined: tuple[Any, ...] = ()
        """The `JointLinear` that computes the router's logits for short steps, if there is one; in
        a tuple, so that it is no child of this module."""
        if experts is not None:
            # Not named `experts`: the weight conversions of transformers take any `.experts.` in a
            # checkpoint of a mixture-of-experts backbone for that backbone's own.
            self.routed = experts

    def router_weights(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., N], a softmax over all experts, computed in float32.

        The result is float32 where gradients are taken, else in the dtype of the hidden states:
        the kernels compute the softmax of a shorter type in float32 and round its result, so that
        is what rounding afterwards gives, for one operation less.
        """
        router: Any = self._modules["router"]
        if is_called_plainly(router, nn.Linear):
            # In a step of decoding, calling a module takes longer than this product.
            logits = F.linear(hidden_states, router._parameters["weight"])
        else:
            logits = router(hidden_states)
        if torch.is_grad_enabled():
            return logits.softmax(dim=-1, dtype=torch.float32)
        return logits.softmax(dim=-1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d], the input of the block's FFN -> [..., d], what its experts add."""
        return self.mixed(hidden_states).view(hidden_states.shape).to(hidden_states.dtype)

    def added(self, hidden_states: Tensor, output: Tensor) -> Tensor | None:
        """The FFN's output [..., d] with what the experts add, by `FusedRows`; no gradients.

        None where the rows are none of these, where somebody wants to see the router's weights, or
        where the router or a tensor is of a kind of its own (an adapter, a quantised weight). The
        result of the operations apart, `mixed`, is rounded more often in a 16-bit type.
        """
        route_mix_add = getattr(self.context.rows, "route_mix_add", None)
        if route_mix_add is None or self.context.observe is not None:
            return None
        router: Any = self._modules["router"]
        weight = router._parameters.get("weight")
        if (
            not is_called_plainly(router, nn.Linear)
            or type(weight) is not nn.Parameter
            or not (type(hidden_states) is type(output) is Tensor)
        ):
            return None
        return route_mix_add(self.layer, hidden_states, weight, output)

    def mixed(self, hidden_states: Tensor) -> Tensor:
        """What `forward` gives as it comes from the rows: [B·T, d] in their dtype."""
        rows = self.context.rows
        if rows is None:
            raise RuntimeError(
                "A block with lookup experts ran outside a forward pass of its base model, "
                "so the token ids are unknown. Call the model, or its base model, with input_ids."
            )
        logits = None
        if self.joined:
            logits = self.joined[0].logits_of(hidden_states, self._modules["router"])
        if logits is None:
            weights = self.router_weights(hidden_states.reshape(-1, hidden_states.shape[-1]))
        else:
            weights = logits.softmax(dim=-1)
        if len(weights) != rows.num_positions:
            raise RuntimeError(
                f"Hidden states of shape {tuple(hidden_states.shape)} don't belong to the "
                f"token ids of shape {tuple(rows.index.shape)} that entered the model."
            )
        if self.context.observe is not None:
            self.context.observe(self.layer, weights)
        return rows.mix(self.layer, weights)


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing beside: no adapter took its
    place, and nobody hooks it."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )
