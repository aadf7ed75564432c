"""How lookup experts hang on a backbone: what `install` adds, and what that does in a forward pass.

The backbone keeps its modules and the names of its parameters: each FFN gains a child
`lookup_experts` and a forward hook that adds what the child gives to the FFN's output, and the base
model gains hooks around its forward pass, which turn token ids into rows and let go of them.

    h' = h + FFN_shared(h) + sum_j softmax(h r)_j * FFN_j(e)        (arXiv 2503.15798, section 3)

`FFN_shared` is the backbone's own FFN. Where the `FFN_j(e)` come from is an `ExpertSource`
(`rows.py`).

**Nothing here holds a module or a parameter of the model's tree.** Others wrap them (PEFT), copy,
replace, move (accelerate), resize and pickle them, and would be passed by in silence. So a hook
finds its block's experts through the FFN that it is called with, embedding and experts are asked
for when they are needed, and a module's weights are used by calling it. What belongs to one forward
pass is kept per thread, outside of all modules, where a copy of a block finds it as well.

Shapes: B batch, T tokens, U unique token ids, N experts, d hidden size.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.errors import UserError
from lookup_experts.model.blocks import find_ffns, placeholder_ids, text_config
from lookup_experts.model.computed_rows import FFNExperts
from lookup_experts.model.experts import LayerExperts
from lookup_experts.model.router_losses import record_logits
from lookup_experts.model.rows import ExpertSource, TokenRows
from lookup_experts.model.settings import LookupSettings

RouterObserver = Callable[[int, Tensor], None]
"""Told every block's router weights, as (layer, weights [B·T, N])."""


def install(model: Any, settings: LookupSettings) -> None:
    """Add the modules and hooks that `settings` ask for; weights are left as they come.

    In training form the model's expert source is set; in table form it is still to be opened.
    """
    ffns = find_ffns(model)
    embedding = model.get_input_embeddings()
    for place, block in enumerate(settings.layers):
        ffn = ffns[block]
        like = next(ffn.parameters())
        dtype = like.dtype if like.is_floating_point() else embedding.weight.dtype
        lookup = _new_block(place, model, settings).to(device=like.device, dtype=dtype)
        ffn.add_module("lookup_experts", lookup)
        ffn.register_forward_hook(add_lookup_output, with_kwargs=True)
    computed = FFNExperts(settings.num_experts, settings.norm_eps)
    base = model.base_model
    source = computed if settings.form == "experts" else None
    base.lookup_entrance = Entrance(source, placeholder_ids(model.config))
    base.register_forward_pre_hook(enter_forward_pass, with_kwargs=True)
    base.register_forward_hook(leave_forward_pass, always_call=True)


def _new_block(place: int, model: Any, settings: LookupSettings) -> "LookupExperts":
    hidden_size = hidden_size_of(model)
    experts = None
    if settings.form == "experts":
        experts = LayerExperts(
            settings.num_experts,
            model.get_input_embeddings().weight.shape[1],
            settings.expert_size,
            hidden_size,
            settings.expert_kind,
            settings.norm_eps,
        )
    return LookupExperts(place, hidden_size, settings.num_experts, experts)


def hidden_size_of(model: Any) -> int:
    """d, the width of the residual stream."""
    size = getattr(text_config(model.config), "hidden_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"Can't attach lookup experts to model type {model.config.model_type!r}: its "
            "configuration states no hidden_size."
        )
    return size


def lookup_blocks(model: Any) -> list[Any]:
    """What `install` added to each block, in order, as it is now: whoever wrapped or replaced a
    `LookupExperts` since is in its place."""
    ffns = find_ffns(model)
    return [ffn.lookup_experts for ffn in ffns if hasattr(ffn, "lookup_experts")]


def routed_experts(model: Any) -> list[Any]:
    """The training-form experts of every layer, in order; none in table form."""
    blocks = lookup_blocks(model)
    return [block.routed for block in blocks if hasattr(block, "routed")]


# --------------------------------------------------------------------------------- forward pass


class Entrance:
    """Where a model's token ids become rows; the base model has it as `lookup_entrance`.

    Attributes:
        source: where rows come from; None: nothing has been opened yet.
        placeholders: ids in whose places the model puts something else than text. Experts are of
            text, and add nothing there.
        observe: a `RouterObserver`, or None. A copy of the model is observed by nobody.
    """

    def __init__(self, source: ExpertSource | None, placeholders: tuple[int, ...] = ()) -> None:
        self.source = source
        self.placeholders = placeholders
        self.observe: RouterObserver | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "placeholders": self.placeholders, "observe": None}


class ForwardPass:
    """One forward pass under way: what its blocks see.

    Attributes:
        rows: of its batch.
        is_text: bool [B·T, 1], False at placeholders; None: text is everywhere.
        entrance: of its model.
        outer: the forward pass, of another model, within which it runs; None: there is none.
    """

    def __init__(
        self,
        rows: TokenRows,
        is_text: Tensor | None,
        entrance: Entrance,
        outer: "ForwardPass | None",
    ) -> None:
        self.rows = rows
        self.is_text = is_text
        self.entrance = entrance
        self.outer = outer


_of_thread = threading.local()


def forward_pass() -> ForwardPass | None:
    """The innermost forward pass under way in this thread."""
    return getattr(_of_thread, "innermost", None)


