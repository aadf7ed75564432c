"""Lookup experts on any Hugging Face causal LM, in place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.attached_model import LookupExpertsMixin
from lookup_experts.folders.experts_alone import (
    note_backbone,
    refer_to_backbone_of,
    require_reference,
)
from lookup_experts.folders.load import become_attached, known_backbones
from lookup_experts.folders.own_code import has_own_code, require_files
from lookup_experts.folders.saving import SAVES
from lookup_experts.model.blocks import (
    ffn_size,
    find_ffns,
    is_multimodal,
    placeholder_ids,
    text_config,
)
from lookup_experts.model.forms import get_form
from lookup_experts.model.freezing import (
    allow_training,
    forget_quantizer,
    freeze_backbone,
    require_unpacked,
)
from lookup_experts.model.initialization import (
    INITS,
    initialize_blocks,
)
from lookup_experts.model.settings import ROW_FORMS, LookupSettings, parse_layers
from lookup_experts.model.wiring import hidden_size_of, install


def attach(
    model: Any,
    num_experts: int | None = None,
    *,
    form: str = "mole",
    row_size: int | None = None,
    expert_size: int | None = None,
    expert_kind: str | None = None,
    layers: Sequence[int] | str | None = None,
    init: str = "zero",
    train_backbone: bool = True,
    save: str = "full",
) -> Any:
    """Add routed experts to a Hugging Face causal LM, in place, and give it back.

    The model keeps its class (a subclass of it, to be exact), its methods and its parameter
    names. Every check happens before the first change.

    Args:
        model: a `PreTrainedModel` with a language-model head whose blocks have one FFN child. Of
            one that takes images or sound too the blocks of its text part gain experts, which add
            nothing where these stand.
        num_experts: N, experts per layer; default: 4 of `mole`. `meki` has none to count.
        form: how a row is made and read: `mole`, the paper's N experts mixed by a router, or
            `meki`, one row beside a gate (arXiv 2602.03359).
        row_size: r, the numbers of a row, which are what a table holds; default: the model's
            width d, the paper's.
        expert_size: D, the hidden size of each expert; default: that of the backbone's FFN, of
            `meki` half of the model's width.
        expert_kind: `gelu`, the paper's gate-less expert and the default of `mole`, or `swiglu`.
        layers: the blocks that gain experts: their numbers, or in words `0-7`, `0,2,4` or
            `every:2`; default: all.
        init: `zero`: the experts' outputs are zero, so the model gives exactly the backbone's
            logits at first. `normal`: all weights as the backbone initialises its own, for
            training from scratch.
        train_backbone: False takes the gradients from the backbone's parameters, so that experts
            and routers alone are trained, and alone have optimizer state.
        save: what `save_pretrained` writes, also when the Trainer calls it. `full`: everything.
            `experts`: the experts and routers, with a reference to the folder or the hub's model
            that the backbone was loaded from, or to the GGUF file in it; needs
            `train_backbone=False`. A quantised backbone can be trained on in this way only.
            `model.save_pretrained(folder, save=...)` decides anew for once.

    Raises:
        UserError: the model is no causal LM that could be loaded again, its blocks have no single
            FFN, an argument makes no sense, or the backbone to refer to isn't the one in memory.
    """
    if init not in INITS:
        raise unknown_name("init", init, INITS)
    if save not in SAVES:
        raise unknown_name("value of save", save, SAVES)
    if isinstance(model, LookupExpertsMixin):
        raise UserError(f"This {type(model).__name__} has lookup experts already.")
    _require_causal_lm(model)
    settings = settings_for(model, num_experts, form, row_size, expert_size, expert_kind, layers)
    require_reference(model, save, train_backbone)
    require_unpacked(model)
    if save == "experts":
        settings = replace(settings, backbone=refer_to_backbone_of(model))
        note_backbone(model)
    forget_quantizer(model)
    install(model, settings)
    become_attached(model, settings)
    if not train_backbone:
        freeze_backbone(model)
        allow_training(model)
    initialize_blocks(model, settings, init)
    return model


def _require_causal_lm(model: Any) -> None:
    """Refuse a model that experts would have nothing to do in, or whose folder nothing loads."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} has an encoder and a decoder; lookup experts are for models that go on with "
            "one text. Give a decoder alone (AutoModelForCausalLM)."
        )
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise UserError(
            f"{name} takes {main_input}; lookup experts are looked up by token id, so "
            "give a model that takes input_ids (AutoModelForCausalLM)."
        )
    if is_multimodal(config) and not placeholder_ids(config):
        raise UserError(
            f"{name} takes more than text, and its configuration doesn't say which token ids stand "
            "for that, so experts can't pass them over. Give a model of text alone."
        )
    if has_own_code(type(model)) or has_own_code(type(config)):
        require_files(type(model), type(config))
        return
    found = known_backbones(type(config))
    if not found:
        raise UserError(
            f"{name} is no causal LM that transformers knows, so nothing could load what is saved "
            f"of it: register it (AutoModelForCausalLM.register), in every program that loads it."
        )
    if not isinstance(model, found):
        raise UserError(
            f"{name} has no language-model head, or another one than a folder of it is loaded "
            f"with: load the model as {' or '.join(kind.__name__ for kind in found)}."
        )


def settings_for(
    model: Any,
    num_experts: int | None,
    form: str,
    row_size: int | None,
    expert_size: int | None,
    expert_kind: str | None,
    layers: Sequence[int] | str | None,
) -> LookupSettings:
    """The settings that `attach` was asked for, checked against the model."""
    num_blocks = len(find_ffns(model))
    config = text_config(model.config)
    if isinstance(layers, str):
        layers = parse_layers(layers, num_blocks)
    chosen = tuple(range(num_blocks)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or not all(0 <= layer < num_blocks for layer in chosen):
        raise UserError(
            f"Layers {list(layers or ())} can't have experts: the model's blocks are 0 to "
            f"{num_blocks - 1}."
        )
    width = hidden_size_of(model)
    if form not in ROW_FORMS:
        raise unknown_name("form", form, ROW_FORMS)
    defaults = get_form(form).defaults(width, ffn_size(config, width))
    return LookupSettings(
        num_experts=defaults.num_experts if num_experts is None else num_experts,
        expert_size=defaults.expert_size if expert_size is None else expert_size,
        layers=chosen,
        expert_kind=expert_kind or defaults.expert_kind,
        norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
        row_form=form,
        row_size=None if row_size == width else row_size,
    )
