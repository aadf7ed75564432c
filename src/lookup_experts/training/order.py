"""The order in which training sees the sequences."""

import numpy as np
import torch
from torch import Tensor

from lookup_experts.training.data import TokenDataset


class ShuffledSequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As many sequences as a whole run takes: pass after pass over the data, each shuffled anew.

    An item depends on its number and the seed alone, so a run that goes on at step n, on however
    many processes, sees what it would have seen; and no step is cut short where a pass ends.

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

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._sequences[self.place(index)]

    def place(self, index: int) -> int:
        """Which of the sequences comes at `index`."""
        number, place = divmod(index, len(self._sequences))
        if number != self._pass:
            self._order = _permutation(len(self._sequences), self._seed, number)
            self._pass = number
        return int(self._order[place])


def _permutation(length: int, seed: int, number: int) -> np.ndarray:
    order = np.arange(length, dtype=np.uint32)
    np.random.default_rng((seed, number)).shuffle(order)
    return order
