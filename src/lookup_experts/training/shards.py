"""Pieces to shards: every token goes to the training or to the held-out text."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from lookup_experts.training.files import atomic_write
from lookup_experts.training.manifest import SPLITS, Shard, shard_name
from lookup_experts.training.pieces import SectionIndex, read_index, read_tokens
from lookup_experts.training.split import HeldOut

SHARD_TOKENS = 2**27
"""Tokens of a full shard: 256 MiB at two bytes each."""


def document_index(sections: SectionIndex) -> tuple[np.ndarray, np.ndarray]:
    """Of each document its key, uint64 [documents], and its number of tokens, int64."""
    starts = np.flatnonzero(np.concatenate([[True], sections.ends_document[:-1]]))
    return sections.keys[starts], np.add.reduceat(sections.num_tokens, starts)


def write_shards(
    folder: Path,
    pieces: Sequence[Path],
    held_out: HeldOut,
    on_progress: Callable[[int], None],
) -> dict[str, list[Shard]]:
    """Write the shards of both splits, in the order of the pieces.

    Args:
        folder: where the shards go.
        pieces: the files of all pieces.
        held_out: what goes to the validation split.
        on_progress: called with the number of tokens written.
    """
    first_document = first_token = 0
    with ExitStack() as stack:
        train, validation = (stack.enter_context(_SplitWriter(folder, name)) for name in SPLITS)
        for path in pieces:
            tokens, sections = read_tokens(path), read_index(path)
            held = _held_out_tokens(sections, held_out, first_document, first_token)
            ends = _document_ends(sections)
            train.append(tokens[~held], ends[~held])
            validation.append(tokens[held], ends[held])
            first_document += int(sections.ends_document.sum())
            first_token += len(tokens)
            on_progress(first_token)
    return {"train": train.shards, "validation": validation.shards}


def _held_out_tokens(
    sections: SectionIndex, held_out: HeldOut, first_document: int, first_token: int
) -> np.ndarray:
    """bool [tokens] of a piece that starts within or at the given document, at the given token."""
    if held_out.tail_start is not None:
        return first_token + np.arange(sections.num_tokens.sum()) >= held_out.tail_start
    ends = sections.ends_document
    documents = first_document + np.cumsum(ends) - ends
    return np.repeat(held_out.documents[documents], sections.num_tokens)


def _document_ends(sections: SectionIndex) -> np.ndarray:
    """bool [tokens]: is it the last token of a document?"""
    last = np.zeros(sections.num_tokens.sum(), dtype=bool)
    closing = sections.ends_document & (sections.num_tokens > 0)
    last[np.cumsum(sections.num_tokens)[closing] - 1] = True
    return last


class _SplitWriter:
    """Writes the tokens of one split into shards of `SHARD_TOKENS`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._open = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._close_shard()
        self._open.__exit__(*error)

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        while len(tokens):
            if self._file is None:
                self._open_shard()
            count = min(SHARD_TOKENS - self._num_tokens, len(tokens))
            self._write(tokens[:count], ends[:count])
            tokens, ends = tokens[count:], ends[count:]
            if self._num_tokens == SHARD_TOKENS:
                self._close_shard()

    def _open_shard(self) -> None:
        name = shard_name(self._split, len(self.shards))
        self._file = self._open.enter_context(atomic_write(self._folder / name))
        self._sha256 = hashlib.sha256()
        self._num_tokens = self._num_documents = self._largest = 0

    def _write(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        assert self._file is not None
        data = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self._num_tokens += len(tokens)
        self._num_documents += int(ends.sum())
        self._largest = max(self._largest, int(tokens.max()))

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._open.close()
        self._file = None
        name = shard_name(self._split, len(self.shards))
        digest = self._sha256.hexdigest()
        self.shards.append(
            Shard(name, self._num_tokens, self._num_documents, digest, self._largest)
        )
