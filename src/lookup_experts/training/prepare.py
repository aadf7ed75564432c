"""Text to token shards: what `mole prepare` does, from the inputs to the manifest.

    inputs -> documents -> sections -> pieces (tokenised, in parallel) -> shards of two splits

Tokenising is the long part and goes piece by piece; what a killed run has finished is taken up by
the next one. Which documents are held out is known only when all have been seen, so the shards are
written from the pieces at the end, and the pieces are deleted. What is written is specified in
`manifest.py`.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lookup_experts.errors import DiskFullError, UserError
from lookup_experts.training.documents import Chunk, read_documents
from lookup_experts.training.files import atomic_write, locked
from lookup_experts.training.inputs import Found, Input, TextFile, survey, taken_as
from lookup_experts.training.job import PIECES_NAME, Job, begin
from lookup_experts.training.manifest import MANIFEST_NAME, SPLITS, Manifest
from lookup_experts.training.pieces import (
    SectionIndex,
    TokenizerSpec,
    piece_path,
    read_index,
    tokenise_pieces,
)
from lookup_experts.training.sections import cut_into_sections, group_into_pieces
from lookup_experts.training.shards import document_index, write_shards
from lookup_experts.training.split import hold_out
from lookup_experts.training.tokenizer import (
    TOKENIZER_FILE,
    bos_token_ids,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from lookup_experts.units import format_bytes

TOKENIZER_NAME = "tokenizer"
_NUM_PIECES_NAME = "num_pieces"

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opened with what is being done; what it gives is called with (done, total), total 0 if unknown.
`console.progress_bar` is one."""

_SHOWN_NAMES = 4
"""Of a kind of inputs; `--json` has all."""

# For the estimate of the space that is needed.
_TEXT_BYTES_PER_TOKEN = 4
_UNPACKED = {".gz": 3, ".zst": 4, ".parquet": 2}


