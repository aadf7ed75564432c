"""What the experts did in one forward pass: router weights, and records that had to be read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import TableError
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
        source = getattr(model, "expert_source", None)
        self.table: TableReader | None = source if isinstance(source, TableReader) else None
        self._embeddings: list[TableReader] = [*getattr(model, "embedding_readers", {}).values()]
        # A GPU finds records itself, and tells nobody of single ones.
        self._reads = (
            self.table is not None
            and self.table.stats().store != "memory"
            and self._device.type == "cpu"
        )

    def were_cached(self, token_ids: Sequence[int]) -> list[bool] | None:
        """For each id of the batch that was just forwarded, whether its record needed no reading.

        None where nothing is read: no table, or the whole table in memory; and on a GPU.
        """
        if self.table is None or not self._reads:
            return None
        missed = self.table.missed
        return [missed is not None and token_id not in missed for token_id in token_ids]

    def read_error(self, token_id: int) -> TableError | None:
        """Why the record of a token can't be read, or None if it can."""
        ids = torch.tensor([[token_id]], device=self._device)
        by_token = [reader for reader in self._embeddings if reader.rows_per_token == 1]
        try:
            for reader in self._experts() + by_token:
                reader.rows(ids).layer(0)
        except TableError as error:
            return error
        return None

    def late_error(self) -> TableError | None:
        """What a GPU met when it looked for records in a step that is over: such steps go on, with
        numbers that are none, and the reader tells of it the next time that it is asked for
        something. None where nothing went wrong."""
        try:
            for reader in self._experts() + self._embeddings:
                reader.rows(torch.empty(1, 0, dtype=torch.int64, device=self._device))
        except TableError as error:
            return error
        return None

    def _experts(self) -> list[Any]:
        """The source of the experts' rows, if it reads any."""
        source = self._entrance.source if self._entrance is not None else None
        return [] if source is None or isinstance(source, FFNExperts) else [source]

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
        self, row: int, num_rows: int, weights: list[Tensor], cached: bool | None, seconds: float
    ) -> LookupDetail:
        """The detail of one row's last position.

        Args:
            row: which of the `num_rows` of the pass.
            weights: of each layer, from `weights`.
            cached: what `were_cached` said of its token.
            seconds: that the pass took.
        """
        of_row = None
        if weights:
            last = torch.stack(
                [layer.view(num_rows, -1, layer.shape[-1])[row, -1] for layer in weights]
            )
            of_row = [[round(weight, 4) for weight in layer] for layer in last.tolist()]
        stride = self.table.table.layout.stride if self.table is not None else 0
        return LookupDetail(of_row, stride if cached is False else 0, cached, seconds * 1e3)
