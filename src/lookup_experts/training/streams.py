"""Streamed text: tokenised and cut into contexts while training, without preparing it first.

The rows of a Hugging Face data set, or of local .jsonl and .parquet files, come in their own
order, each between what the tokenizer puts before a text and the end-of-document token, and are
cut into contexts one after the other; at their end they begin again. Every process reads and
tokenises all rows, and leaves out the sequences of the others, so the order doesn't depend on how
many there are. A checkpoint notes where the rows were, which `datasets` finds again without
reading all that came before.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.training.documents import first_line, missing_package, text_of_row
from lookup_experts.training.inputs import HubDataset, Input, TextFile, suffix_of
from lookup_experts.training.tokenizer import begun_with, token_without_row

BATCH_ROWS = 64
"""Rows that are tokenised at once."""
# The builder of `datasets` for each kind of file with a document per row.
_BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}

State = dict[str, Any]
"""Plain JSON values."""


class PlacedText(NamedTuple):
    """A document, and where it stands."""

    text: str
    place: str


class RowStream:
    """The texts of a data set, pass after pass.

    Args:
        inputs: one hub data set, or files of one kind.
        text_field: the field with the text.

    Raises:
        UserError: the inputs can't be streamed, or (while reading) not be read.
    """

    def __init__(self, inputs: Sequence[Input], text_field: str) -> None:
        self.name = inputs[0].name if len(inputs) == 1 else f"{inputs[0].name} ..."
        self._load = _loading_arguments(inputs)
        self._text_field = text_field
        self._pass = 0
        self._dataset = self._open()
        self._rows: Iterator[dict[str, Any]] = iter(self._dataset)
        self._row_number = 0
        self._has_text = False

    def texts(self, count: int) -> list[PlacedText]:
        """Up to `count` next texts, those without any left out; fewer where a pass ends."""
        found: list[PlacedText] = []
        try:
            for _ in range(count):
                row = next(self._rows, None)
                if row is None:
                    self._begin_next_pass()
                    break
                self._row_number += 1
                place = f"data set {self.name}, row {self._row_number}"
                text = text_of_row(row, self._text_field, place)
                if text.strip():
                    found.append(PlacedText(text, place))
                    self._has_text = True
        except UserError:
            raise
        # A lost connection, a damaged file: each kind has its own classes.
        except Exception as error:
            raise UserError(
                f"The data set {self.name} can't be read further: {first_line(error)} "
                "Run the same command again to go on at the last checkpoint."
            ) from error
        return found

    def state(self) -> State:
        """Where the next text is."""
        return {
            "pass": self._pass,
            "row": self._row_number,
            "dataset": self._dataset.state_dict() if self._row_number else None,
        }

    def restore(self, state: State) -> None:
        self._dataset = self._open()
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        self._rows = iter(self._dataset)
        self._pass, self._row_number = state["pass"], state["row"]
        self._has_text = self._pass > 0 or self._row_number > 0

    def _begin_next_pass(self) -> None:
        if not self._has_text:
            raise UserError(f"The data set {self.name} has no text in it.")
        self.restore({"pass": self._pass + 1, "row": 0, "dataset": None})

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise missing_package("datasets", self.name) from None
        try:
            return datasets.load_dataset(**self._load, split="train", streaming=True)
        # A wrong config, a missing split, no connection.
        except Exception as error:
            raise UserError(
                f"The data set {self.name} can't be streamed: {first_line(error)} Expected `name` "
                "or `name:config` of a data set with a train split, or .jsonl or .parquet files."
            ) from error


def _loading_arguments(inputs: Sequence[Input]) -> dict[str, Any]:
    """What `datasets.load_dataset` is asked for."""
    hub = [source for source in inputs if isinstance(source, HubDataset)]
    if hub:
        return {"path": hub[0].path, "name": hub[0].config, "revision": hub[0].revision}
    files = [source.path for source in inputs if isinstance(source, TextFile)]
    builders = {_BUILDERS.get(suffix_of(path) or "") for path in files}
    if len(builders) != 1 or None in builders:
        raise UserError(
            f"{inputs[0].name} can't be streamed: expected files of one kind, .jsonl, "
            ".jsonl.gz or .parquet, with a document per row. Prepare other text: `mole prepare`."
        )
    return {"path": builders.pop(), "data_files": [str(path) for path in files]}


class StreamedSequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The contexts of streamed text, asked for by numbers that don't fall.

    Args:
        rows: the text.
        tokenizer: a fast tokenizer.
        context_length: tokens of a sequence.
        lag: how far, in sequences, training may be behind what has been asked for.
        bos: the token ids before every document.
        num_ids: ids that the model has rows for; None: all of the tokenizer's.
    """

    def __init__(
        self,
        rows: RowStream,
        tokenizer: Any,
        context_length: int,
        lag: int,
        *,
        bos: Sequence[int],
        num_ids: int | None = None,
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer.backend_tokenizer
        self._bos = bos
        self._eos = [tokenizer.eos_token_id]
        self._num_ids = num_ids
        self._context_length = context_length
        self._lag = lag
        self._tokens = np.empty(0, dtype=np.int64)
        self._next = 0  # the number of the sequence that the tokens begin with
        self._snapshots: deque[State] = deque([self._snapshot()])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert index >= self._next, f"sequence {index} has gone by; the next is {self._next}"
        while True:
            available = len(self._tokens) // self._context_length
            if index < self._next + available:
                break
            self._drop(available)
            self._read()
        self._drop(index - self._next)
        tokens = torch.from_numpy(self._tokens[: self._context_length].copy())
        self._drop(1)
        return {"input_ids": tokens, "labels": tokens}

    def position(self, index: int) -> State:
        """From where `restore` comes to the sequence `index` again, which is at most `lag` ago."""
        return max((s for s in self._snapshots if s["sequence"] <= index), key=_sequence)

    def restore(self, position: State) -> None:
        self._rows.restore(position["rows"])
        self._tokens = np.array(position["tokens"], dtype=np.int64)
        self._next = position["sequence"]
        self._snapshots = deque([position])

    def _drop(self, count: int) -> None:
        self._tokens = self._tokens[count * self._context_length :]
        self._next += count

    def _read(self) -> None:
        """More tokens; what is left of the ones before is less than a context."""
        self._snapshots.append(self._snapshot())
        while len(self._snapshots) > 1 and self._snapshots[1]["sequence"] <= self._next - self._lag:
            self._snapshots.popleft()
        texts = self._rows.texts(BATCH_ROWS)
        encoded = self._tokenizer.encode_batch_fast(
            [text.text for text in texts], add_special_tokens=False
        )
        parts = [
            np.array(begun_with(self._bos, one.ids) + self._eos, dtype=np.int64) for one in encoded
        ]
        if self._num_ids is not None:
            for text, tokens in zip(texts, parts, strict=True):
                self._refuse_ids_without_rows(text, tokens, self._num_ids)
        self._tokens = np.concatenate([self._tokens, *parts])

    def _refuse_ids_without_rows(self, text: PlacedText, tokens: np.ndarray, num_ids: int) -> None:
        beyond = tokens[tokens >= num_ids]
        if len(beyond):
            token = self._tokenizer.id_to_token(int(beyond[0]))
            raise token_without_row(text.place, token, int(beyond[0]), num_ids)

    def _snapshot(self) -> State:
        return {
            "sequence": self._next,
            "tokens": self._tokens.tolist(),
            "rows": self._rows.state(),
        }


def _sequence(snapshot: State) -> int:
    return int(snapshot["sequence"])
