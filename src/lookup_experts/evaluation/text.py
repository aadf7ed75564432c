"""From a text file to the token ids that are evaluated."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.training.documents import read_documents
from lookup_experts.training.inputs import TextFile, find_inputs
from lookup_experts.training.tokenizer import begun_with, bos_token_ids, token_without_row

MAX_TOKENS = 2**15
"""What a file is read up to: enough for two digits of a perplexity in minutes on a CPU."""


def read_token_ids(
    file: str | Path,
    tokenizer: Any,
    max_tokens: int = MAX_TOKENS,
    num_ids: int | None = None,
) -> Tensor:
    """The first `max_tokens` token ids of a text, int64 [n].

    Documents come one after the other as in training: each that isn't empty between what the
    tokenizer puts before a text, if anything, and its end-of-document token, if it has one.

    Args:
        file: of a kind that `mole prepare` takes: a plain text, or rows with a field `text`.
        tokenizer: of transformers.
        max_tokens: reading stops there.
        num_ids: ids that the model has rows for; None: any.

    Raises:
        UserError: no such file, or it can't be read, has not two tokens in it, or one without a
            row.
    """
    chunks = (ids for ids, _ in token_chunks(find_text(file), tokenizer, num_ids))
    ids = list(itertools.islice(itertools.chain.from_iterable(chunks), max_tokens))
    if len(ids) < 2:
        raise UserError(f"{file} has {len(ids)} tokens; at least 2 are needed to predict any.")
    return torch.tensor(ids)


def find_text(file: str | Path) -> TextFile:
    """The text in a file, not yet read.

    Raises:
        UserError: no such file, or it is of no kind that can be read.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{file} is no file; give a text (.txt, .jsonl, .txt.gz).")
    (source,) = find_inputs([str(path)])
    assert isinstance(source, TextFile), "a file is no dataset of the hub"
    return source


def token_chunks(
    source: TextFile, tokenizer: Any, num_ids: int | None = None
) -> Iterator[tuple[list[int], int]]:
    """The token ids of a text, some at a time, and how many bytes of the file are read by then.

    See `read_token_ids`.
    """
    bos = bos_token_ids(tokenizer)
    is_empty, number = True, 1
    for chunk in read_documents(source, text_field="text"):
        # A chunk is a million characters, so the words that are cut between two are very few.
        ids = tokenizer(chunk.text, add_special_tokens=False, verbose=False)["input_ids"]
        if is_empty:
            ids = begun_with(bos, ids) if chunk.text.strip() else []
        is_empty = is_empty and not ids
        if num_ids is not None and ids and max(ids) >= num_ids:
            beyond = next(token_id for token_id in ids if token_id >= num_ids)
            place = f"document {number:,} of {source.name}"
            raise token_without_row(place, tokenizer.convert_ids_to_tokens(beyond), beyond, num_ids)
        if chunk.ends_document:
            if tokenizer.eos_token_id is not None and not is_empty:
                ids.append(tokenizer.eos_token_id)
            is_empty = True
            number += 1
        yield ids, chunk.position
