"""The order in which training sees the sequences.

Everything here is decided by the number of a sequence within the run and the seed, so a run that
goes on at step n, on however many processes, sees what it would have seen. Each process asks for
the numbers that are its own.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.training.data import TokenDataset
from lookup_experts.training.streams import StreamedSequences

Example = dict[str, Tensor]

BLOCK_SEQUENCES = 10_000
"""Of a mixture: within so many sequences every source has exactly its share."""


class SequenceSource(Protocol):
    """Gives the sequence of a number; streamed text only for numbers that don't fall."""

    def __getitem__(self, index: int) -> Example: ...


class ShuffledSequences(torch.utils.data.Dataset[Example]):
    """As many sequences as a whole run takes: pass after pass over the data, each shuffled anew.

    No step is cut short where a pass ends.

    Args:
        sequences: the training text.
        num_sequences: how many the run takes.
        seed: decides the order.
    """

    def __init__(self, sequences: TokenDataset, num_sequences: int, seed: int) -> None:
        self._sequences = sequences
        self._num_sequences = num_sequences
        self._seed = seed
        self._pass = -1
        self._order = np.empty(0, dtype=np.uint32)

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> Example:
        return self._sequences[self.place(index)]

    def place(self, index: int) -> int:
        """Which of the sequences comes at `index`."""
        number, place = divmod(index, len(self._sequences))
        if number != self._pass:
            self._order = _permutation(len(self._sequences), self._seed, number)
            self._pass = number
        return int(self._order[place])


class MixedSequences(torch.utils.data.Dataset[Example]):
    """Several sources, each with its share of the sequences, and so of the tokens.

    In every block of `BLOCK_SEQUENCES` each source has its share exactly, in random places.

    Args:
        sources: what is mixed.
        weights: their shares, in any unit.
        num_sequences: how many the run takes.
        seed: decides which source comes when.
    """

    def __init__(
        self,
        sources: Sequence[SequenceSource],
        weights: Sequence[float],
        num_sequences: int,
        seed: int,
    ) -> None:
        self._sources = sources
        self._counts = share_out(BLOCK_SEQUENCES, weights)
        self._num_sequences = num_sequences
        self._seed = seed
        self._block = -1
        self._source_at = np.empty(0, dtype=np.int64)
        self._rank_at = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> Example:
        source, number = self.place(index)
        return self._sources[source][number]

    def place(self, index: int) -> tuple[int, int]:
        """Which source comes at `index`, and which of its sequences."""
        block, place = divmod(index, BLOCK_SEQUENCES)
        self._open_block(block)
        source = int(self._source_at[place])
        return source, block * int(self._counts[source]) + int(self._rank_at[place])

    def taken(self, index: int) -> list[int]:
        """How many sequences of each source come before `index`."""
        block, place = divmod(index, BLOCK_SEQUENCES)
        self._open_block(block)
        within = np.bincount(self._source_at[:place], minlength=len(self._counts))
        return [int(block * count + more) for count, more in zip(self._counts, within, strict=True)]

    def position(self, index: int) -> dict[str, Any]:
        """Where the streams among the sources are before `index`; by the source's number."""
        taken = self.taken(index)
        return {str(n): stream.position(taken[n]) for n, stream in self._streams()}

    def restore(self, position: dict[str, Any]) -> None:
        """Take up the streams at a position."""
        for number, stream in self._streams():
            stream.restore(position[str(number)])

    def _streams(self) -> list[tuple[int, StreamedSequences]]:
        numbered = enumerate(self._sources)
        return [(n, source) for n, source in numbered if isinstance(source, StreamedSequences)]

    def _open_block(self, block: int) -> None:
        if block == self._block:
            return
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        self._source_at = sources[_permutation(BLOCK_SEQUENCES, self._seed, block)]
        self._rank_at = np.empty(BLOCK_SEQUENCES, dtype=np.int64)
        for source, count in enumerate(self._counts):
            self._rank_at[self._source_at == source] = np.arange(count)
        self._block = block


def share_out(total: int, weights: Sequence[float]) -> np.ndarray:
    """int64 [weights]: `total` cut into whole parts nearest to the weights' shares.

    Raises:
        UserError: a share would be empty.
    """
    exact = total * np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: total - int(counts.sum())]] += 1
    if (counts == 0).any():
        raise UserError(
            f"A weight of {weights[int(np.argmin(counts))]} among {sum(weights):g} is less than "
            f"one sequence in {total:,}. Leave that source out, or give it more."
        )
    return counts


def _permutation(length: int, seed: int, number: int) -> np.ndarray:
    order = np.arange(length, dtype=np.uint32)
    np.random.default_rng((seed, number)).shuffle(order)
    return order
