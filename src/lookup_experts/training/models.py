"""From a recipe to a model before training, and what its parameters amount to.

A model is built without weights and given them afterwards (`initialization.py`), so that one that
is larger than memory can be cut into shards in between (`sharding.py`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lookup_experts.folders.attach import attach
from lookup_experts.folders.attached_model import LookupExpertsMixin
from lookup_experts.model.gateless_llama import GatelessLlamaConfig, GatelessLlamaForCausalLM
from lookup_experts.model.moe import (
    MoeGatelessLlamaConfig,
    MoeGatelessLlamaForCausalLM,
    count_active,
)
from lookup_experts.model.router_losses import add_router_losses
from lookup_experts.model.wiring import routed_experts
from lookup_experts.training.initialization import give_weights
from lookup_experts.training.recipe import ExpertsRecipe, Recipe
from lookup_experts.training.sharding import shard_model

VOCAB_MULTIPLE = 64
"""Matrix kernels are fastest where the output head has a multiple of this many rows."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model has."""

    total: int
    """All parameters in training form."""
    trained: int
    """Those that training changes."""
    resident: int
    """Those in memory once the routed experts are folded into a table on disk."""
    active: int
    """Those of the resident that a token uses: of a mixture of experts, the selected ones."""


def build_model(recipe: Recipe, vocab_size: int) -> Any:
    """A model before training, float32 on the CPU; the same recipe gives the same weights.

    Args:
        recipe: sizes, experts, initialisation and seed.
        vocab_size: rows of the embedding and of the head.

    Returns:
        A `GatelessLlamaForCausalLM`, with lookup experts attached where the recipe has them, or a
        `MoeGatelessLlamaForCausalLM` where it has a mixture of experts.
    """
    model = build_without_weights(recipe, vocab_size)
    give_weights(model, torch.device("cpu"), recipe.training.seed, recipe.model.init_std)
    return model


def build_sharded_model(recipe: Recipe, vocab_size: int, device: torch.device) -> Any:
    """The model of `build_model`, cut into one shard per process, with the same weights.

    Args:
        recipe: as for `build_model`.
        vocab_size: as for `build_model`.
        device: of this process. All processes call this together.
    """
    model = build_without_weights(recipe, vocab_size)
    shard_model(model, device)
    give_weights(model, device, recipe.training.seed, recipe.model.init_std)
    return model


def build_without_weights(recipe: Recipe, vocab_size: int) -> Any:
    """The model of `build_model`, its parameters on the meta device: shapes without memory."""
    from accelerate import init_empty_weights

    # Buffers, which hold the rotary embedding's frequencies, are small and stay.
    with init_empty_weights(include_buffers=False):
        return _build(recipe, vocab_size)


def _build(recipe: Recipe, vocab_size: int) -> Any:
    sizes = recipe.model
    model = _backbone(recipe, vocab_size)
    if sizes.experts is not None:
        attach(
            model,
            sizes.experts.num_experts,
            expert_size=sizes.experts.size,
            expert_kind=sizes.experts.kind,
            layers=sizes.experts.layers,
            init="normal",
        )
        _add_router_losses(model, sizes.experts)
    return model


def _backbone(recipe: Recipe, vocab_size: int) -> Any:
    """The model without lookup experts."""
    sizes = recipe.model
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": recipe.training.context_length,
        "initializer_range": sizes.init_std,
        "tie_word_embeddings": False,
    }
    if sizes.moe is None:
        config = GatelessLlamaConfig(intermediate_size=sizes.ffn_size, **common)
        return GatelessLlamaForCausalLM(config)
    return MoeGatelessLlamaForCausalLM(
        MoeGatelessLlamaConfig(
            intermediate_size=sizes.moe.size or sizes.ffn_size // 2,
            num_experts=sizes.moe.num_experts,
            num_experts_per_tok=sizes.moe.experts_per_token,
            shared_size=sizes.moe.shared_size,
            load_balance_loss=sizes.moe.load_balance_loss,
            z_loss=sizes.moe.z_loss,
            **common,
        )
    )


def _add_router_losses(model: Any, experts: ExpertsRecipe) -> None:
    """Lookup experts train without auxiliary losses, unless the recipe asks for them."""
    if experts.load_balance_loss or experts.z_loss:
        add_router_losses(model, 1, experts.load_balance_loss, experts.z_loss)


def with_vocabulary(recipe: Recipe, tokenizer_size: int) -> Recipe:
    """The recipe with its vocabulary size settled: as stated, or for all ids of a tokenizer."""
    if recipe.model.vocab_size is not None:
        return recipe
    rounded = -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return replace(recipe, model=replace(recipe.model, vocab_size=rounded))


def count_parameters(model: Any) -> ParameterCounts:
    """A model's parameters; one that is used in two places counts once."""
    total = sum(p.numel() for p in model.parameters())
    layers = routed_experts(model) if isinstance(model, LookupExpertsMixin) else []
    routed = sum(p.numel() for layer in layers for p in layer.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCounts(total, trained, total - routed, count_active(model) - routed)


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; transformers renamed the method in 5.x."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
