"""The attention of a decoding step on a processor.

For a single query in bfloat16 torch's fused attention takes three to fifteen times as long as the
two products and the softmax that it fuses, and grows with the batch beyond the linear layers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lookup_experts.model.blocks import is_multimodal

NAME = "sdpa_or_products"
"""As transformers knows it."""


def use_fast_attention(model: Any) -> None:
    """Have a model's steps attend by products where that is faster: in bfloat16, on a CPU that
    multiplies in it, for a text model whose attention is transformers' `sdpa`.

    It is a matter of the configuration in memory, which isn't saved.
    """
    config = model.config
    if (
        model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and not is_multimodal(config)
        and type(model.base_model)._can_set_attn_implementation()
    ):
        config._attn_implementation = NAME


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention of transformers: `sdpa`, or two products for one query per sequence.

    Scores are rounded to bfloat16, as by `eager`, before the softmax in float32.

    Args:
        module: of the attention; see transformers.
        query: [B, H, T, D].
        key, value: [B, H or fewer, columns, D].
        attention_mask: bool or what is added, [B, 1, T, columns]; None: all is seen.
        scaling: of the scores; None: D^-1/2.
        options: of transformers' attention functions.

    Returns:
        [B, T, H, D], and no weights.
    """
    if not _is_step(query, attention_mask, options):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    batch, num_heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, size)  # heads that share their keys together
    scores = torch.matmul(grouped, key.transpose(2, 3)).float()
    scores *= size**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores.masked_fill_(~attention_mask, torch.finfo(torch.float32).min)
        else:
            scores += attention_mask
    seen = torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)
    return seen.view(batch, 1, num_heads, -1), None


def _is_step(query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    return (
        query.shape[2] == 1
        and query.dtype == torch.bfloat16
        and query.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (mask is None or mask.shape[1] == 1)
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and not options.get("dropout")
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
