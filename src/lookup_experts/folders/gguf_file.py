"""A backbone from a GGUF file, which holds a whole model: weights, configuration, vocabulary.

transformers unpacks its weights when it loads it, unless it has kernels for the packed ones.
"""

from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError


def loaded_gguf_file(model: Any) -> str | None:
    """The GGUF file that transformers loaded a model from, by what it was given; None: another."""
    quantizer = getattr(model, "hf_quantizer", None)
    return getattr(getattr(quantizer, "quantization_config", None), "gguf_file", None)


def gguf_tensors(path: Path) -> list[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Name, and (type, shape, first byte, last byte + 1) of every tensor in a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"Reading {path} needs the package gguf: pip install gguf.") from error
    try:
        tensors = GGUFReader(path).tensors
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} can't be read as GGUF: {error}.") from error
    return [
        (
            tensor.name,
            (
                tensor.tensor_type.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                int(tensor.data_offset),
                int(tensor.data_offset + tensor.n_bytes),
            ),
        )
        for tensor in tensors
    ]