@contextmanager
def no_progress(_description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows nothing."""
    yield lambda _done, _total: None


@dataclass(frozen=True)
class PreparedText:
    """A folder of token shards, and what is in it."""

    folder: Path
    manifest: Manifest
    was_complete: bool
    """True if the folder had been finished by an earlier run, and nothing was done."""
    bos_tokens: list[str]
    """What is before every document."""
    tokenizer_bos_tokens: list[str]
    """What the tokenizer puts before a text; the same, unless it was not wanted."""
    found: Found
    """The inputs, and what was passed over."""

    def summary(self) -> dict[str, Any]:
        """The manifest in few numbers, for `--json`."""
        manifest = self.manifest
        splits = {
            split: {
                "num_tokens": manifest.num_tokens(split),
                "num_documents": manifest.num_documents(split),
                "num_shards": len(manifest.splits[split]),
            }
            for split in SPLITS
        }
        return {
            "folder": str(self.folder),
            "was_complete": self.was_complete,
            **self.found.to_dict(),
            "splits": splits,
            "held_out_by": manifest.held_out["by"],
            "num_empty_documents": manifest.num_empty_documents,
            "tokenizer_hash": manifest.tokenizer["hash"],
            "vocab_size": manifest.vocab_size,
            "bos_token_ids": manifest.bos_token_ids,
            "bos_tokens": self.bos_tokens,
            "tokenizer_bos_tokens": self.tokenizer_bos_tokens,
            "eos_token_id": manifest.eos_token_id,
            "dtype": manifest.dtype,
        }


def prepare(
    inputs: Sequence[str | Path],
    *,
    tokenizer: str | Path,
    out: str | Path,
    validation: float = 0.01,
    text_field: str = "text",
    eos_token: str | None = None,
    bos: bool = True,
    num_workers: int | None = None,
    progress: Progress = no_progress,
    notify: Callable[[str], None] = lambda _: None,
) -> PreparedText:
    """Tokenise text into a folder of token shards; take up an unfinished folder where it stopped.

    The same text, tokenizer and options give the same bytes, whatever the number of workers.
    Workers are started by spawning, so a script that calls this needs the usual
    `if __name__ == "__main__":`, or `num_workers=1`.

    Args:
        inputs: files, folders, or hub data sets as `name` or `name:config`.
        tokenizer: a tokenizer's folder, its `tokenizer.json`, or its name on the hub.
        out: the folder to write; new, empty, or begun by the same job.
        validation: the share of the tokens to hold out, from 0 to less than 1; see `split.py`.
        text_field: the field with the text, where documents are rows.
        eos_token: the end-of-document token; by default the tokenizer's own.
        bos: begin each document as the tokenizer begins a text, which may be a BOS token or
            nothing; False begins it with its text.
        num_workers: processes that tokenise; by default one per core.
        progress: shows how far each step is, e.g. `console.progress_bar`.
        notify: told, before the work begins, what was taken and what was passed over.

    Raises:
        UserError: an input, the tokenizer or the folder can't be used.
        DiskFullError: there is too little space; what is finished is kept.
    """
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: expected a share from 0 to less than 1.")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--workers {num_workers}: expected at least 1.")
    folder = Path(out)
    found = survey([str(name) for name in inputs], folder)
    sources = found.inputs
    _refuse_no_text(sources)
    loaded = load_tokenizer(str(tokenizer), eos_token)
    job = Job(
        inputs=[source.identity() for source in sources],
        tokenizer_name=str(tokenizer),
        tokenizer_hash=tokenizer_hash(loaded),
        eos_token_id=loaded.eos_token_id,
        validation=validation,
        text_field=text_field,
        bos_token_ids=bos_token_ids(loaded) if bos else [],
    )
    for line in _in_words(found, text_field):
        notify(line)
    with locked(folder, "preparing text"), _told_when_disk_is_full(folder):
        job = begin(folder, job)
        was_complete = (folder / MANIFEST_NAME).exists()
        if not was_complete:
            num_workers = num_workers or len(os.sched_getaffinity(0))
            _run(folder, job, sources, loaded, num_workers, progress)
        _remove_leftovers(folder)
    manifest = Manifest.load(folder)
    return PreparedText(
        folder,
        manifest,
        was_complete,
        loaded.convert_ids_to_tokens(manifest.bos_token_ids),
        loaded.convert_ids_to_tokens(bos_token_ids(loaded)),
        found,
    )


def _in_words(found: Found, text_field: str) -> Iterator[str]:
    """A line for each way in which inputs were taken, and each reason to pass something over."""
    groups: dict[str, list[str]] = {}
    for source in found.inputs:
        field = f", field {text_field!r}" if source.has_rows else ""
        groups.setdefault(f"Taken, each as {taken_as(source)}{field}", []).append(source.name)
    for passed in found.passed_over:
        groups.setdefault(f"Passed over, {passed.reason}", []).append(passed.name)
    for what, names in groups.items():
        shown = ", ".join(names[:_SHOWN_NAMES])
        yield f"{what}: {len(names):,} ({shown}{' …' if len(names) > _SHOWN_NAMES else ''})"


def _refuse_no_text(sources: list[Input]) -> None:
    if all(isinstance(source, TextFile) and source.num_bytes == 0 for source in sources):
        names = ", ".join(source.name for source in sources[:3]) or "no input was named"
        raise UserError(f"There is no text to prepare: {names}. Name inputs that are not empty.")


def _run(
    folder: Path,
    job: Job,
    sources: list[Input],
    tokenizer: Any,
    num_workers: int,
    progress: Progress,
) -> None:
    """Everything from the tokenizer to the manifest."""
    save_tokenizer(tokenizer, folder / TOKENIZER_NAME)
    vocab_size = vocabulary_size(tokenizer)
    spec = TokenizerSpec(
        file=(folder / TOKENIZER_NAME / TOKENIZER_FILE).resolve(),
        hash=job.tokenizer_hash,
        bos_token_ids=tuple(job.bos_token_ids),
        eos_token_id=job.eos_token_id,
        dtype="uint16" if vocab_size <= 2**16 else "uint32",
    )
    pieces = _tokenise(folder, job, sources, spec, num_workers, progress)
    keys, num_tokens = _documents(folder, pieces)
    held_out = hold_out(keys, num_tokens, job.validation)
    total = int(num_tokens.sum())
    _check_space(folder, total * np.dtype(spec.dtype).itemsize)
    with progress("Writing shards") as update:
        splits = write_shards(folder, pieces, held_out, lambda done: update(done, total))
    manifest = Manifest(
        tokenizer={"name": job.tokenizer_name, "hash": job.tokenizer_hash},
        vocab_size=vocab_size,
        eos_token_id=job.eos_token_id,
        dtype=spec.dtype,
        held_out=held_out.for_manifest(),
        splits=splits,
        num_empty_documents=int(np.count_nonzero(num_tokens == 0)),
        inputs=[source.for_manifest() for source in sources],
        bos_token_ids=job.bos_token_ids,
    )
    with atomic_write(folder / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())


def _tokenise(
    folder: Path,
    job: Job,
    sources: list[Input],
    spec: TokenizerSpec,
    num_workers: int,
    progress: Progress,
) -> list[Path]:
    """All pieces, tokenised. How many there are is noted, so that this step is done only once."""
    pieces_folder = folder / PIECES_NAME
    pieces_folder.mkdir(exist_ok=True)
    note = pieces_folder / _NUM_PIECES_NAME
    if not note.exists():
        _check_space(folder, _estimate_bytes(sources, spec.dtype) - _bytes_in(pieces_folder))
        pieces = group_into_pieces(cut_into_sections(_read_all(sources, job.text_field)))
        total = _total_bytes(sources)
        with progress("Tokenising") as update:
            num_pieces = tokenise_pieces(
                pieces, pieces_folder, spec, num_workers, lambda done: update(done, total)
            )
        with atomic_write(note) as file:
            file.write(str(num_pieces).encode())
    return [piece_path(pieces_folder, number) for number in range(int(note.read_text()))]


def _read_all(sources: list[Input], text_field: str) -> Iterator[Chunk]:
    """The chunks of all inputs; positions count on from one to the next."""
    before = 0
    for source in sources:
        for chunk in read_documents(source, text_field):
            yield replace(chunk, position=before + chunk.position)
        before += source.num_bytes if isinstance(source, TextFile) else 0


def _documents(folder: Path, pieces: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Of every document its key, uint64 [documents], and its number of tokens, int64."""
    indices = [read_index(path) for path in pieces]
    if not any(index.num_tokens.any() for index in indices):
        raise UserError(
            "There is no text in the inputs, only empty documents: "
            f"{sum(len(index.keys) for index in indices)}. "
            f"Delete {folder} and name other inputs or another --text-field."
        )
    return document_index(
        SectionIndex(
            np.concatenate([index.num_tokens for index in indices]),
            np.concatenate([index.ends_document for index in indices]),
            np.concatenate([index.keys for index in indices]),
        )
    )


def _total_bytes(sources: list[Input]) -> int:
    """What a complete reading reads; 0 where hub data sets make that unknown."""
    sizes = [source.num_bytes for source in sources if isinstance(source, TextFile)]
    return sum(sizes) if len(sizes) == len(sources) else 0


def _estimate_bytes(sources: list[Input], dtype: str) -> int:
    """About what pieces and shards take together; hub data sets are not counted."""
    files = [source for source in sources if isinstance(source, TextFile)]
    text_bytes = sum(file.num_bytes * _UNPACKED.get(file.path.suffix, 1) for file in files)
    return 2 * text_bytes * np.dtype(dtype).itemsize // _TEXT_BYTES_PER_TOKEN


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskFullError(
            f"About {format_bytes(num_bytes)} are needed in {folder}, {format_bytes(free)} are "
            "free. Free some space, or choose an --out on another disk."
        )


@contextmanager
def _told_when_disk_is_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"The disk of {folder} is full. What is finished is kept: free some space and run the "
            "same command again."
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """The pieces, which are in the shards now, and files that a killed run was writing."""
    pieces = folder / PIECES_NAME
    if pieces.exists():
        shutil.rmtree(pieces)
    for path in folder.glob("*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
