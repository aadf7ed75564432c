"""Tokenizers: found by name, given an end-of-document token, hashed, kept beside the shards."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookup_experts.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(name: str, eos_token: str | None = None) -> "PreTrainedTokenizerFast":
    """A Hugging Face tokenizer with an end-of-document token, without truncation or padding.

    Args:
        name: a folder, a `tokenizer.json` file, or the name of a tokenizer on the hub.
        eos_token: the end-of-document token; by default the tokenizer's own.
    """
    tokenizer = _load(name)
    # Some are saved with settings for short inputs; documents are neither cut nor filled up.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"--eos-token {eos_token!r} is not in the vocabulary of {name}. "
                "Name a token that is."
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer {name} names no end-of-document token (eos). "
            "Name one of its tokens with --eos-token, e.g. --eos-token '<|endoftext|>'."
        )
    return tokenizer


def _load(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name).expanduser()
    if not path.exists() and (name.endswith(".json") or name.startswith(("/", ".", "~"))):
        raise UserError(f"Tokenizer {name} not found: there is no such file or folder.")
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            found = str(path) if path.is_dir() else name
            tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=False)
    # tokenizers raises plain Exception for a file that it can't parse.
    except Exception as error:
        raise UserError(
            f"Tokenizer {name} can't be loaded; expected a Hugging Face tokenizer folder, "
            f"a {TOKENIZER_FILE}, or a name on the hub. Reason: {_first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"Tokenizer {name} has no fast form ({TOKENIZER_FILE}); use a tokenizer that has one."
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """1 + the largest token id: what an embedding must have rows for."""
    return max(tokenizer.get_vocab().values()) + 1


def bos_token_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: its BOS token, or several tokens, or nothing.

    Args:
        tokenizer: of transformers, fast or not.
    """
    # Any text that is a token tells; a special one might be taken for what is put before.
    special = set(tokenizer.all_special_tokens)
    for text in (token for token in tokenizer.get_vocab() if token not in special):
        alone = tokenizer(text, add_special_tokens=False)["input_ids"]
        if alone:
            whole = tokenizer(text)["input_ids"]
            starts = range(len(whole) - len(alone) + 1)
            return whole[: next(i for i in starts if whole[i : i + len(alone)] == alone)]
    return []


def begun_with(bos: Sequence[int], ids: list[int]) -> list[int]:
    """The ids of a document with what comes before it, which its text may have written out."""
    return ids if ids[: len(bos)] == list(bos) else [*bos, *ids]


def token_without_row(document: str, token: str, token_id: int, num_ids: int) -> UserError:
    """An error for a text that has a token beyond the rows of the model's embedding."""
    return UserError(
        f"{document[:1].upper()}{document[1:]}, has the token {token!r} (id {token_id:,}), and the "
        f"model's embedding has rows for the ids below {num_ids:,} only. Take the token out of the "
        "text, or give the embedding more rows."
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save the tokenizer's files to `folder`, whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256, in hexadecimal, of the `tokenizer.json` that `save_tokenizer` writes."""
    return _sha256(tokenizer.backend_tokenizer.to_str(pretty=True).encode())


def saved_tokenizer_hash(folder: Path) -> str | None:
    """The `tokenizer_hash` of what `save_tokenizer` wrote to `folder`; None without the file."""
    path = folder / TOKENIZER_FILE
    return _sha256(path.read_bytes()) if path.is_file() else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
