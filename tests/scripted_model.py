"""A tiny Llama that says what it is told to, token by token, through a real server."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import tiny_model

import lookup_experts as le

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last %}<|next|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
)


def scripted(pieces: Sequence[str], num_experts: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer): after `<|start|>` come the pieces and then the end of the text.

    Each piece is a token of its own, so all must differ. What the model says next depends on the
    token before alone: it goes on where a text stops.

    Args:
        pieces: what it says.
        num_experts: lookup experts per layer, which add nothing; 0: none.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    assert len(set(pieces)) == len(pieces)
    special = ["<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|next|>"]
    ids = {text: place for place, text in enumerate([*special, "<|start|>", *pieces])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    # What a text is cut into: the pieces, wherever they stand in it.
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    backend.add_special_tokens([*special, "<|start|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE

    size = 2 * -(-len(ids) // 2)
    model = tiny_model(
        "llama",
        vocab_size=size,
        hidden_size=size,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=ids["<|end|>"],
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        follower = {
            ids[one]: ids[two] for one, two in zip(["<|start|>", *pieces], pieces, strict=False)
        }
        follower[ids[pieces[-1]]] = ids["<|end|>"]
        model.lm_head.weight.zero_()
        for before, after in follower.items():
            model.lm_head.weight[after, before] = 100.0
    if num_experts:
        le.attach(model, num_experts=num_experts, expert_size=8)
        model.eval()
    return model, tokenizer
