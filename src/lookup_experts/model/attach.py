"""Lookup experts on any Hugging Face causal LM, in place.

The backbone keeps its class, its methods and the names of its parameters: each FFN gains a child
`lookup_experts` and a forward hook that adds the child's output to the FFN's, and the base model
gains a hook that takes the token ids as they enter. What makes an attached model save and load
as itself is in `huggingface.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.blocks import ffn_size, find_ffns
from lookup_experts.model.experts import (
    EXPERT_KINDS,
    FFNExperts,
    LayerExperts,
    LookupExperts,
    TokenContext,
    is_called_plainly,
)

INITS = ("zero", "normal")
FORMS = ("experts", "table")
SAVES = ("full", "experts")


@dataclass(frozen=True)
class BackboneReference:
    """Where the backbone is that a folder with experts alone belongs to."""

    name: str
    """A folder, relative ones seen from the folder with the experts, or a name on the hub."""
    fingerprint: str
    """Of its weights, see `backbone.py`: another backbone is refused."""

    @classmethod
    def from_dict(cls, values: Any) -> "BackboneReference":
        if not isinstance(values, dict) or set(values) != {"name", "fingerprint"}:
            raise UserError(
                "The backbone in a model's lookup_experts settings should have a name and a "
                f"fingerprint; it is {values!r}."
            )
        return cls(**values)


@dataclass(frozen=True)
class LookupSettings:
    """What was attached to a backbone; saved in its `config.json` under `lookup_experts`."""

    num_experts: int
    """N, routed experts per layer."""
    expert_size: int
    """D, the hidden size of each expert."""
    layers: tuple[int, ...]
    """The blocks that have experts, ascending."""
    expert_kind: str = "gelu"
    """One of `EXPERT_KINDS`."""
    norm_eps: float = 1e-6
    """The epsilon of the RMSNorm on the embedding."""
    form: str = "experts"
    """`experts`: training form. `table`: the experts were folded into a table."""
    fingerprint: str | None = None
    """In table form, what was folded; the table beside the model must say the same."""
    backbone: BackboneReference | None = None
    """Where the backbone is, if the model is saved as experts alone."""

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.expert_size < 1:
            raise UserError(
                f"Lookup experts need at least one expert of at least one unit; got "
                f"num_experts={self.num_experts}, expert_size={self.expert_size}."
            )
        if self.expert_kind not in EXPERT_KINDS:
            raise unknown_name("expert kind", self.expert_kind, EXPERT_KINDS)
        if self.form not in FORMS:
            raise unknown_name("form", self.form, FORMS)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LookupSettings":
        """From the `lookup_experts` entry of a configuration; unknown keys are refused."""
        known = cls.__dataclass_fields__
        for key in values:
            if key not in known:
                raise unknown_name("lookup_experts setting", key, known)
        for key in ("num_experts", "expert_size", "layers"):
            if key not in values:
                raise UserError(f"The lookup_experts settings of a model have no {key!r}.")
        backbone = values.get("backbone")
        reference = None if backbone is None else BackboneReference.from_dict(backbone)
        return cls(**{**values, "layers": tuple(values["layers"]), "backbone": reference})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {**asdict(self), "layers": list(self.layers)}
        if self.backbone is None:
            del values["backbone"]
        return values


@dataclass
class Attachment:
    """The parts that an attached model holds on to."""

    context: TokenContext
    modules: list[LookupExperts] = field(default_factory=list)


def attach(
    model: Any,
    num_experts: int = 4,
    *,
    expert_size: int | None = None,
    expert_kind: str = "gelu",
    layers: Sequence[int] | str | None = None,
    init: str = "zero",
    train_backbone: bool = True,
    save: str = "full",
) -> Any:
    """Add routed experts to a Hugging Face causal LM, in place, and give it back.

    The model keeps its class (a subclass of it, to be exact), its methods and its parameter
    names. Every check happens before the first change.

    Args:
        model: a `PreTrainedModel` with a language-model head whose blocks have one FFN child.
        num_experts: N, experts per layer.
        expert_size: D, the hidden size of each expert; default: that of the backbone's FFN.
        expert_kind: `gelu`, the paper's gate-less expert, or `swiglu`.
        layers: the blocks that gain experts: their numbers, or in words `0-7`, `0,2,4` or
            `every:2`; default: all.
        init: `zero`: the experts' outputs are zero, so the model gives exactly the backbone's
            logits at first. `normal`: all weights as the backbone initialises its own, for
            training from scratch.
        train_backbone: False takes the gradients from the backbone's parameters, so that experts
            and routers alone are trained, and alone have optimizer state.
        save: what `save_pretrained` writes, also when the Trainer calls it. `full`: everything.
            `experts`: the experts and routers, with a reference to the folder or the hub's model
            that the backbone was loaded from; needs `train_backbone=False`. A quantised backbone
            can be trained on in this way only.

    Raises:
        UserError: the model's blocks have no single FFN, or an argument makes no sense.
    """
    from lookup_experts.model.backbone import (
        allow_training,
        freeze_backbone,
        refer_to,
        require_reference,
        require_unpacked,
    )
    from lookup_experts.model.huggingface import become_attached

    if init not in INITS:
        raise unknown_name("init", init, INITS)
    if save not in SAVES:
        raise unknown_name("value of save", save, SAVES)
    if getattr(model, "lookup_attachment", None) is not None:
        raise UserError(f"This {type(model).__name__} has lookup experts already.")
    settings = settings_for(model, num_experts, expert_size, expert_kind, layers)
    require_reference(model, save, train_backbone)
    require_unpacked(model)
    if save == "experts":
        settings = replace(settings, backbone=refer_to(model.name_or_path))
    install(model, settings)
    become_attached(model, settings)
    if not train_backbone:
        freeze_backbone(model)
        allow_training(model)
    std = initializer_std(model.config)
    for module in model.lookup_attachment.modules:
        nn.init.normal_(module.router.weight, 0.0, std)
        initialize_experts(module.routed, init, std)
    return model


def settings_for(
    model: Any,
    num_experts: int,
    expert_size: int | None,
    expert_kind: str,
    layers: Sequence[int] | str | None,
) -> LookupSettings:
    """The settings that `attach` was asked for, checked against the model."""
    num_blocks = len(find_ffns(model))
    if isinstance(layers, str):
        layers = parse_layers(layers, num_blocks)
    chosen = tuple(range(num_blocks)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or not all(0 <= layer < num_blocks for layer in chosen):
        raise UserError(
            f"Layers {list(layers or ())} can't have experts: the model's blocks are 0 to "
            f"{num_blocks - 1}."
        )
    return LookupSettings(
        num_experts=num_experts,
        expert_size=(
            ffn_size(model.config, hidden_size_of(model)) if expert_size is None else expert_size
        ),
        layers=chosen,
        expert_kind=expert_kind,
        norm_eps=getattr(model.config, "rms_norm_eps", None) or 1e-6,
    )


def parse_layers(words: str, num_blocks: int) -> tuple[int, ...]:
    """A choice of blocks in words: `0-7`, `0,2,4`, `0-3,8` or `every:2`, from block 0 on."""
    rule, colon, step = words.partition(":")
    if colon and rule.strip() == "every" and step.strip().isdecimal() and int(step) > 0:
        return tuple(range(0, num_blocks, int(step)))
    chosen: set[int] = set()
    for part in words.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"Layers {words!r} should be like 0-7, 0,2,4 or every:2; {part.strip()!r} isn't."
            )
        chosen.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(chosen))


def install(model: Any, settings: LookupSettings) -> Attachment:
    """Add the modules and hooks that `settings` ask for; weights are left as they come.

    In training form the model's expert source is set; in table form it is still to be opened.
    """
    ffns = find_ffns(model)
    embedding = model.get_input_embeddings()
    attachment = Attachment(TokenContext())
    for place, block in enumerate(settings.layers):
        like = next(ffns[block].parameters())
        lookup = _build_block(place, model, settings, attachment.context)
        dtype = like.dtype if like.is_floating_point() else embedding.weight.dtype
        ffns[block].add_module("lookup_experts", lookup.to(device=like.device, dtype=dtype))
        ffns[block].register_forward_hook(AddLookupOutput(lookup), with_kwargs=True)
        attachment.modules.append(lookup)
    if settings.form == "experts":
        attachment.context.source = FFNExperts(embedding, expert_layers(attachment))
    model.base_model.register_forward_pre_hook(TakeTokenIds(attachment.context), with_kwargs=True)
    model.lookup_attachment = attachment
    return attachment


def expert_layers(attachment: Attachment) -> list[LayerExperts]:
    """The training-form experts of every layer, in order."""
    return [module.routed for module in attachment.modules]


def _build_block(
    place: int, model: Any, settings: LookupSettings, context: TokenContext
) -> LookupExperts:
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
    return LookupExperts(place, hidden_size, settings.num_experts, context, experts)


def hidden_size_of(model: Any) -> int:
    """d, the width of the residual stream."""
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"Can't attach lookup experts to model type {model.config.model_type!r}: its "
            "configuration states no hidden_size."
        )
    return size


def initializer_std(config: Any) -> float:
    """The standard deviation with which the backbone draws its own weights."""
    return getattr(config, "initializer_range", None) or 0.02


def initialize_experts(experts: LayerExperts, init: str, std: float) -> None:
    """Fill one layer's experts; `zero` silences their outputs.

    Drawn with `torch.nn.init`, which transformers can guard, so that loaded weights stay.
    """
    nn.init.ones_(experts.norm.weight)
    for name, weight in experts.named_parameters(recurse=False):
        if init == "zero" and name == "down_proj":
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 0.0, std)


class TakeTokenIds:
    """Forward pre-hook of the base model: the token ids go to the expert source."""

    def __init__(self, context: TokenContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        if token_ids is None:
            raise UserError(
                "A model with lookup experts needs input_ids: its experts are looked up by token "
                "id. It was given "
                + ("inputs_embeds." if kwargs.get("inputs_embeds") is not None else "neither.")
            )
        self.context.enter(token_ids)


class AddLookupOutput:
    """Forward hook of an FFN: what the block's lookup experts say is added to its output.

    Some FFNs return a tuple (gpt_oss: router scores behind it); its first element is the output.
    """

    def __init__(self, lookup: LookupExperts) -> None:
        self.lookup = lookup

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        total = self._add(first, hidden_states)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    def _add(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        lookup = self.lookup
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