def enter_forward_pass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: the token ids go to the expert source."""
    token_ids = kwargs.get("input_ids", args[0] if args else None)
    if token_ids is None:
        raise UserError(
            "A model with lookup experts needs input_ids: its experts are looked up by token "
            "id. It was given "
            + ("inputs_embeds." if kwargs.get("inputs_embeds") is not None else "neither.")
        )
    entrance = module.lookup_entrance
    if entrance.source is None:
        raise RuntimeError("The model has routers but no expert source; use set_expert_source.")
    is_text = None
    if entrance.placeholders:
        is_text = _find_text(token_ids, entrance.placeholders)
        if entrance.placeholders[-1] >= module.get_input_embeddings().weight.shape[0]:
            token_ids = token_ids.where(is_text, 0)  # an id without a row
        is_text = _unless_everywhere(is_text)
    rows = entrance.source.rows(token_ids, torch.compiler.is_compiling(), module)
    _of_thread.innermost = ForwardPass(rows, is_text, entrance, forward_pass())


def _find_text(token_ids: Tensor, placeholders: tuple[int, ...]) -> Tensor:
    """Token ids [B, T] -> bool [B, T], False where a placeholder stands."""
    is_text = token_ids != placeholders[0]
    for placeholder in placeholders[1:]:
        is_text = is_text & (token_ids != placeholder)
    return is_text


def _unless_everywhere(is_text: Tensor) -> Tensor | None:
    """bool [B, T] -> [B·T, 1]; None where it is known without waiting for a device that all is
    text, as in every step of decoding."""
    if not torch.compiler.is_compiling() and is_text.device.type == "cpu" and is_text.all():
        return None
    return is_text.reshape(-1, 1)


def leave_forward_pass(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the base model, also called where it failed, maybe before it had entered."""
    under_way = forward_pass()
    if under_way is not None and under_way.entrance is module.lookup_entrance:
        _of_thread.innermost = under_way.outer


@contextmanager
def resumed(forward: ForwardPass | None) -> Iterator[None]:
    """Within it, blocks see the given forward pass: recomputation in the backward pass needs the
    rows of its own, whatever has been forwarded since, and in whichever thread it happens."""
    current = forward_pass()
    _of_thread.innermost = forward
    try:
        yield
    finally:
        _of_thread.innermost = current


def add_lookup_output(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of an FFN: what the block's lookup experts say is added to its output.

    Some FFNs return a tuple (gpt_oss: router scores behind it); its first element is the output.
    """
    hidden_states = args[0] if args else kwargs["hidden_states"]
    lookup = module._modules["lookup_experts"]
    if isinstance(output, tuple):
        return (_add(lookup, hidden_states, output[0]), *output[1:])
    return _add(lookup, hidden_states, output)


def _add(lookup: Any, hidden_states: Tensor, output: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not is_called_plainly(lookup, LookupExperts):
        return output + lookup(hidden_states).view(output.shape)
    # In a step of decoding, calls and new tensors take longer than the numbers in them.
    added = lookup.added(hidden_states, output)
    if added is not None:
        return added
    mixed = lookup.mixed(hidden_states)
    if mixed.dtype != output.dtype:
        return output + mixed.to(hidden_states.dtype).view(output.shape)
    return mixed.view_as(output).add_(output)  # the FFN's own output may be kept by others


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing beside: no adapter took its
    place, and nobody hooks it."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


# ----------------------------------------------------------------------------------------- block


class LookupExperts(nn.Module):
    """What a block gains: a router on the hidden state and the mixed rows of its tokens.

    Args:
        layer: the block's place among the blocks that have experts, 0 to L - 1.
        hidden_size: d.
        num_experts: N.
        experts: the block's experts in training form; None where rows come from a table.
    """

    def __init__(
        self, layer: int, hidden_size: int, num_experts: int, experts: LayerExperts | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        if experts is not None:
            # Not named `experts`: the weight conversions of transformers take any `.experts.` in a
            # checkpoint of a mixture-of-experts backbone for that backbone's own.
            self.routed = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d], the input of the block's FFN -> [..., d], what its experts add."""
        return self.mixed(hidden_states).view(hidden_states.shape).to(hidden_states.dtype)

    def mixed(self, hidden_states: Tensor) -> Tensor:
        """What `forward` gives as it comes from the rows: [B·T, d] in their dtype."""
        forward = _require_forward_pass()
        rows = forward.rows
        weights = self.router_weights(hidden_states.reshape(-1, hidden_states.shape[-1]))
        if len(weights) != rows.num_positions:
            raise RuntimeError(
                f"Hidden states of shape {tuple(hidden_states.shape)} don't belong to the "
                f"token ids of shape {tuple(rows.index.shape)} that entered the model."
            )
        if forward.entrance.observe is not None:
            forward.entrance.observe(self.layer, weights)
        if forward.is_text is not None:
            weights = weights * forward.is_text
        return rows.mix(self.layer, weights, self._modules.get("routed"))

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
            record_logits(logits)
            return logits.softmax(dim=-1, dtype=torch.float32)
        return logits.softmax(dim=-1)

    def added(self, hidden_states: Tensor, output: Tensor) -> Tensor | None:
        """The FFN's output [..., d] with what the experts add, by `FusedRows`; no gradients.

        None where the rows are none of these, where not all is text, where somebody wants to see
        the router's weights, or where the router or a tensor is of a kind of its own (an adapter, a
        quantised weight). The result of the operations apart, `mixed`, is rounded more often in a
        16-bit type.
        """
        forward = _require_forward_pass()
        route_mix_add = getattr(forward.rows, "route_mix_add", None)
        if (
            route_mix_add is None
            or forward.is_text is not None
            or forward.entrance.observe is not None
        ):
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


def _require_forward_pass() -> ForwardPass:
    forward = forward_pass()
    if forward is None:
        raise RuntimeError(
            "A block with lookup experts ran outside a forward pass of its base model, "
            "so the token ids are unknown. Call the model, or its base model, with input_ids."
        )
    return forward
