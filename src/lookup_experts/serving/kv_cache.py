"""Keys and values of a batch whose rows join and leave at any step.

Rows are aligned on the right, as in a batch with left padding: every row's newest token is in the
same column, `end - 1`, and row b begins at column `end - lengths[b]`. So a step writes one column,
attention sees one slice as wide as the longest row, and transformers' own masks (causal, sliding
windows, ALiBi) are right as they are. What is left of a row's beginning is masked.

    columns     0 . . . . . . . . . . end
    row 0       . . . a a a a a a a a |
    row 1       . . . . . . . b b b b |      width = 8, lengths = [8, 4]

Buffers only grow, so memory stays flat once a server has seen its load.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lookup_experts.errors import UserError
from lookup_experts.generation.fixed_cache import GrowingLayer

LEAST_SLACK, MOST_SLACK = 64, 256
"""Columns that a batch may move on before it is moved back to the left edge: half of what its
longest row takes, within these, so that memory follows what is needed."""
PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Cache layers that are nothing but keys and values of past tokens, or nothing at all: of blocks
that use those of others, as Gemma 3n's and Gemma 4's last ones do."""


class Frame:
    """Where the rows are; shared by all layers."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens per row."""
        self.end = 0
        """One past the column of every row's newest token."""

    @property
    def width(self) -> int:
        """Of the longest row."""
        return max(self.lengths, default=0)


class BatchLayer(GrowingLayer):
    """One layer of a `BatchCache`."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self._frame = frame

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one new column [B, heads, 1, head size]; gives views of all that is attended."""
        frame = self._frame
        rows, end = len(frame.lengths), frame.end
        begin = end - frame.width
        seen = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[:rows, :, end : end + 1] = states
            seen.append(buffer[:rows, :, begin : end + 1])
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that attention sees, offset of the first)."""
        return self._frame.width + query_length, 0

    def get_seq_length(self) -> int:
        """Columns before the new one."""
        return self._frame.width

    def put(self, row: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [heads, tokens, head size] of one row from column `begin` on."""
        self.keys[row, :, begin : begin + keys.shape[1]] = keys
        self.values[row, :, begin : begin + values.shape[1]] = values

    def copy(self, source: int, begin: int, length: int, row: int, to: int) -> None:
        """Copy `length` columns of row `source` from `begin` on to another row or place."""
        for buffer in (self.keys, self.values):
            part = buffer[source, :, begin : begin + length]
            # Source and target may overlap.
            buffer[row, :, to : to + length] = part.clone() if source == row else part

    def wipe(self, row: int) -> None:
        """Zero a row."""
        self.keys[row].zero_()
        self.values[row].zero_()


class NoLayer(BatchLayer):
    """That of a block which keeps no keys and values of its own."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Nothing asks for it."""
        raise AssertionError("a block without keys and values of its own has given some")

    def grow(self, rows: int, columns: int) -> None:
        """There is nothing to grow."""

    def copy(self, source: int, begin: int, length: int, row: int, to: int) -> None:
        """There is nothing to copy."""

    def wipe(self, row: int) -> None:
        """There is nothing to wipe."""


class BatchCache(Cache):
    """A transformers cache of rows that come and go; the order of rows is the caller's."""

    def __init__(self) -> None:
        self.frame = Frame()
        self._rows = self._columns = 0
        self._limit = 0
        """The end column may not pass it; keeps the memory that is touched near what is needed."""
        super().__init__(layers=[])

    def __len__(self) -> int:
        return len(self.frame.lengths)

    def join(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Append the rows of a prefilled, left-padded cache.

        Args:
            cache: keys and values [G, heads, T, head size] per layer.
            lengths: tokens of each of its G rows; the last ones of T.
        """
        self._match_layers(cache)
        before = len(self)
        self._widen(max(lengths))
        self._reserve(before + len(lengths), self._limit)
        end = self.frame.end
        for source, length in enumerate(lengths):
            for layer, filled in zip(self.layers, cache.layers, strict=True):
                if filled.keys is None:
                    continue
                layer.put(
                    before + source,
                    end - length,
                    filled.keys[source, :, -length:],
                    filled.values[source, :, -length:],
                )
        self.frame.lengths.extend(lengths)

    def leave(self, row: int, wipe: bool = False) -> None:
        """Remove a row; the last row takes its place.

        Args:
            wipe: its numbers are not finite and must not stay, not even masked.
        """
        frame = self.frame
        last = len(frame.lengths) - 1
        for layer in self.layers:
            if wipe:
                layer.wipe(row)
            if row != last:
                length = frame.lengths[last]
                begin = frame.end - length
                layer.copy(last, begin, length, row, begin)
        frame.lengths[row] = frame.lengths[last]
        frame.lengths.pop()

    def make_room(self) -> None:
        """Before a step: see to it that there is a column for its tokens."""
        if self.frame.end >= self._limit:
            self._move_to(self.frame.width)
            self._limit = _with_slack(self.frame.width)
            self._reserve(len(self), self._limit)

    def advance(self) -> None:
        """After a step: its column counts. A step that failed is simply not counted."""
        self.frame.end += 1
        self.frame.lengths = [length + 1 for length in self.frame.lengths]

    def step_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """`attention_mask` [B, width + 1] and `position_ids` [B, 1] int64 of the next step."""
        lengths = torch.tensor(self.frame.lengths, device=device)
        width = self.frame.width
        columns = torch.arange(width + 1, device=device)
        mask = columns >= (width - lengths).unsqueeze(1)
        return {"attention_mask": mask.long(), "position_ids": lengths.unsqueeze(1)}

    def _match_layers(self, cache: DynamicCache) -> None:
        if not self.layers:
            for filled in cache.layers:
                if filled.keys is None:
                    self.layers.append(NoLayer(self.frame))
                    continue
                layer = BatchLayer(self.frame)
                layer.lazy_initialization(filled.keys, filled.values)
                self.layers.append(layer)

    def _widen(self, length: int) -> None:
        """Make place for a row of this length, left of the end column."""
        frame = self.frame
        if not frame.lengths:
            frame.end, self._limit = length, _with_slack(length)
        elif frame.end < length:
            self._limit = max(self._limit, _with_slack(length))
            self._reserve(len(self), self._limit)
            self._move_to(length)

    def _move_to(self, end: int) -> None:
        """Move all rows so that they end at this column."""
        frame = self.frame
        for layer in self.layers:
            for row, length in enumerate(frame.lengths):
                layer.copy(row, frame.end - length, length, row, end - length)
        frame.end = end

    def _reserve(self, rows: int, columns: int) -> None:
        if rows <= self._rows and columns <= self._columns:
            return
        if rows > self._rows:
            self._rows = 1 << (rows - 1).bit_length()  # the next power of two
        self._columns = max(self._columns, -(-columns // LEAST_SLACK) * LEAST_SLACK)
        for layer in self.layers:
            layer.grow(self._rows, self._columns)


def _with_slack(width: int) -> int:
    """Columns for rows of this width, and for the steps until they are moved back."""
    return width + min(MOST_SLACK, max(LEAST_SLACK, width // 2))


def check_can_batch(model: Any) -> None:
    """Raise a `UserError` for a model whose memory of past tokens is not just keys and values."""
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    kinds -= set(PLAIN_LAYERS)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        kinds.add("chunked attention")
    if kinds or model.config.is_encoder_decoder:
        what = ", ".join(sorted(kinds)) or "an encoder"
        raise UserError(
            f"Models of type {model.config.model_type!r} can't be served in batches: they remember "
            f"past tokens by more than keys and values ({what}). Use mole generate."
        )
