"""Pieces: tokenised text on its way to the shards, one file each, finished in any order.

A piece is a safetensors file: `tokens` [tokens], and of each of its sections `num_tokens` int64,
`ends_document` uint8, and `keys` uint64, a hash of the text. A run that was killed finds the pieces
that it had finished, and knows by the keys that they are of the same text. A document's first
section has the BOS tokens before it, if any, its last the end-of-document token after it; an empty
document has no tokens at all.

Worker processes import this module, so it imports neither torch nor transformers.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from lookup_experts.errors import UserError
from lookup_experts.training.files import atomic_write
from lookup_experts.training.sections import Section
from lookup_experts.training.tokenizer import begun_with

_KEY_BYTES = 8


@dataclass(frozen=True)
class TokenizerSpec:
    """What a worker must know of the tokenizer."""

    file: Path
    hash: str
    bos_token_ids: tuple[int, ...]
    eos_token_id: int
    dtype: str


@dataclass(frozen=True)
class SectionIndex:
    """What is known of the sections of one piece or of many, in order."""

    num_tokens: np.ndarray
    """int64 [sections]."""
    ends_document: np.ndarray
    """bool [sections]."""
    keys: np.ndarray
    """uint64 [sections]."""


def piece_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def tokenise_pieces(
    pieces: Iterable[list[Section]],
    folder: Path,
    spec: TokenizerSpec,
    num_workers: int,
    on_progress: Callable[[int], None],
) -> int:
    """Write every piece to its file, unless it is there already. Gives back how many there are.

    Args:
        pieces: the sections of each piece; read as far ahead as the workers need.
        folder: where the files go.
        spec: the tokenizer.
        num_workers: processes; with one, a thread of this process does the work.
        on_progress: called with the position of what has been done.
    """
    num_pieces = 0
    pending: deque[tuple[Future[None], int]] = deque()

    def finish_first() -> None:
        future, position = pending.popleft()
        future.result()
        on_progress(position)

    executor = _start_workers(num_workers)
    try:
        for sections in pieces:
            path = piece_path(folder, num_pieces)
            num_pieces += 1
            if path.exists():
                _check_same_text(path, sections)
                on_progress(sections[-1].position)
                continue
            future = executor.submit(write_piece, path, sections, spec)
            pending.append((future, sections[-1].position))
            if len(pending) >= 2 * num_workers:
                finish_first()
        while pending:
            finish_first()
    except BrokenProcessPool as error:
        raise UserError(
            "A tokenising process was killed, most likely because memory ran out. What is finished "
            f"is kept: run the same command again with --workers {max(1, num_workers // 2)}."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    return num_pieces


def write_piece(path: Path, sections: list[Section], spec: TokenizerSpec) -> None:
    """Tokenise the sections and write them to one file."""
    tokens = [_tokenise(section, spec) for section in sections]
    arrays = {
        "tokens": np.concatenate(tokens),
        "num_tokens": np.array([len(part) for part in tokens], dtype=np.int64),
        "ends_document": np.array([s.ends_document for s in sections], dtype=np.uint8),
        "keys": _keys(sections),
    }
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays))


def read_tokens(path: Path) -> np.ndarray:
    """The token ids of a piece, uint16 or uint32 [tokens]."""
    return _read_arrays(path, ["tokens"])[0]


def read_index(path: Path) -> SectionIndex:
    """The sections of a piece."""
    num_tokens, ends, keys = _read_arrays(path, ["num_tokens", "ends_document", "keys"])
    return SectionIndex(num_tokens, ends.astype(bool), keys)


def _read_arrays(path: Path, names: list[str]) -> list[np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Delete this file and run the same command again."
        ) from error


def _check_same_text(path: Path, sections: list[Section]) -> None:
    if not np.array_equal(read_index(path).keys, _keys(sections)):
        folder = path.parent.parent
        raise UserError(
            f"The text has changed since {folder} was begun: {path.name} was made of another. "
            f"Delete {folder} and start again, or choose another --out."
        )


def _keys(sections: list[Section]) -> np.ndarray:
    """uint64 [sections]: a hash of the text of each."""
    digests = (
        hashlib.blake2b(section.text.encode(), digest_size=_KEY_BYTES).digest()
        for section in sections
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _tokenise(section: Section, spec: TokenizerSpec) -> np.ndarray:
    if section.is_empty_document:
        return np.empty(0, dtype=spec.dtype)
    tokenizer = _load_tokenizer(spec.file, spec.hash)
    # The fast form leaves out the offsets. Sections go one by one, for memory's sake.
    ids = tokenizer.encode_batch_fast([section.text], add_special_tokens=False)[0].ids
    if section.starts_document:
        ids = begun_with(spec.bos_token_ids, ids)
    if section.ends_document:
        ids.append(spec.eos_token_id)
    return np.array(ids, dtype=spec.dtype)


@lru_cache(maxsize=1)
def _load_tokenizer(file: Path, _hash: str) -> Any:
    """The tokenizer, once per process; the hash tells apart two that are saved in one place."""
    return Tokenizer.from_file(str(file))


def _start_workers(num_workers: int) -> Executor:
    if num_workers == 1:
        return ThreadPoolExecutor(max_workers=1)
    # Not by fork: torch and tokenizers may have started threads, which a fork doesn't survive.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker never outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process per core is what was asked for: no threads inside.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
