"""Routed experts as a table holds them: their rows for every token id, and what is said of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lookup_experts.model.experts import LayerExperts, normalize
from lookup_experts.model.fingerprint import embedding_hash, fingerprint
from lookup_experts.model.placement import execution_device


def evaluate_experts(
    embedding: nn.Module, layers: Sequence[LayerExperts]
) -> Callable[[Tensor], Iterator[Tensor]]:
    """What gives the rows of training-form experts, on the device where they are: token ids [c]
    int64 -> the rows [c, N, d] of each layer, in order."""

    def rows_of(token_ids: Tensor) -> Iterator[Tensor]:
        device = execution_device(embedding)
        normalized = normalize(embedding(token_ids.to(device)), layers[0].norm_eps)
        for experts in layers:
            yield experts(normalized).transpose(0, 1)

    return rows_of


@dataclass(frozen=True)
class ExpertFacts:
    """What a table of experts must know of them."""

    num_layers: int
    num_experts: int
    hidden_size: int
    fingerprint: str
    """Hash of the embedding and all that is folded."""
    embedding_hash: str
    evaluation_bytes: int
    """What evaluating one id takes, layer by layer."""


def expert_facts(embedding: nn.Module, layers: Sequence[LayerExperts]) -> ExpertFacts:
    """The facts of the given experts.

    Args:
        embedding: the backbone's input embedding.
        layers: the experts of each layer, in order.
    """
    first = layers[0]
    num_experts, expert_size, _ = first.up_proj.shape
    hidden_size = first.down_proj.shape[1]
    activations = 3 if first.kind == "swiglu" else 2
    numbers = num_experts * (expert_size * activations + 2 * hidden_size)
    return ExpertFacts(
        num_layers=len(layers),
        num_experts=num_experts,
        hidden_size=hidden_size,
        fingerprint=fingerprint(embedding, layers),
        embedding_hash=embedding_hash(embedding),
        evaluation_bytes=numbers * first.up_proj.element_size(),
    )
