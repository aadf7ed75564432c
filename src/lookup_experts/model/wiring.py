"""How lookup experts hang on a backbone: what `install` adds, and what that does in a forward pass.

The backbone keeps its modules and the names of its parameters: each FFN gains a child
`lookup_experts` and a forward hook that adds what the child gives to the FFN's output, and the base
model gains hooks around its forward pass, which turn token ids into rows and let go of them.

What the child makes of rows is its form's matter (`forms/`); where they come from is an
`ExpertSource` (`rows.py`).

**Nothing here holds a module or a parameter of the model's tree.** Others wrap them (PEFT), copy,
replace, move (accelerate), resize and pickle them, and would be passed by in silence. So a hook
finds its block's experts through the FFN that it is called with, embedding and experts are asked
for when they are needed, and a module's weights are used by calling it. What belongs to one forward
pass is kept per thread, outside of all modules, where a copy of a block finds it as well.

Shapes: B batch, T tokens, U unique token ids, N experts, d hidden size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.model.blocks import find_ffns, placeholder_ids, text_config
from lookup_experts.model.computed_rows import FFNExperts
from lookup_experts.model.deferred import DeferredSum
from lookup_experts.model.forms import (
    LookupBlock,
    RowObserver,
    Sizes,
    get_form,
    is_unhooked,
)
from lookup_experts.model.placement import execution_device
from lookup_experts.model.rows import Addition, ExpertSource, TokenRows, leave
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.stacked_experts import new_stacked_reader


def install(model: Any, settings: LookupSettings) -> None:
    """Add the modules and hooks that `settings` ask for; weights are left as they come.

    In training form the model's expert source is set; in table form it is still to be opened.
    """
    ffns = find_ffns(model)
    for place, block in enumerate(settings.layers):
        hook_ffn(ffns[block], new_block(place, model, settings, ffns[block]))
    source = FFNExperts(settings) if settings.form == "experts" else None
    hook_base(model.base_model, Entrance(source, placeholder_ids(model.config)))


def hook_ffn(ffn: Any, lookup: LookupBlock) -> None:
    """Give an FFN its child, and the hooks that add what that gives."""
    ffn.add_module("lookup_experts", lookup)
    ffn.register_forward_pre_hook(begin_lookup_output, with_kwargs=True)
    ffn.register_forward_hook(add_lookup_output, with_kwargs=True)


def hook_base(base: Any, entrance: "Entrance") -> None:
    """Give a base model its entrance, and the hooks by which token ids become rows."""
    base.lookup_entrance = entrance
    base.register_forward_pre_hook(enter_forward_pass, with_kwargs=True)
    base.register_forward_hook(leave_forward_pass, always_call=True)


def new_block(
    place: int, model: Any, settings: LookupSettings, ffn: Any, count: int = 1
) -> LookupBlock:
    """What a block gains, on the device and in the dtype of its FFN.

    Args:
        place: among the blocks that have experts.
        count: of the tables that are stacked.
    """
    embedding = model.get_input_embeddings()
    form = get_form(settings.row_form)
    vocab_size, embedding_size = embedding.weight.shape
    sizes = Sizes(vocab_size, embedding_size, hidden_size_of(model))
    block: LookupBlock
    if count > 1:
        block = new_stacked_reader(place, settings, sizes, count)
    else:
        block = form.new_reader(place, settings, sizes)
    if settings.form == "experts":
        # Not named `experts`: the weight conversions of transformers take any `.experts.` in a
        # checkpoint of a mixture-of-experts backbone for that backbone's own.
        block.routed = form.new_maker(settings, sizes)
    like = next(ffn.parameters())
    dtype = like.dtype if like.is_floating_point() else embedding.weight.dtype
    return block.to(device=execution_device(ffn), dtype=dtype)


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
    `LookupBlock` since is in its place."""
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
        observe: a `RowObserver`, or None. A copy of the model is observed by nobody.
    """

    def __init__(self, source: ExpertSource | None, placeholders: tuple[int, ...] = ()) -> None:
        self.source = source
        self.placeholders = placeholders
        self.observe: RowObserver | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "placeholders": self.placeholders, "observe": None}


class ForwardPass:
    """One forward pass under way: what its blocks see.

    Attributes:
        rows: of its batch; None: nothing is added to it.
        is_text: bool [B·T, 1], False at placeholders; None: text is everywhere.
        entrance: of its model.
        outer: the forward pass, of another model, within which it runs; None: there is none.
        may_begin: whether what experts add may begin before their FFN computes; see `StepRows`.
        begun: what the experts of the FFN that computes now add, if that has begun.
    """

    def __init__(
        self,
        rows: TokenRows | None,
        is_text: Tensor | None,
        entrance: Entrance,
        outer: "ForwardPass | None",
    ) -> None:
        self.rows = rows
        self.is_text = is_text
        self.entrance = entrance
        self.outer = outer
        self.may_begin = hasattr(rows, "begin_routed")
        self.begun: Addition | None = None


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
        leave(under_way.rows)


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


def begin_lookup_output(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an FFN: what doesn't depend on its output may begin before it."""
    forward = forward_pass()
    if forward is None or not forward.may_begin or torch.compiler.is_compiling():
        return
    forward.begun = None
    if len(module._forward_pre_hooks) > 1:  # others' may give the FFN something else
        return
    lookup = module._modules["lookup_experts"]
    hidden_states = args[0] if args else kwargs["hidden_states"]
    is_asked_for_more = forward.entrance.observe is not None or type(hidden_states) is not Tensor
    if not is_asked_for_more and _adds_plainly(lookup, forward):
        forward.begun = lookup.begin(hidden_states, forward.rows)


def _adds_plainly(lookup: Any, forward: ForwardPass) -> bool:
    """Whether what `lookup` adds is added as it is, without gradients."""
    is_plain = isinstance(lookup, LookupBlock) and is_unhooked(lookup)
    return is_plain and forward.is_text is None and not torch.is_grad_enabled()


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
    forward = forward_pass()
    if forward is None:
        raise RuntimeError(
            "A block with lookup experts ran outside a forward pass of its base model, "
            "so the token ids are unknown. Call the model, or its base model, with input_ids."
        )
    rows, observe = forward.rows, forward.entrance.observe
    if rows is None:
        return output
    if hidden_states.numel() != rows.num_positions * hidden_states.shape[-1]:
        raise RuntimeError(
            f"Hidden states of shape {tuple(hidden_states.shape)} don't belong to the "
            f"token ids of shape {tuple(rows.index.shape)} that entered the model."
        )
    begun = forward.begun
    if begun is not None:
        forward.begun = None
        return _add_begun(begun, hidden_states, output)
    if _adds_plainly(lookup, forward):
        return lookup.add_to(output, hidden_states, rows, observe)
    added = lookup(hidden_states, rows, observe).view(output.shape)
    if forward.is_text is not None:
        added = added * forward.is_text.view(*output.shape[:-1], 1)
    return output + added


def _add_begun(begun: Addition, hidden_states: Tensor, output: Tensor) -> Tensor:
    if (
        type(output) is not Tensor
        or output.shape != hidden_states.shape
        or output.dtype != hidden_states.dtype
        or output.device != hidden_states.device
    ):
        added = begun.add_to(torch.zeros_like(hidden_states))
        return output + added.view(output.shape).to(output)
    return DeferredSum(output, begun) if begun.is_deferred else begun.add_to(output)
