"""Recall: does a model find again what its context says?

Loss gains of token tables overstate what they do for a model, since a table foretells from the
last token alone. So recall is measured by itself, after the multi-query associative recall of
*Zoology* (Arora et al. 2023, arXiv 2312.04927, section 3.1), on words instead of trained symbols.
A sequence is

    filler ... k1 v1 k2 v2 ... kn vn ... filler ... ki

with keys, values and filler drawn from one pool of words, all keys and values different. The model
is asked which of the n values in the context comes next; `vi` is right. A model that can't recall
is right once in n times, whatever words it prefers and however near to the end it looks, since
words, pairs and i are drawn evenly. The *distance* is the number of tokens from the key to its
repetition. Sequences depend on the pool, the seed and the distance alone, so models with one
tokenizer are asked the very same.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.evaluation.perplexity import Progress, window_size

NUM_PAIRS = 8
NUM_SEQUENCES = 256
"""For each distance: two standard errors are at most 6 % of accuracy."""
SHORTEST_WORD = 3
"""Letters; shorter entries of a vocabulary are mostly pieces of words."""
_SPACE = ("Ġ", "▁")
"""How vocabularies write the space before a word."""


@dataclass(frozen=True)
class RecallAtDistance:
    """What a model recalled over one distance."""

    distance: int
    """Tokens from a key to its repetition."""
    accuracy: float
    """Share of sequences whose right value is the likeliest of the values in the context."""
    accuracy_error: float
    """Standard error."""
    nats: float
    """Mean log-probability of the right value among the values in the context."""
    nats_error: float
    """Standard error."""


@dataclass(frozen=True)
class Recall:
    """What `measure_recall` found."""

    distances: list[RecallAtDistance]
    num_pairs: int
    num_sequences: int
    """For each distance."""
    num_words: int
    """Of the pool that they were drawn from."""
    seed: int

    @property
    def chance_accuracy(self) -> float:
        """Of guessing among the values in the context."""
        return 1 / self.num_pairs

    @property
    def chance_nats(self) -> float:
        """Mean log-probability that goes with giving all of them the same."""
        return -math.log(self.num_pairs)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            **asdict(self),
            "chance_accuracy": self.chance_accuracy,
            "chance_nats": self.chance_nats,
        }


@torch.inference_mode()
def measure_recall(
    model: Any,
    words: Tensor,
    *,
    distances: Sequence[int] | None = None,
    num_pairs: int = NUM_PAIRS,
    num_sequences: int = NUM_SEQUENCES,
    prefix: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Recall:
    """How well a causal LM recalls pairs of words from its context.

    Args:
        model: any causal LM of transformers, in evaluation mode.
        words: [n] int64, the token ids that keys, values and filler are drawn from: at least
            4 × num_pairs; `word_ids(tokenizer)`.
        distances: tokens from a key to its repetition, at least 2 × num_pairs each; None for
            those of `fitting_distances`.
        num_pairs: pairs in a context; chance is one in that many.
        num_sequences: for each distance.
        prefix: token ids that every sequence begins with, as the tokenizer puts them.
        seed: other sequences for another seed.
        batch_size: sequences in a forward pass; changes nothing but speed and memory.
        progress: called with (sequences done, sequences in all).

    Raises:
        UserError: too few words, or no distance fits into the model's context.
    """
    if distances is None:
        distances = fitting_distances(model, num_pairs, len(prefix))
    found = []
    for number, distance in enumerate(distances):
        sequences, values = recall_sequences(words, distance, num_pairs, num_sequences, seed)
        start = torch.tensor(list(prefix), dtype=torch.int64).expand(num_sequences, -1)
        parts = []
        batches = torch.cat([start, sequences], dim=1).split(batch_size)
        for inputs, candidates in zip(batches, values.split(batch_size), strict=True):
            parts.append(candidate_log_probabilities(model, inputs, candidates))
            if progress:
                done = number * num_sequences + sum(map(len, parts))
                progress(done, len(distances) * num_sequences)
        found.append(_summary(distance, torch.cat(parts)))
    return Recall(found, num_pairs, num_sequences, len(words), seed)


def fitting_distances(model: Any, num_pairs: int, prefix_tokens: int) -> list[int]:
    """Powers of two from 2 × num_pairs to what fits into the model's context, 1,024 at most.

    Raises:
        UserError: none fits.
    """
    beside = 2 * num_pairs - 1 + prefix_tokens
    context = window_size(model)
    smallest = math.ceil(math.log2(2 * num_pairs))
    distances = [2**power for power in range(smallest, 11) if 2**power + beside <= context]
    if not distances:
        raise UserError(
            f"The model's context of {context} tokens is too short for recall: {num_pairs} pairs "
            f"need {2**smallest + beside}."
        )
    return distances


def recall_sequences(
    words: Tensor, distance: int, num_pairs: int, num_sequences: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Sequences that end in the repetition of a key, and the values to choose from.

    Args:
        words: [n] int64, the pool.
        distance: tokens from the key to its repetition, at least 2 × num_pairs.

    Returns:
        sequences [S, 2 × num_pairs + distance - 1] int64, and values [S, num_pairs] int64 of
        which the first is the right one.

    Raises:
        UserError: the pool is too small, or the distance too short.
    """
    if len(words) < 4 * num_pairs:
        raise UserError(
            f"Recall of {num_pairs} pairs needs {4 * num_pairs} words that are one token each; "
            f"there are {len(words)}."
        )
    if distance < 2 * num_pairs:
        raise UserError(
            f"A distance of {distance} tokens has no room for {num_pairs} pairs; give at least "
            f"{2 * num_pairs}."
        )
    generator = torch.Generator().manual_seed(seed * 2**20 + distance)
    key_place = 2 * (num_pairs - 1)  # of the key that is asked for; room for the other pairs
    sequences = torch.empty(num_sequences, key_place + distance + 1, dtype=torch.int64)
    values = torch.empty(num_sequences, num_pairs, dtype=torch.int64)
    for sequence, choices in zip(sequences, values, strict=True):
        shuffled = words[torch.randperm(len(words), generator=generator)]
        pairs, others = shuffled[: 2 * num_pairs].view(num_pairs, 2), shuffled[2 * num_pairs :]
        places = torch.randint(len(others), sequence.shape, generator=generator)
        sequence.copy_(others[places])
        asked = int(torch.randint(num_pairs, (), generator=generator))
        begin = key_place - 2 * asked
        sequence[begin : begin + 2 * num_pairs] = pairs.flatten()
        sequence[-1] = pairs[asked, 0]
        choices.copy_(pairs[:, 1].roll(-asked))
    return sequences, values


