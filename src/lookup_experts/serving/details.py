"""What the experts did in one forward pass: router weights, and records that had to be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from math import isnan
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import TableError
from lookup_experts.model.by_table import SourceByTable
from lookup_experts.model.computed_rows import FFNExperts
from lookup_experts.serving.sequence import LookupDetail
from lookup_experts.table.reader import TableReader


class LookupWatch:
    """Watches single forward passes; costs nothing while nobody asks.

    Args:
        model: any causal LM of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._entrance = getattr(model, "lookup_entrance", None)
        self._device = model.device
        self._by_table: SourceByTable | None = getattr(model, "source_by_table", None)
        self._embeddings: list[TableReader] = [*getattr(model, "embedding_readers", {}).values()]

    def read_error(self, token_id: int, table: str | None = None) -> TableError | None:
        """Why the record of a token can't be read, or None if it can.

        Args:
            table: where it is, of a model with several.
        """
        by_token = [reader for reader in self._embeddings if reader.rows_per_token == 1]
        try:
            for reader, offset in [*self._experts(table), *((one, 0) for one in by_token)]:
                ids = torch.tensor([[token_id + offset]], device=self._device)
                reader.rows(ids).layer(0)
        except TableError as error:
            return error
        return None

    def late_error(self) -> TableError | None:
        """What a GPU met when it looked for records in a step that is over: such steps go on, with
        numbers that are none, and the reader tells of it the next time that it is asked for
        something. None where nothing went wrong."""
        if self._by_table is not None:
            experts: list[Any] = [group.source for group in self._by_table.groups]
        else:
            experts = [reader for reader, _ in self._experts(None)]
        try:
            for reader in experts + self._embeddings:
                reader.rows(torch.empty(1, 0, dtype=torch.int64, device=self._device))
        except TableError as error:
            return error
        return None

    def _experts(self, table: str | None) -> list[tuple[Any, int]]:
        """The source of the experts' rows, if it reads any, and how far ids are raised there."""
        if self._by_table is not None:
            return [] if table is None else [self._by_table.find(table)]
        source = self._entrance.source if self._entrance is not None else None
        return [] if source is None or isinstance(source, FFNExperts) else [(source, 0)]

    @contextmanager
    def weights(self, asked: bool) -> Iterator[list[Tensor]]:
        """Within it, the router weights [B·T, N] of each layer are appended to what it gives."""
        seen: list[Tensor] = []
        if self._entrance is None or not asked:
            yield seen
            return
        self._entrance.observe = lambda layer, weights: seen.append(weights)
        try:
            yield seen
        finally:
            self._entrance.observe = None

    def describe(
        self,
        row: int,
        num_rows: int,
        weights: list[Tensor],
        token_id: int,
        table: str | None,
        seconds: float,
    ) -> LookupDetail:
        """The detail of one row's last position.

        Args:
            row: which of the `num_rows` of the pass.
            weights: of each layer, from `weights`.
            token_id: that went in.
            table: that its text has, of a model with several.
            seconds: that the pass took.
        """
        of_row = None
        if weights:
            last = [layer.view(num_rows, -1, layer.shape[-1])[row, -1] for layer in weights]
            flat = iter(torch.cat(last).tolist())  # at once, from a GPU
            # Where several tables are, a layer's own weights may be fewer, or none.
            own = [[w for w in islice(flat, len(layer)) if not isnan(w)] for layer in last]
            of_row = [[round(w, 4) for w in layer] for layer in own if layer] or None
        cached, num_bytes = self._was_cached(token_id, table)
        return LookupDetail(of_row, num_bytes, cached, seconds * 1e3)

    def _was_cached(self, token_id: int, table: str | None) -> tuple[bool | None, int]:
        """Whether the record of a token in the batch that was just forwarded needed no reading, and
        the bytes that it needed.

        None where nothing is read: no table, or the whole table in memory; and on a GPU, which
        finds records itself and tells nobody of single ones.
        """
        for reader, offset in self._experts(table):
            if (
                isinstance(reader, TableReader)
                and self._device.type == "cpu"
                and reader.stats().store != "memory"
            ):
                missed = reader.missed is None or token_id + offset in reader.missed
                return not missed, reader.table.layout.stride if missed else 0
        return None, 0
