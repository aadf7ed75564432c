"""Text to measure on: Python's standard library, which is on every machine, or the user's own; and
its token ids: which come, and how often, decides what is read, what is cached and what repeats."""

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lookup_experts.errors import UserError
from lookup_experts.training.documents import read_documents
from lookup_experts.training.files import atomic_write
from lookup_experts.training.inputs import Input, TextFile, find_inputs
from lookup_experts.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".py", ".txt")
LEFT_OUT = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_bundled",
        "encodings",  # tables of characters, not text
    }
)
END_OF_DOCUMENT = "<|endoftext|>"
MAX_CORPUS_BYTES = 8_000_000
MIN_CORPUS_BYTES = 1_000_000
TOKENIZER_ENTRIES = 16_384
"""Of the standard library as a stream of ids."""


@dataclass(frozen=True)
class Text:
    """Where the text comes from."""

    name: str
    """In words."""
    files: tuple[TextFile, ...]

    def identity(self) -> list[dict[str, Any]]:
        """What tells whether any of it was changed since."""
        return [file.identity() for file in self.files]


def standard_library() -> Text:
    """The `.py` and `.txt` files of the Python that runs this, in sorted order, without tests.

    Raises:
        UserError: this Python comes without the source of its library.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(_text_files(folder))
    if not files:
        raise UserError(
            f"This Python has no source of its standard library in {folder}. "
            "Name text of your own: mole demo --data FILE."
        )
    return Text(f"the standard library of Python {platform.python_version()}", files)


def _text_files(folder: Path) -> Iterator[TextFile]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for path in (Path(parent, name) for name in sorted(names) if name.endswith(SUFFIXES)):
            if _is_utf8(path):
                status = path.stat()
                yield TextFile(path, status.st_size, status.st_mtime_ns)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def own_text(paths: Sequence[Path], out: Path) -> Text:
    """The user's own files, and those of folders; every kind that `mole prepare` reads.

    Args:
        paths: what the user named.
        out: the demo's folder, which must not lie in a folder that is read.

    Raises:
        UserError: one of them isn't there, or is of an unknown kind.
    """
    for path in paths:
        if not path.expanduser().exists():
            raise UserError(f"--data {path} not found: there is no such file or folder.")
    inputs: list[Input] = find_inputs([str(path) for path in paths], out)
    files = tuple(source for source in inputs if isinstance(source, TextFile))
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return Text(f"{paths[0]}{more}", files)


def write_corpus(text: Text, target: Path, max_bytes: int, min_bytes: int) -> dict[str, Any]:
    """Put the text's documents into one `.jsonl` file, until there is enough.

    Returns:
        `source`, `num_bytes` and `num_documents`.

    Raises:
        UserError: the text is too short, or a file of it can't be read.
    """
    num_bytes = num_documents = 0
    with atomic_write(target) as file:
        for document in _documents(text, max_bytes):
            file.write(json.dumps({"text": document}).encode() + b"\n")
            num_bytes += len(document.encode())
            num_documents += 1
        if num_bytes < min_bytes:
            raise UserError(
                f"The text is too short: {text.name} has {format_bytes(num_bytes)}, the demo "
                f"needs at least {format_bytes(min_bytes)}. Name more files with --data."
            )
    return {"source": text.name, "num_bytes": num_bytes, "num_documents": num_documents}


def _documents(text: Text, max_bytes: int) -> Iterator[str]:
    """Documents that aren't empty; the last one ends where `max_bytes` is reached."""
    left = max_bytes
    parts: list[str] = []
    for source in text.files:
        for chunk in read_documents(source, "text"):
            parts.append(chunk.text.encode()[:left].decode(errors="ignore"))
            left -= len(chunk.text.encode())
            if (chunk.ends_document or left <= 0) and any(parts):
                yield "".join(parts)
                parts = []
            if left <= 0:
                return


def read_corpus(path: Path) -> Iterator[str]:
    """The documents of a file that `write_corpus` wrote."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


def train_tokenizer(corpus: Path, vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE tokenizer, save it to `folder`, and give its number of entries.

    Args:
        corpus: the file of `write_corpus`.
        vocab_size: the entries wanted; a short text gives fewer.
        folder: written whole or not at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lookup_experts.training.tokenizer import save_tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_corpus(corpus), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT)
    save_tokenizer(fast, folder)
    return len(fast)


# -------------------------------------------------------------------------------- token ids


def id_stream(ids: Path | None, vocab_size: int, work: Path) -> np.ndarray:
    """Token ids int64 of the user's text, or where none is named of the standard library.

    Args:
        ids: a `.npy` file or a folder of `mole prepare`.
        vocab_size: ids must be below.
        work: where those of the standard library are kept for the next time.

    Raises:
        UserError: no such file, another kind of file, or ids that the model doesn't have.
    """
    return _load_ids(ids, vocab_size) if ids else _standard_library_ids(work)


def _load_ids(path: Path, vocab_size: int) -> np.ndarray:
    if path.is_dir():
        from lookup_experts.training.data import TokenShards

        shards = TokenShards(path, "train")
        ids = shards.window(0, shards.num_tokens).astype(np.int64)
    elif path.suffix == ".npy" and path.is_file():
        ids = np.load(path).astype(np.int64)
    else:
        raise UserError(f"{path}: expected a .npy file of token ids, or a folder of mole prepare.")
    if ids.ndim != 1 or not len(ids):
        raise UserError(f"{path}: expected one row of token ids, found the shape {ids.shape}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{path}: ids must be below {vocab_size}, the largest is {ids.max()}.")
    return ids


def _standard_library_ids(work: Path) -> np.ndarray:
    path = work / "standard-library-ids.npy"
    if not path.exists():
        from transformers import PreTrainedTokenizerFast

        work.mkdir(parents=True, exist_ok=True)
        corpus, folder = path.with_suffix(".jsonl"), path.with_suffix("")
        write_corpus(standard_library(), corpus, MAX_CORPUS_BYTES, MIN_CORPUS_BYTES)
        train_tokenizer(corpus, TOKENIZER_ENTRIES, folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        found = [tokenizer(document)["input_ids"] for document in read_corpus(corpus)]
        with atomic_write(path) as file:
            np.save(file, np.concatenate(found).astype(np.int32))
        corpus.unlink()
    return np.load(path).astype(np.int64)


class TextWindows:
    """Windows of a stream of token ids int64 [n], at random places, on the device of the models."""

    def __init__(self, ids: np.ndarray, seed: int = 0, device: str = "cpu") -> None:
        self._ids, self._device = ids, device
        self._random = np.random.default_rng(seed)

    def take(self, rows: int, length: int) -> "Tensor":
        """[rows, length] int64."""
        import torch

        if len(self._ids) <= length:
            raise UserError(f"{len(self._ids)} token ids are too few; more than {length} needed.")
        starts = self._random.integers(0, len(self._ids) - length, rows)
        windows = np.stack([self._ids[start : start + length] for start in starts])
        return torch.from_numpy(windows).to(self._device)