def candidate_log_probabilities(model: Any, inputs: Tensor, candidates: Tensor) -> Tensor:
    """[B, n] float64: log-probabilities of candidates [B, n] after inputs [B, T], among them."""
    output = model(input_ids=inputs.to(model.device), use_cache=False, logits_to_keep=1)
    logits = output.logits[:, -1].double().cpu()
    return logits.gather(1, candidates).log_softmax(dim=1)


def _summary(distance: int, log_probabilities: Tensor) -> RecallAtDistance:
    """The right value is the first of [S, n]."""
    likeliest = log_probabilities == log_probabilities.amax(dim=1, keepdim=True)
    right = likeliest[:, 0].double() / likeliest.sum(dim=1)  # equals share the place
    nats = log_probabilities[:, 0]
    root = math.sqrt(len(nats))
    return RecallAtDistance(
        distance=distance,
        accuracy=float(right.mean()),
        accuracy_error=float(right.std()) / root,
        nats=float(nats.mean()),
        nats_error=float(nats.std()) / root,
    )


def word_ids(tokenizer: Any) -> Tensor:
    """Entries of a tokenizer's vocabulary that are a space and a word of small letters; [n] int64.

    Raises:
        UserError: there are too few to measure recall with.
    """
    entries = sorted((token_id, entry) for entry, token_id in tokenizer.get_vocab().items())
    special = set(tokenizer.all_special_ids)
    found = [
        token_id
        for token_id, entry in entries
        if token_id not in special and entry.startswith(_SPACE) and _is_word(entry[1:])
    ]
    if len(found) < 4 * NUM_PAIRS:
        raise UserError(
            f"Recall is measured with words that are one token each; this tokenizer has "
            f"{len(found)} of them, and {4 * NUM_PAIRS} are needed."
        )
    return torch.tensor(found)


def _is_word(text: str) -> bool:
    return len(text) >= SHORTEST_WORD and text.isascii() and text.isalpha() and text.islower()
