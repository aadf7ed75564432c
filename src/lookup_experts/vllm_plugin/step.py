"""The rows of the step under way, of one model in one process of vLLM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.model.rows import ExpertSource, TokenRows, leave


class Step:
    """A step of a model: the tokens of all requests that it goes on with, chunks of prompts too.

    Attributes:
        source: where rows come from; None until the model has its weights.
        num_blocks: how many blocks have experts, here. In each step all of them must ask for rows.
    """

    def __init__(self) -> None:
        self.source: ExpertSource | None = None
        self.num_blocks = 0
        self._rows: TokenRows | None = None
        self._asked = 0

    @contextmanager
    def of(self, token_ids: Tensor | None, model: Any) -> Iterator[None]:
        """Within it blocks find the rows of token_ids [T] int; reading has begun.

        Raises:
            UserError: there are no ids, or the model's weights were never loaded.
            TableError: an id is outside of the table, or reading can't begin.
            RuntimeError: blocks went on without their experts.
        """
        if token_ids is None:
            raise UserError(
                "A model with lookup experts needs token ids: its experts are looked up by them. "
                "vLLM gave it embeddings alone."
            )
        if self.source is None:
            raise UserError(
                "This model with lookup experts never got their weights: vLLM has to load them "
                "from its folder (--load-format auto)."
            )
        self._rows = self.source.rows(token_ids.long().unsqueeze(0), base_model=model)
        self._asked = 0
        try:
            yield
            if self._asked != self.num_blocks:
                raise RuntimeError(
                    f"Of {self.num_blocks} blocks with lookup experts {self._asked} asked for "
                    "their rows in a step: this vLLM calls FFNs in another way."
                )
        finally:
            rows, self._rows = self._rows, None
            leave(rows)

    def rows_for(self, num_tokens: int) -> TokenRows:
        """The rows of the step under way, asked for by a block that was given `num_tokens`."""
        rows = self._rows
        self._asked += 1
        if rows is None or rows.num_positions != num_tokens:
            under_way = "no step" if rows is None else f"a step of {rows.num_positions} tokens"
            raise RuntimeError(f"A block was given {num_tokens} tokens in {under_way}.")
        return rows
