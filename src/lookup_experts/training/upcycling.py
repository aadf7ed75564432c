"""Lookup experts on a model that is trained already: what `mole upcycle` does differently.

The run, its folder and its Trainer are those of `mole train` (`train.py`). Only the beginning
differs: the model is loaded, not drawn, and its tokenizer must be the one that the text was
prepared with; and the end: what is saved may be the experts alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.attach import attach
from lookup_experts.folders.attached_model import LookupExpertsMixin
from lookup_experts.folders.experts_alone import refer_to, set_backbone_reference
from lookup_experts.folders.load import load
from lookup_experts.folders.model_folder import local_folder, read_config
from lookup_experts.folders.own_code import needs_own_code, require_trust
from lookup_experts.folders.saving import SAVES
from lookup_experts.model.blocks import find_ffns
from lookup_experts.model.freezing import is_attached
from lookup_experts.model.settings import parse_layers
from lookup_experts.training.recipe import (
    ExpertsRecipe,
    RecipeFile,
    TrainingRecipe,
    require_experts_to_share,
)
from lookup_experts.training.sources import TrainingData, Vocabulary
from lookup_experts.training.tokenizer import (
    bos_token_ids,
    load_tokenizer,
    saved_tokenizer_hash,
    tokenizer_hash,
)

TRAINED = ("nothing", "ffn", "all")


@dataclass(frozen=True)
class BackboneRecipe:
    """The model that gains experts."""

    trained: str = "nothing"
    """What of it is trained: `nothing`, the FFNs (`ffn`), or `all`."""
    learning_rate: float = 1e-4
    """The peak of what is trained of it; the experts have that of the section `training`."""
    name: str | None = None
    """The folder, or the name on the hub, that it is loaded from; the command's argument."""
    fingerprint: str | None = None
    """Of its weights, as the run began with them."""
    trust_remote_code: bool = False
    """Whether code that its folder brings along may run."""

    def __post_init__(self) -> None:
        if self.trained not in TRAINED:
            raise unknown_name("value of backbone.trained", self.trained, TRAINED)
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(
                f"backbone.learning_rate is {self.learning_rate}; expected a number above 0."
            )


@dataclass(frozen=True)
class UpcycleRecipe(RecipeFile):
    """A backbone, what it gains, and how that is trained."""

    training: TrainingRecipe
    backbone: BackboneRecipe = BackboneRecipe()
    experts: ExpertsRecipe | None = None
    """Without them the backbone is trained further as it is: for comparisons."""
    save: str = "full"
    """What the folder holds: `full`, or `experts` with a reference to the backbone."""

    subject = "backbone"

    def __post_init__(self) -> None:
        if self.save not in SAVES:
            raise unknown_name("value of save", self.save, SAVES)
        if self.experts is None and self.backbone.trained == "nothing":
            raise UserError(
                "There is nothing to train: no experts, and nothing of the backbone. Give experts, "
                "or backbone.trained: ffn or all."
            )
        if self.save == "experts" and (self.experts is None or self.backbone.trained != "nothing"):
            raise UserError(
                "save: experts leaves the backbone out, so there must be experts and nothing of "
                "the backbone may be trained. Take save: full."
            )
        require_experts_to_share(self.training, self.experts)

    @property
    def backbone_learning_rate(self) -> float | None:
        return self.backbone.learning_rate


def for_backbone(
    recipe: UpcycleRecipe,
    name: str,
    *,
    num_experts: int | None = None,
    layers: str | None = None,
    trained: str | None = None,
    learning_rate: float | None = None,
    save: str | None = None,
    trust_remote_code: bool = False,
) -> UpcycleRecipe:
    """The recipe with its backbone settled, and with what was chosen beside it.

    Args:
        recipe: what is trained and how.
        name: a folder with a causal LM, or its name on the hub.
        num_experts: per layer; 0 adds none. None in these arguments leaves the recipe as it is.
        layers: the blocks that gain experts, in words, see `parse_layers`.
        trained: of the backbone, see `BackboneRecipe`.
        learning_rate: the backbone's.
        save: see `UpcycleRecipe`.
        trust_remote_code: let code that the backbone's folder brings along run.

    Raises:
        UserError: there is no such model, or the choices contradict each other.
    """
    config = read_config(local_folder(name))
    if needs_own_code(config):
        require_trust(name, trust_remote_code)
    reference = refer_to(name)
    backbone = replace(
        recipe.backbone,
        name=reference.name,
        fingerprint=reference.fingerprint,
        trust_remote_code=trust_remote_code,
    )
    backbone = _replace_given(backbone, trained=trained, learning_rate=learning_rate)
    experts = recipe.experts
    if num_experts == 0:
        experts = None
    elif num_experts is not None:
        experts = replace(experts or ExpertsRecipe(num_experts), num_experts=num_experts)
    if layers is not None:
        if experts is None:
            raise UserError(f"--layers {layers} says where experts go, but there are none.")
        experts = replace(experts, layers=parse_layers(layers, _num_blocks(backbone)))
    # In one step: each choice alone might contradict what it replaces.
    settled = replace(recipe, backbone=backbone, experts=experts, save=save or recipe.save)
    if settled.save == "full" and "quantization_config" in config:
        raise UserError(
            f"{name} is quantised, so its experts are saved without it: --save experts."
        )
    return settled


def _num_blocks(backbone: BackboneRecipe) -> int:
    """By the configuration of a backbone that is settled, as transformers reads it."""
    from transformers import AutoConfig

    assert backbone.name is not None
    config = AutoConfig.from_pretrained(
        local_folder(backbone.name), trust_remote_code=backbone.trust_remote_code
    )
    number: int = config.get_text_config().num_hidden_layers
    return number


