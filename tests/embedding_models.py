"""Tiny random models with embeddings that are large in released ones, and their folders."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM

import lookup_experts as le

_PER_LAYER = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "gemma3n_text": {
        **_PER_LAYER,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "altup_active_idx": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {**_PER_LAYER, "global_head_dim": 8},
    "qwen4_exp_text": {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 211,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
}
"""What each family needs beyond the sizes."""
MODULES: dict[str, tuple[str, ...]] = {
    "llama": ("model.embed_tokens",),
    "gemma3n_text": ("model.embed_tokens_per_layer",),
    "gemma4_text": ("model.embed_tokens_per_layer",),
    "qwen4_exp_text": (
        "model.layers.0.ple.ple_embedding.ngram_embedding",
        "model.layers.2.ple.ple_embedding.ngram_embedding",
    ),
}
"""What is offloaded of each; of all but llama without being named."""


def embedding_model(family: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    """A tiny random model of a family, in which nothing is zero that was random when trained."""
    model = tiny_model(family, **{**FAMILIES[family], **overrides})
    randomize_zeros(model)
    return model.to(dtype)


@torch.no_grad()
def randomize_zeros(model: Any) -> None:
    """Draw numbers for the weights that a model begins with as zeros, and which would hide what
    its embeddings say."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def saved_and_offloaded(family: str, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The folder of such a model, and that of the same with its embeddings in tables."""
    plain, out = folder / "plain", folder / "offloaded"
    embedding_model(family).save_pretrained(plain)
    names = MODULES[family] if family == "llama" else None
    le.offload(plain, out, names, notify=lambda message: None, **options)
    return plain, out


def load_plain(folder: Path) -> Any:
    """A model with its embeddings in memory."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def load_offloaded(folder: Path, **options: Any) -> Any:
    """A model with tables whose other weights are multiplied as transformers does it, so that its
    numbers can be those of `load_plain` to the last bit."""
    return le.load(folder, weights="plain", **options)
