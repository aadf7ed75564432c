"""Checkpoints of released models' shapes with random numbers, and the same with embeddings in
tables: speed doesn't depend on the numbers."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lookup_experts import console
from lookup_experts.errors import DiskFullError
from lookup_experts.folders.checkpoint import safetensors_header
from lookup_experts.generation.offload import offload
from lookup_experts.units import format_bytes

_BLOCK = 2**25
"""Random numbers that are repeated; more take longer to draw than to write."""
_GEMMA_3N = {
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_hidden_layers": 30,
    "num_kv_shared_layers": 10,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 6,
    "activation_sparsity_pattern": [0.0] * 30,
    "max_position_embeddings": 4096,
}
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3n-e2b": ("gemma3n_text", {**_GEMMA_3N, "intermediate_size": [8192] * 30}),
    "gemma-3n-e2b-cut": (
        "gemma3n_text",
        {
            **_GEMMA_3N,
            "hidden_size": 512,
            "intermediate_size": [2048] * 30,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "altup_num_inputs": 2,
            "laurel_rank": 32,
        },
    ),
    "qwen4-exp-cut": (
        "qwen4_exp_text",
        {
            "vocab_size": 65_536,
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 64,
            "indexer_budget": 1024,
            "indexer_compress_ratio": 4,
            "hc_count": 2,
            "hc_lowrank": 32,
            "ple_layer_ids": [1],
            "ple_embed_dim": 2048,
            "ngram_vocab_size_base": 2_000_000,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "max_position_embeddings": 4096,
        },
    ),
}
"""By name, the model type and what its configuration says. `cut`: the tables are of the released
size and the rest is as small as fits any machine; of Qwen4Exp one layer's, with rows of 256 bytes
and 2 million instead of 20 of each hash."""


def released_folders(shape: str, encoding: str, work: Path) -> tuple[Path, Path]:
    """The folder of a shape's checkpoint in bfloat16, and that of the same in tables; made where
    they are not there yet.

    Raises:
        DiskFullError: they don't fit.
    """
    plain, out = work / shape, work / f"{shape}-{encoding}"
    if not plain.exists():
        _write_checkpoint(shape, plain)
    if not out.exists():
        with console.progress_bar("Offloading embeddings") as progress:
            offload(plain, out, encoding=encoding, progress=progress, notify=console.say)
    return plain, out


def _write_checkpoint(shape: str, folder: Path) -> None:
    model_type, sizes = SHAPES[shape]
    config = AutoConfig.for_model(model_type, dtype="bfloat16", **sizes)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: one for name, one in _with_integers(model).items() if name not in tied}
    sizes = {name: math.prod(one.shape) * one.dtype.itemsize for name, one in tensors.items()}
    total = sum(sizes.values())
    work = folder.parent
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if 2 * total > free:
        raise DiskFullError(
            f"The checkpoint of {shape} and its tables need {format_bytes(2 * total)} in {work}, "
            f"where {format_bytes(free)} are free. Give another folder with --work."
        )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    block = (torch.randn(_BLOCK // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    numbers: Any = block.view(torch.uint8).numpy()
    shapes = {name: (_NAMES[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    done = 0
    with (
        (partial / "model.safetensors").open("wb") as file,
        console.progress_bar(f"Writing {shape}") as advance,
    ):
        file.write(safetensors_header(shapes, sizes))
        for name, one in tensors.items():
            if not one.is_meta:
                done += file.write(one.numpy().tobytes())
                continue
            left = sizes[name]
            while left:
                written = file.write(numbers[: min(left, _BLOCK)])
                left, done = left - written, done + written
                advance(done, total)
    partial.rename(folder)


def _with_integers(model: Any) -> dict[str, Tensor]:
    """The tensors of a model on `meta`; those of whole numbers, which can't be drawn, with their
    values."""
    for module in model.modules():
        whole = {
            name: one
            for name, one in module.named_buffers(recurse=False)
            if not one.is_floating_point()
        }
        if whole:
            for name, one in whole.items():
                setattr(module, name, torch.zeros(one.shape, dtype=one.dtype))
            model._init_weights(module)
    state: dict[str, Tensor] = model.state_dict()
    return state
