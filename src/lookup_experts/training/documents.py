"""Inputs to documents: every kind of file is read as a stream, in pieces of text.

A reader yields `Chunk`s. The chunks up to one with `ends_document` are one document, so that a
document may be larger than memory: a text file comes in many chunks, a row in one.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from lookup_experts.errors import UserError
from lookup_experts.training.inputs import HubDataset, Input, TextFile, suffix_of

CHUNK_CHARACTERS = 2**20
_ROWS_AT_ONCE = 64
"""Rows of a parquet file held at once, at most."""
_BYTES_AT_ONCE = 2**22
"""Likewise, fewer rows where they are long."""
_BUFFER_BYTES = 2**20
"""Of a parquet file, read at a time; without this a whole row group's column is held."""


@dataclass(frozen=True)
class Chunk:
    """Text of a document."""

    text: str
    ends_document: bool
    position: int
    """Bytes of the input read so far, as stored: for the progress bar."""


def read_documents(source: Input, text_field: str) -> Iterator[Chunk]:
    """The documents of an input, in order. Anything unreadable is a `UserError` naming the place.

    Args:
        source: the input.
        text_field: the field (column) with the text, where documents are rows.
    """
    if isinstance(source, HubDataset):
        return _read_hub_dataset(source, text_field)
    suffix = suffix_of(source.path)
    if suffix == ".parquet":
        return _read_parquet(source, text_field)
    if source.has_rows:
        return _read_jsonl(source, text_field)
    return _read_plain(source)


def _read_plain(source: TextFile) -> Iterator[Chunk]:
    """The whole file as one document. A byte order mark is dropped, line ends are kept."""
    with _open(source.path) as (raw, data):
        text = TextIOWrapper(data, encoding="utf-8-sig", newline="")
        try:
            while chunk := text.read(CHUNK_CHARACTERS):
                yield Chunk(chunk, False, raw.tell())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source.name} is not UTF-8 text ({error.reason}). Convert it, e.g. with "
                f"`iconv -f LATIN1 -t UTF-8`, or leave it out."
            ) from None
        yield Chunk("", True, source.num_bytes)


def _read_jsonl(source: TextFile, text_field: str) -> Iterator[Chunk]:
    """One document per line; empty lines are passed over."""
    with _open(source.path) as (raw, data):
        for number, line in enumerate(data, start=1):
            if line.strip():
                text = _text_of_line(line, text_field, f"{source.name}, line {number}")
                yield Chunk(text, True, raw.tell())


def _text_of_line(line: bytes, text_field: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{place}: not valid JSON ({error}). Expected one JSON object per line."
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{place}: a {type(row).__name__}; expected a JSON object with a field {text_field!r}."
        )
    return text_of_row(row, text_field, place)


def text_of_row(row: dict[str, Any], text_field: str, place: str) -> str:
    """The text of a row; null counts as a document without text."""
    if text_field not in row:
        raise _missing_field(text_field, list(row), place)
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{place}: the field {text_field!r} holds a {type(text).__name__}, expected text. "
            "Name another field with --text-field."
        )
    if not _is_encodable(text):
        raise UserError(
            f"{place}: the text holds half of a surrogate pair, which no UTF-8 text can. "
            "Repair or remove the row."
        )
    return text


def _missing_field(text_field: str, present: list[str], place: str) -> UserError:
    return UserError(
        f"{place}: no field {text_field!r}; there are {', '.join(map(repr, present)) or 'none'}. "
        "Name the one with the text with --text-field."
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(source: TextFile, text_field: str) -> Iterator[Chunk]:
    """One document per row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_package("pyarrow", source.name) from None
    try:
        with pyarrow.parquet.ParquetFile(
            source.path, buffer_size=_BUFFER_BYTES, pre_buffer=False
        ) as file:
            if text_field not in file.schema_arrow.names:
                raise _missing_field(text_field, file.schema_arrow.names, source.name)
            row = 0
            for batch in file.iter_batches(_rows_at_once(file.metadata), columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    fields = {text_field: value.as_py()}
                    text = text_of_row(fields, text_field, f"{source.name}, row {row}")
                    yield Chunk(text, True, source.num_bytes * row // file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source.name} can't be read as parquet: {first_line(error)} Get the file again."
        ) from error


def _rows_at_once(metadata: Any) -> int:
    """So many rows that they take about `_BYTES_AT_ONCE`."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    num_bytes = max(1, sum(group.total_byte_size for group in groups))
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * metadata.num_rows // num_bytes))


def _read_hub_dataset(source: HubDataset, text_field: str) -> Iterator[Chunk]:
    """One document per row of the train split, streamed."""
    for number, row in enumerate(_stream_rows(source), start=1):
        text = text_of_row(row, text_field, f"data set {source.name}, row {number}")
        yield Chunk(text, True, 0)


def _stream_rows(source: HubDataset) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", source.name) from None
    try:
        yield from datasets.load_dataset(
            source.path, source.config, split="train", streaming=True, revision=source.revision
        )
    # A wrong config, a missing split, a lost connection: each kind of file has its own classes.
    except Exception as error:
        raise UserError(
            f"The data set {source.name} can't be read: {first_line(error)} Expected `name` or "
            "`name:config` of a data set with a train split. If the connection was lost, run the "
            "same command again."
        ) from error


def missing_package(package: str, name: str) -> UserError:
    return UserError(
        f"Reading {name} needs the package {package}. "
        "Install it with: pip install 'lookup-experts[train]'"
    )


def first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if line.endswith(".") else line + "."


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """A file, unpacked if it is packed: (the file as stored, its content)."""
    try:
        with path.open("rb") as raw:
            if path.name.lower().endswith(".gz"):
                with gzip.open(raw) as data:
                    yield raw, data
            elif path.name.lower().endswith(".zst"):
                with _unpacked_zst(path, raw) as data:
                    yield raw, data
            else:
                yield raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}). Get it again.") from error
    except OSError as error:
        if error.errno is None and path.name.lower().endswith(".zst"):
            raise UserError(f"{path} is a damaged zst file ({error}). Get it again.") from error
        raise UserError(f"{path} can't be read: {error.strerror}.") from error


def _unpacked_zst(path: Path, raw: BinaryIO) -> BinaryIO:
    """By pyarrow, which reads on where several frames follow each other, and notices where a file
    has been cut off."""
    try:
        import pyarrow
    except ImportError:
        raise missing_package("pyarrow", str(path)) from None
    return BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
