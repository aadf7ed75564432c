"""What makes rows as a table knows it: its rows for every token id, and what is said of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lookup_experts.model.fingerprint import embedding_hash, fingerprint
from lookup_experts.model.placement import execution_device


def evaluate_experts(
    embedding: nn.Module, layers: Sequence[Any]
) -> Callable[[Tensor], Iterator[Tensor]]:
    """What gives the rows of a model in training form, on the device where it is: token ids [c]
    int64 -> the rows [c, N, r] of each layer, in order.

    Args:
        embedding: the backbone's input embedding.
        layers: what makes the rows of each layer, in order (`forms`).
    """

    def rows_of(token_ids: Tensor) -> Iterator[Tensor]:
        token_ids = token_ids.to(execution_device(embedding))
        inputs = layers[0].inputs(embedding(token_ids))
        for experts in layers:
            yield experts(inputs, token_ids).transpose(0, 1)

    return rows_of


@dataclass(frozen=True)
class ExpertFacts:
    """What a table of experts must know of them."""

    num_layers: int
    num_experts: int
    """N, rows of one id and layer."""
    row_size: int
    fingerprint: str
    """Hash of the embedding and all that is folded."""
    embedding_hash: str
    evaluation_bytes: int
    """What evaluating one id takes, layer by layer."""


def expert_facts(embedding: nn.Module, layers: Sequence[Any]) -> ExpertFacts:
    """The facts of what makes the rows of each layer, in order."""
    first = layers[0]
    return ExpertFacts(
        num_layers=len(layers),
        num_experts=first.num_experts,
        row_size=first.row_size,
        fingerprint=fingerprint(embedding, layers),
        embedding_hash=embedding_hash(embedding),
        evaluation_bytes=first.evaluation_numbers * next(first.parameters()).element_size(),
    )
