"""Keys and values in buffers that stay where they are: what a captured step reads and writes.

Rows are aligned on the left: row b's tokens lie in its columns 0 to `lengths[b] - 1`, and a step
writes the next one. Where that is stands in a tensor, so a step is the same operations on the same
places whatever the rows' lengths are, and no row is ever moved for another's sake.

    columns     0 . . . . . . . . . . . . . . C
    row 0       a a a a a a a a * - - - - - -        lengths = [8, 4]; * is written next,
    row 1       b b b b * - - - - - - - - - -        - is masked

A step sees a **window** of the buffers: as many rows as the next power of two, and of the columns
the least power of two (at least `LEAST_COLUMNS`) that holds the longest row. So there are few
different steps, and each is captured once. Rows that only pad repeat a token id of the batch (no
other record is asked for) in a row of their own without a past.

Memory: 2 · layers · key-value heads · head size · bytes, for each row and column of the largest
window there was. Buffers only grow, by doubling; then what was captured over the old ones goes.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

LEAST_COLUMNS = 256


class Window:
    """The part of the buffers that a step sees, and where each row of it writes.

    Attributes:
        rows, columns: its size.
        numbers: int64 [2 · rows or more]: the rows' token ids, then their lengths.
    """

    def __init__(self) -> None:
        self.rows = self.columns = 0
        self.numbers = torch.zeros(0, dtype=torch.int64)

    @property
    def ids(self) -> Tensor:
        """int64 [rows]: the tokens that the next step takes."""
        return self.numbers[: self.rows]

    @property
    def lengths(self) -> Tensor:
        """int64 [rows]: tokens of each row, and the column of its next one."""
        return self.numbers[self.rows : 2 * self.rows]


class GrowingLayer(CacheLayerMixin):
    """One layer of a batch whose rows come and go: keys and values [rows, heads, columns, head
    size] in buffers that only grow."""

    is_sliding = False  # all columns are kept; a sliding window is a matter of the mask

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers like these [..., heads, ..., head size]."""
        self.keys, self.values = (
            states.new_zeros(0, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def get_max_length(self) -> int:
        """-1: grows as needed."""
        return -1

    def grow(self, rows: int, columns: int) -> None:
        """Make the buffers this large, which is no smaller, keeping what is in them."""
        grown = []
        for buffer in (self.keys, self.values):
            # Zeros, not just any memory: masked columns are multiplied by 0, and 0 x nan is nan.
            larger = buffer.new_zeros(rows, buffer.shape[1], columns, buffer.shape[3])
            larger[: buffer.shape[0], :, : buffer.shape[2]] = buffer
            grown.append(larger)
        self.keys, self.values = grown


class FixedLayer(GrowingLayer):
    """One layer of a `FixedCache`."""

    # Then transformers makes masks of single tokens without looking at their numbers, which a
    # captured step could not, and always makes one.
    is_compileable = True

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write each row's new column, of [rows, heads, 1, head size]; gives the window."""
        rows, columns = self._window.rows, self._window.columns
        place = self._window.lengths.view(-1, 1, 1, 1)
        seen = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            part = buffer[:rows, :, :columns]
            part.scatter_(2, place.expand_as(states), states)
            seen.append(part)
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that attention sees, offset of the first)."""
        return self._window.columns, 0

    def get_seq_length(self) -> int:
        """Such that causality masks nothing: the attention mask says what each row sees."""
        return self._window.columns - 1


class FixedCache(Cache):
    """A transformers cache of rows that come and go; the order of rows is the caller's."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens per row."""
        self.window = Window()
        self.captured: dict[tuple[int, int], Any] = {}
        """What was captured over these buffers, by the window's size."""
        self._rows = self._columns = 0
        super().__init__(layers=[])

    def __len__(self) -> int:
        return len(self.lengths)

    def join(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Append the rows of a prefilled, left-padded cache.

        Args:
            cache: keys and values [G, heads, T, head size] per layer.
            lengths: tokens of each of its G rows; the last ones of T.
        """
        if not self.layers:
            for filled in cache.layers:
                layer = FixedLayer(self.window)
                layer.lazy_initialization(filled.keys, filled.values)
                self.layers.append(layer)
        before = len(self.lengths)
        self.lengths.extend(lengths)
        self._reserve(len(self.lengths), max(lengths))
        begin = 0
        for length, group in groupby(lengths):  # mostly all of them
            end = begin + len(list(group))
            for layer, filled in zip(self.layers, cache.layers, strict=True):
                for buffer, part in ((layer.keys, filled.keys), (layer.values, filled.values)):
                    target = buffer[before + begin : before + end, :, :length]
                    target.copy_(part[begin:end, :, part.shape[2] - length :])
            begin = end

    def leave(self, row: int, wipe: bool = False) -> None:
        """Remove a row; the last row takes its place.

        Args:
            wipe: its numbers are not finite and must not stay, not even masked.
        """
        last = len(self.lengths) - 1
        length = self.lengths[last]
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                if wipe:
                    buffer[row].zero_()
                if row != last:
                    buffer[row, :, :length] = buffer[last, :, :length]
        self.lengths[row] = length
        self.lengths.pop()

    def make_room(self) -> None:
        """Before a step: see to it that there is a column for its tokens, and set the window."""
        longest = max(self.lengths) + 1
        self._reserve(len(self.lengths), longest)
        self.window.rows = power_of_two(len(self.lengths))
        self.window.columns = power_of_two(longest, LEAST_COLUMNS)

    def set_step(self, token_ids: Sequence[int]) -> None:
        """The tokens that the next step takes, one for each row."""
        padding = self.window.rows - len(self.lengths)
        numbers = torch.tensor(
            [*token_ids, *[token_ids[-1]] * padding, *self.lengths, *[0] * padding]
        )
        target = self.window.numbers[: len(numbers)]
        if target.is_cuda:
            numbers = numbers.pin_memory()  # or the host would wait for all that is queued
        target.copy_(numbers, non_blocking=True)

    def advance(self) -> None:
        """After a step: its column counts. A step that failed is simply not counted."""
        self.lengths = [length + 1 for length in self.lengths]

    def step_inputs(self) -> dict[str, Tensor]:
        """`attention_mask` [rows, columns] and `position_ids` [rows, 1] int64 of the next step,
        from what the window's tensors say at the time."""
        lengths = self.window.lengths.unsqueeze(1)
        columns = torch.arange(self.window.columns, device=lengths.device)
        return {"attention_mask": (columns <= lengths).long(), "position_ids": lengths}

    def _reserve(self, rows: int, columns: int) -> None:
        if rows <= self._rows and columns <= self._columns:
            return
        if self.captured:
            torch.accelerator.synchronize()  # none of it is under way when it goes
            self.captured.clear()
        self._rows = max(self._rows, power_of_two(rows))
        self._columns = max(self._columns, power_of_two(columns, LEAST_COLUMNS))
        for layer in self.layers:
            layer.grow(self._rows, self._columns)
        numbers = self.layers[0].keys.new_zeros(2 * self._rows, dtype=torch.int64)
        numbers[: len(self.window.numbers)] = self.window.numbers
        self.window.numbers = numbers


def power_of_two(number: int, least: int = 1) -> int:
    """The least power of two that is neither below `number` nor below `least`."""
    return 1 << (max(number, least) - 1).bit_length()
