"""Token shards to training examples. What the files are is specified in `manifest.py`."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.training.manifest import SPLITS, Manifest

_TOKENS_AT_ONCE = 2**24
"""Looked through at once."""


class TokenShards:
    """One split of a prepared folder, as one run of tokens; memory-mapped, so opening is quick.

    Args:
        folder: what `mole prepare` wrote.
        split: "train" or "validation".

    Raises:
        UserError: the folder, the split or one of its files is missing or has the wrong size.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        self.folder = Path(folder)
        self.split = split
        self.manifest = Manifest.load(self.folder)
        shards = self.manifest.splits[split]
        if not shards:
            raise UserError(
                f"{self.folder} has no {split} text. Prepare the text with --validation above 0."
            )
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards = [
            np.memmap(self.folder / shard.file, dtype=dtype, mode="r") for shard in shards
        ]
        self._ends = np.cumsum([len(tokens) for tokens in self._shards])

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the folder's tokenizer/tokenizer.json."""
        return self.manifest.tokenizer["hash"]

    @property
    def vocab_size(self) -> int:
        """1 + the largest token id that can occur."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The token after every document."""
        return self.manifest.eos_token_id

    def window(self, start: int, length: int) -> np.ndarray:
        """A copy of `length` >= 1 tokens from `start` on: uint16 or uint32 [length]."""
        stop = start + length
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        number = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while True:
            shard_start = int(self._ends[number]) - len(self._shards[number])
            parts.append(self._shards[number][start - shard_start : stop - shard_start])
            start = int(self._ends[number])
            number += 1
            if start >= stop:
                return np.concatenate(parts)

    def first_from(self, token_id: int) -> int | None:
        """The position of the first token whose id is `token_id` or more; None if none is."""
        starts = self._ends - [len(tokens) for tokens in self._shards]
        for shard, tokens, start in zip(
            self.manifest.splits[self.split], self._shards, starts, strict=True
        ):
            if shard.largest_token_id is not None and shard.largest_token_id < token_id:
                continue
            for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
                found = tokens[begin : begin + _TOKENS_AT_ONCE] >= token_id
                if found.any():
                    return int(start) + begin + int(found.argmax())
        return None

    def document_before(self, position: int) -> tuple[int, np.ndarray]:
        """The document that a token is in: its number, from 1, and its tokens before that one."""
        number, start = 1, 0
        for begin in range(0, position, _TOKENS_AT_ONCE):
            tokens = self.window(begin, min(_TOKENS_AT_ONCE, position - begin))
            ends = np.flatnonzero(tokens == self.eos_token_id)
            if len(ends):
                number += len(ends)
                start = begin + int(ends[-1]) + 1
        before = self.window(start, position - start) if position > start else np.array([], int)
        return number, before

    def verify(self) -> None:
        """Read everything and compare with the checksums; a `UserError` names a damaged file."""
        for shard in self.manifest.splits[self.split]:
            with (self.folder / shard.file).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise UserError(
                    f"{self.folder / shard.file} is damaged: its checksum differs from the "
                    f"manifest's. Copy it again, or prepare the text again."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader processes open the files themselves; pickling the maps would copy all tokens.
        return type(self), (self.folder, self.split)


class TokenDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Consecutive windows of a split that don't overlap; the rest after the last is left out.

    Item `i` is {"input_ids": int64 [context_length], "labels": the same}: Hugging Face models
    shift the labels themselves.

    Args:
        shards: the tokens.
        context_length: tokens of a window.
    """

    def __init__(self, shards: TokenShards, context_length: int) -> None:
        if context_length < 1:
            raise UserError(f"The context length must be at least 1 token, not {context_length}.")
        if shards.num_tokens < context_length:
            raise UserError(
                f"The {shards.split} text of {shards.folder} has {shards.num_tokens:,} tokens, but "
                f"a context of {context_length:,} needs at least as many. "
                f"Prepare more text, or use a shorter context."
            )
        self.shards = shards
        self.context_length = context_length

    def __len__(self) -> int:
        return self.shards.num_tokens // self.context_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.shards.window(index * self.context_length, self.context_length)
        tokens = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}
