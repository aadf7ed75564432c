"""Tiny random causal LMs of many families, and what tests do with all of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.model.gateless_llama import GatelessLlamaConfig, GatelessLlamaForCausalLM
from lookup_experts.model.moe import MoeGatelessLlamaConfig, MoeGatelessLlamaForCausalLM

VOCAB = 97
HIDDEN = 32

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
# Families whose heads would be wide if nothing was said.
_HEADS = {"head_dim": 8}
# What a family needs beyond the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": _HEADS,
    "gemma": _HEADS,
    "gemma2": _HEADS,
    "gemma3_text": _HEADS,
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "gpt_neox": {},
    "gpt2": {"n_positions": 128},
    "falcon": {"new_decoder_architecture": True},
    "bloom": {},
    "cohere": {},
    "glm4": _HEADS,
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS | _HEADS,
    "phimoe": _EXPERTS,
    "gpt_oss": _EXPERTS | _HEADS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of a tiny model of a family."""
    return AutoConfig.for_model(family, **{**_SIZES, **FAMILIES.get(family, {}), **overrides})


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()


def gateless_model(seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model of the paper's backbone."""
    torch.manual_seed(seed)
    return GatelessLlamaForCausalLM(GatelessLlamaConfig(**{**_SIZES, **overrides})).eval()


def moe_model(seed: int = 0, **overrides: Any) -> Any:
    """A tiny random mixture of experts on the paper's backbone."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, "num_hidden_layers": 2, "intermediate_size": 24, "num_experts": 6}
    return MoeGatelessLlamaForCausalLM(MoeGatelessLlamaConfig(**{**sizes, **overrides})).eval()


def attached_model(family: str = "llama", seed: int = 0, *, scale: float = 0.4, **settings) -> Any:
    """A tiny model with experts that have something to say.

    Args:
        scale: the standard deviation of the experts' weights and routers.
        settings: of `le.attach`.
    """
    model = gateless_model(seed) if family == "gateless_llama" else tiny_model(family, seed)
    le.attach(model, **{"num_experts": 4, "expert_size": 16, "init": "normal", **settings})
    randomize_experts(model, scale)
    return model.eval()


@torch.no_grad()
def randomize_experts(model: Any, scale: float = 0.4, seed: int = 1) -> None:
    """Draw new weights for the experts and routers of an attached model."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lookup_experts." in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def token_ids(*shape: int, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    """Random token ids, without the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, shape, generator=generator)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """The logits of one forward pass without a cache."""
    return model(input_ids=ids, use_cache=False, **inputs).logits


@torch.no_grad()
def greedy_reference(model: Any, prompt: Tensor, num_tokens: int) -> Tensor:
    """`num_tokens` new ids for a prompt [1, T], one full forward pass for each: no cache."""
    ids = prompt
    for _ in range(num_tokens):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def greedy(model: Any, prompt: Tensor, num_tokens: int, **arguments: Any) -> Tensor:
    """The new ids of transformers' greedy `generate`."""
    arguments.setdefault("attention_mask", torch.ones_like(prompt))
    with torch.no_grad():
        output = model.generate(
            prompt,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **arguments,
        )
    return output[:, prompt.shape[1] :]


def left_padded(prompts: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of many lengths as (ids, attention mask) [B, T], padding in front."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def enable_checkpointing(model, options=None):
    """Gradient checkpointing, under its name in this version of transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