def _replace_given(recipe: BackboneRecipe, **values: Any) -> BackboneRecipe:
    return replace(recipe, **{key: value for key, value in values.items() if value is not None})


def check_data(recipe: UpcycleRecipe, data: TrainingData) -> None:
    """Refuse text that was prepared for another model, before any weights are loaded.

    Raises:
        UserError: another tokenizer, a token that the embedding has no row for, or sequences
            longer than the model's positions.
    """
    folder = _folder(recipe)
    check_tokenizer(folder, data.vocabulary)
    from transformers import AutoConfig

    trusted = recipe.backbone.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted).get_text_config()
    data.require_rows(config.vocab_size)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.training.context_length > longest:
        raise UserError(
            f"training.context_length is {recipe.training.context_length:,}, but {folder} takes at "
            f"most {longest:,} tokens. Set it to that or less."
        )


def other_beginning(recipe: UpcycleRecipe, vocabulary: Vocabulary) -> str | None:
    """A warning where documents begin otherwise than the backbone's texts do; None where alike."""
    from transformers import AutoTokenizer

    folder = _folder(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    of_backbone, of_data = bos_token_ids(tokenizer), vocabulary.bos_token_ids
    if of_backbone == of_data:
        return None
    tokens = [
        " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        for ids in (of_backbone, of_data)
    ]
    return (
        f"Warning: the tokenizer of {folder} begins a text with {tokens[0]}, the documents of the "
        f"data begin with {tokens[1]}. A model that learnt with it starts worse without: prepare "
        "the text again with this version, without --no-bos."
    )


def check_tokenizer(folder: Path, manifest: Vocabulary) -> None:
    """Raise a `UserError` unless a text was prepared with the tokenizer of a model's folder."""
    expected = manifest.tokenizer["hash"]
    if saved_tokenizer_hash(folder) == expected:
        return
    # The same tokenizer can be written in several ways; what `mole prepare` would have made of it?
    eos_token = _token(folder, manifest.eos_token_id)
    if eos_token is None or tokenizer_hash(load_tokenizer(str(folder), eos_token)) != expected:
        raise UserError(
            f"The text was prepared with another tokenizer ({manifest.tokenizer['name']}) than "
            f"that of {folder}. Prepare it again: mole prepare ... --tokenizer {folder}"
        )


def _token(folder: Path, token_id: int) -> str | None:
    """The token of an id in a model folder's tokenizer; None where it has none."""
    from lookup_experts.folders.tokenizer import TOKENIZER_FILES
    from lookup_experts.folders.tokenizer import load_tokenizer as load_beside_model

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer, so it can't be told whether the text was prepared with "
            "the model's own. Put the tokenizer's files there."
        )
    tokenizer = load_beside_model(folder)
    return tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None


def upcycled_model(recipe: UpcycleRecipe) -> Any:
    """The backbone with its experts, whose outputs are zero; what isn't trained takes no gradient.

    Experts and routers are float32. The backbone is float32 where it is trained or computed in
    float32; else it keeps the dtype of its files.
    """
    folder = _folder(recipe)
    frozen = recipe.backbone.trained == "nothing"
    quantised = "quantization_config" in read_config(folder)
    own_dtype = quantised or (frozen and recipe.training.precision == "bf16")
    model = load(
        folder,
        dtype="auto" if own_dtype else "float32",
        weights="plain",
        trust_remote_code=recipe.backbone.trust_remote_code,
    )
    if isinstance(model, LookupExpertsMixin):
        raise UserError(f"{folder} has lookup experts already; give a model without.")
    model.name_or_path = recipe.backbone.name
    if recipe.experts is not None:
        _attach_experts(model, recipe, recipe.experts)
    _choose_trained(model, recipe.backbone.trained)
    return model


def refuse_sharding_quantised(recipe: UpcycleRecipe) -> None:
    """FSDP cuts weights, not what a quantiser keeps beside them."""
    if "quantization_config" in read_config(_folder(recipe)):
        raise UserError(
            f"{recipe.backbone.name} is quantised, and quantised models can't be sharded; train "
            "it without --shard, each process with a copy."
        )


def _attach_experts(model: Any, recipe: UpcycleRecipe, experts: ExpertsRecipe) -> None:
    frozen = recipe.backbone.trained == "nothing"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        attach(
            model,
            experts.num_experts,
            form=experts.form,
            row_size=experts.row_size,
            expert_size=experts.size,
            expert_kind=experts.kind,
            layers=experts.layers,
            train_backbone=not frozen,
            save="experts" if frozen else "full",
        )
    for block in model.lookup_blocks:
        block.float()


def _choose_trained(model: Any, trained: str) -> None:
    """Let the backbone's parameters take gradients, or not."""
    ffns = {id(p) for ffn in find_ffns(model) for p in ffn.parameters()} if trained == "ffn" else ()
    for name, parameter in model.named_parameters():
        if not is_attached(name) and parameter.is_floating_point():
            parameter.requires_grad_(trained == "all" or id(parameter) in ffns)


def prepare_to_save(model: Any, recipe: UpcycleRecipe) -> None:
    """Let `save_pretrained` write what the recipe asks for."""
    if recipe.experts is not None and recipe.save == "full":
        set_backbone_reference(model, None)


def _folder(recipe: UpcycleRecipe) -> Path:
    assert recipe.backbone.name is not None, "settled by for_backbone"
    return local_folder(recipe.backbone.name)
