"""What ties a table to its model: a hash over everything that was folded."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.model.placement import named_weights


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def embedding_hash(embedding: nn.Module) -> str:
    """The hash of the input embedding alone: an inference folder still has it, so it can be
    computed again there and compared with what the table was made from."""
    return hash_tensors(named_weights(embedding))


def fingerprint(embedding: nn.Module, layers: Iterable[Any]) -> str:
    """The hash over the embedding and the weights of whatever makes the rows of each layer."""
    digest = hashlib.sha256(embedding_hash(embedding).encode())
    for number, experts in enumerate(layers):
        digest.update(f"{number} {experts.identity}\n".encode())
        digest.update(hash_tensors(named_weights(experts)).encode())
    return digest.hexdigest()
