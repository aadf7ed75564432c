"""The table on disk, format version 1. This text is the specification.

A table is a folder: `table.json` and shards `table-00001-of-0000n.safetensors`, split by token id.

**Record.** All that the table holds for one token id: layer after layer, each as its encoding
lays it out (`encoding.py`): the codes of the N experts, then their scales. A record is padded
with zeros to the *stride*: the next multiple of 4096 bytes if it is that large, else the next
power of two from 64 up. So no record straddles a block that it could fit into, and each can be
read without the page cache.

**Shard.** A valid safetensors file, so any reader of that format opens it.

| bytes | content |
|---|---|
| 0 to 8 | 4088, the length of the JSON header, uint64 little-endian |
| 8 to 4096 | JSON, padded with spaces: tensors `records` U8 [ids, stride], `crc32` U32 [ids] |
| from 4096 | the records, in the order of their ids |
| after them | for each record the CRC-32 of zlib over all `stride` bytes, uint32 little-endian |

`__metadata__` of the header holds, as strings, `format`, `version`, `first_id`, `fingerprint`.

**table.json.** One JSON object with exactly these keys: `format`, `version`; `shape` (vocab_size,
num_layers, num_experts, hidden_size); `encoding` (name, block_size or null); `layer_bytes`,
`record_bytes`, `stride`; `shards`, a list of (file, first_id, num_ids, bytes); `fingerprint`, a
hash of the embedding and expert weights that were folded; `embedding_hash` and `tokenizer_hash`,
strings or null; `created_by`, the tool and its version.

- Other versions and unknown keys are refused, because a reader that guesses gives wrong numbers.
- Sizes that follow from others are written and checked, so that a hand-edited file is noticed.
- The header has one length, because records must start at a multiple of 4096.
- A shard repeats fingerprint and first id, so that shards of two tables, or two shards of one,
  can't be exchanged unnoticed. Shard names are fixed, so that no path leads out of the folder.
- Shards cover the ids 0 to V-1 in order, without holes. Duplicate keys are refused.
- Checksums cover the padding, so that every byte of `records` is either verified or damaged.
  The checksum of a record that was never written, zero, doesn't match its zero bytes.
- How often each id occurs may be kept in a file beside these; see `counts.py`.

Here are the layout, the manifest, the writer of a shard, and the checks on opening and on
verifying. Reading records by id is in `store.py`; filling a table is in `build.py`.
"""

import errno
import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.table.encoding import Encoding, get_encoding

FORMAT = "lookup-experts table"
VERSION = 1
MANIFEST_NAME = "table.json"
UNFINISHED = ".unfinished-"
"""How the name of a file begins that `write_whole` is writing; a killed process leaves one."""

BLOCK = 4096
"""Bytes. What direct I/O asks offsets, lengths and addresses to be multiples of, on any disk."""
DATA_START = BLOCK
"""Where the records start in a shard: after the eight bytes and the padded header."""
SMALLEST_STRIDE = 64
MAX_RECORD_BYTES = 2**30
"""A record is one read, and Linux reads at most 2 GiB at once."""
MAX_TEXT = 256
"""Characters of a hash or a version; bounds the header of a shard."""
MAX_MANIFEST_BYTES = 2**24
CHECKSUM = np.dtype("<u4")

_CHUNK_BYTES = 2**23
"""What one thread holds while it reads a shard from end to end."""

Progress = Callable[[int, int], None]
"""Called with (ids done, ids in all)."""


# ------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class TableShape:
    """V token ids, L layers, N experts, d hidden size; all at least 1."""

    vocab_size: int
    num_layers: int
    num_experts: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name} of a table must be a whole number from 1 up, not {value}.")


@dataclass(frozen=True)
class RecordLayout:
    """Where things lie in a record; every size follows from the shape and the encoding."""

    shape: TableShape
    encoding: Encoding

    def __post_init__(self) -> None:
        if self.record_bytes > MAX_RECORD_BYTES:
            raise UserError(
                f"A record of {self.record_bytes} bytes (all layers and experts of one token) is "
                f"larger than {MAX_RECORD_BYTES}. Use fewer experts or a smaller encoding."
            )

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a record."""
        return self.encoding.layer_bytes(self.shape.num_experts, self.shape.hidden_size)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a record that mean something; the rest of the stride is zeros."""
        return self.shape.num_layers * self.layer_bytes

    @cached_property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        if self.record_bytes >= BLOCK:
            return -(-self.record_bytes // BLOCK) * BLOCK
        return max(SMALLEST_STRIDE, 1 << (self.record_bytes - 1).bit_length())

    @property
    def table_bytes(self) -> int:
        """Bytes of all records with their padding: what the whole table takes in memory."""
        return self.shape.vocab_size * self.stride

    def layer_slice(self, layer: int) -> slice:
        """The bytes of `layer` within a record."""
        return slice(layer * self.layer_bytes, (layer + 1) * self.layer_bytes)

    def record_offset(self, row: int) -> int:
        """Where record number `row` of a shard starts in its file."""
        return DATA_START + row * self.stride

    def shard_bytes(self, num_ids: int) -> int:
        """The size of a shard file with this many records."""
        return DATA_START + num_ids * (self.stride + CHECKSUM.itemsize)


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file name and size, and the ids `first_id` to `first_id + num_ids - 1`."""

    file: str
    first_id: int
    num_ids: int
    bytes: int


def plan_shards(layout: RecordLayout, max_shard_bytes: int = 4 * 2**30) -> list[ShardInfo]:
    """The fewest shards of nearly equal size, none over `max_shard_bytes` unless one record is."""
    per_id = layout.stride + CHECKSUM.itemsize
    most_ids = max(1, (max_shard_bytes - DATA_START) // per_id)
    vocab_size = layout.shape.vocab_size
    num_shards = -(-vocab_size // most_ids)
    bounds = [vocab_size * shard // num_shards for shard in range(num_shards + 1)]
    return [
        ShardInfo(
            _shard_name(number, num_shards), first, end - first, layout.shard_bytes(end - first)
        )
        for number, (first, end) in enumerate(pairwise(bounds), start=1)
    ]


def _shard_name(number: int, num_shards: int) -> str:
    return f"table-{number:05d}-of-{num_shards:05d}.safetensors"


# ----------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class TableManifest:
    """What `table.json` says."""

    layout: RecordLayout
    shards: tuple[ShardInfo, ...]
    fingerprint: str
    """Hash of the embedding and expert weights that were folded."""
    embedding_hash: str | None
    tokenizer_hash: str | None
    created_by: str

    def to_json(self) -> str:
        """The text of `table.json`."""
        encoding = self.layout.encoding
        content = {
            "format": FORMAT,
            "version": VERSION,
            "shape": asdict(self.layout.shape),
            "encoding": {"name": encoding.name, "block_size": encoding.block_size},
            "layer_bytes": self.layout.layer_bytes,
            "record_bytes": self.layout.record_bytes,
            "stride": self.layout.stride,
            "shards": [asdict(shard) for shard in self.shards],
            "fingerprint": self.fingerprint,
            "embedding_hash": self.embedding_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "created_by": self.created_by,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Self:
        """The manifest in `text`.

        Raises:
            TableError: anything that isn't exactly as specified, naming `where` and the field.
        """
        fields = _Fields(_parse_json(text, where), where)
        fields.must_be("format", FORMAT)
        fields.must_be("version", VERSION)
        layout = _layout_from(fields)
        for size in ("layer_bytes", "record_bytes", "stride"):
            fields.must_be(size, getattr(layout, size))
        manifest = cls(
            layout=layout,
            shards=_shards_from(fields, layout),
            fingerprint=fields.text("fingerprint"),
            embedding_hash=fields.text_or_null("embedding_hash"),
            tokenizer_hash=fields.text_or_null("tokenizer_hash"),
            created_by=fields.text("created_by"),
        )
        fields.end()
        return manifest


class _Fields:
    """The fields of a JSON object, each taken once; what is wrong is named with its path."""

    def __init__(self, content: object, where: str, path: str = "") -> None:
        self.where, self.path = where, path
        if not isinstance(content, dict):
            raise TableError(f"{where}: {path or 'the file'} must be a JSON object.")
        self._left = dict(content)

    def take(self, key: str) -> Any:
        if key not in self._left:
            raise self.error(key, "is missing")
        return self._left.pop(key)

    def must_be(self, key: str, expected: object) -> None:
        value = self.take(key)
        if type(value) is not type(expected) or value != expected:
            raise self.error(key, f"is {value!r}, expected {expected!r}")

    def integer(self, key: str) -> int:
        value = self.take(key)
        if type(value) is not int or value < 0:
            raise self.error(key, f"is {value!r}, expected a whole number")
        return value

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            raise self.error(key, f"must be a text of 1 to {MAX_TEXT} characters")
        return value

    def text_or_null(self, key: str) -> str | None:
        return self.text(key) if self._left.get(key, "") is not None else self.take(key)

    def inner(self, key: str) -> "_Fields":
        return _Fields(self.take(key), self.where, self._name(key))

    def end(self) -> None:
        for key in self._left:
            raise self.error(key, f"is not a field of version {VERSION}")

    def error(self, key: str, problem: str) -> TableError:
        return TableError(f"{self.where}: field {self._name(key)} {problem}.")

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{where}: not readable as JSON ({error}).") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("the same key twice")
    return content


def _layout_from(fields: _Fields) -> RecordLayout:
    shape, encoding = fields.inner("shape"), fields.inner("encoding")
    sizes = {name: shape.integer(name) for name in TableShape.__dataclass_fields__}
    shape.end()
    name, block_size = encoding.text("name"), encoding.take("block_size")
    encoding.end()
    try:
        layout = RecordLayout(TableShape(**sizes), get_encoding(name, block_size))
    except UserError as error:
        raise TableError(f"{fields.where}: {error}") from error
    if layout.encoding.block_size != block_size:
        raise encoding.error("block_size", f"is {block_size!r}, expected a number for {name}")
    return layout


def _shards_from(fields: _Fields, layout: RecordLayout) -> tuple[ShardInfo, ...]:
    listed = fields.take("shards")
    if not isinstance(listed, list) or not listed:
        raise fields.error("shards", "must be a list of at least one shard")
    shards: list[ShardInfo] = []
    next_id = 0
    for number, content in enumerate(listed, start=1):
        shard = _Fields(content, fields.where, f"shards[{number - 1}]")
        shards.append(_shard_from(shard, layout, _shard_name(number, len(listed)), next_id))
        next_id += shards[-1].num_ids
    if next_id != layout.shape.vocab_size:
        raise fields.error("shards", f"hold {next_id} ids, expected {layout.shape.vocab_size}")
    return tuple(shards)


def _shard_from(fields: _Fields, layout: RecordLayout, file: str, first_id: int) -> ShardInfo:
    fields.must_be("file", file)
    fields.must_be("first_id", first_id)
    num_ids = fields.integer("num_ids")
    if num_ids == 0:
        raise fields.error("num_ids", "is 0, expected at least 1")
    fields.must_be("bytes", layout.shard_bytes(num_ids))
    fields.end()
    return ShardInfo(file, first_id, num_ids, layout.shard_bytes(num_ids))


def write_manifest(folder: Path | str, manifest: TableManifest) -> None:
    """Write `table.json`, all of it or none.

    Raises:
        TableError: the manifest is one that `read_manifest` would refuse.
    """
    text = manifest.to_json()
    TableManifest.from_json(text)
    write_whole(Path(folder) / MANIFEST_NAME, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, all of it or none: to a temporary one, then renamed."""
    temporary = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}.{threading.get_ident()}")
    with temporary.open("wb") as file:  # not by `tempfile`, whose files are their owner's alone
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_manifest(folder: Path | str) -> TableManifest:
    """What `table.json` in `folder` says; a `TableError` if it is missing or not as specified."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TableError(_what_is_missing(folder)) from error
    except OSError as error:
        raise TableError(f"{path}: can't be read: {error.strerror}.") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise TableError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, so not a table.json.")
    try:
        return TableManifest.from_json(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 text.") from error


def _what_is_missing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder."
    if not folder.is_dir():
        return f"{folder}: a file, expected the folder of a table."
    inner = folder / "table"
    if (inner / MANIFEST_NAME).exists():
        return f"{folder}: no {MANIFEST_NAME} here. The table is in {inner}."
    return f"{folder}: no {MANIFEST_NAME} here, so not a finished table."


# ------------------------------------------------------------------------------ header of a shard


def _shard_content(layout: RecordLayout, shard: ShardInfo, fingerprint: str) -> dict[str, Any]:
    """The JSON header of a shard, before padding."""
    end_of_records = shard.num_ids * layout.stride
    end = end_of_records + shard.num_ids * CHECKSUM.itemsize
    return {
        "__metadata__": {
            "format": f"{FORMAT} shard",
            "version": str(VERSION),
            "first_id": str(shard.first_id),
            "fingerprint": fingerprint,
        },
        "records": {
            "dtype": "U8",
            "shape": [shard.num_ids, layout.stride],
            "data_offsets": [0, end_of_records],
        },
        "crc32": {"dtype": "U32", "shape": [shard.num_ids], "data_offsets": [end_of_records, end]},
    }


def _encode_header(content: dict[str, Any]) -> bytes:
    """The first `DATA_START` bytes of a shard."""
    text = json.dumps(content).encode()
    length = DATA_START - 8
    assert len(text) <= length, "texts are bounded so that the header fits"
    return length.to_bytes(8, "little") + text.ljust(length)


def _check_header(header: bytes, expected: dict[str, Any], path: Path) -> None:
    """Raise a `TableError` unless the first bytes of a shard say what `table.json` makes expect."""
    if header[:8] != (DATA_START - 8).to_bytes(8, "little"):
        raise TableError(f"{path}: not a shard of a table (the length of its header is another).")
    found = _parse_json(header[8:].decode("utf-8", errors="replace"), str(path))
    fields = _Fields(found, str(path))
    metadata = fields.inner("__metadata__")
    for key, value in expected["__metadata__"].items():
        metadata.must_be(key, value)
    metadata.end()
    fields.must_be("records", expected["records"])
    fields.must_be("crc32", expected["crc32"])
    fields.end()


# ------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class Table:
    """A table whose files are all there and as long as they should be; no record was read."""

    folder: Path
    manifest: TableManifest

    @property
    def layout(self) -> RecordLayout:
        return self.manifest.layout

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return self.manifest.shards

    def path(self, shard: ShardInfo) -> Path:
        """The file of `shard`."""
        return self.folder / shard.file


def open_table(folder: Path | str) -> Table:
    """The table in `folder`, after checking `table.json` and size and header of every shard.

    Raises:
        TableError: something is missing, truncated, foreign, or doesn't add up; says which file.
    """
    table = Table(Path(folder), read_manifest(folder))
    for shard in table.shards:
        _check_shard(table, shard)
    return table


def _check_shard(table: Table, shard: ShardInfo) -> None:
    path = table.path(shard)
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            header = file.read(DATA_START)
    except FileNotFoundError as error:
        raise TableError(f"{path}: missing, though table.json lists it.") from error
    except OSError as error:
        raise TableError(f"{path}: can't be read: {error.strerror}.") from error
    if len(header) == DATA_START:
        _check_header(header, _shard_content(table.layout, shard, table.manifest.fingerprint), path)
    if num_bytes != shard.bytes:
        problem = "truncated" if num_bytes < shard.bytes else "too long"
        raise TableError(f"{path}: {problem}, expected {shard.bytes} bytes, found {num_bytes}.")


def read_checksums(table: Table, shard: ShardInfo) -> np.ndarray:
    """The stored CRC-32 of each record of `shard`, uint32 [num_ids]."""
    path = table.path(shard)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read_checksums(fd, table.layout, shard, 0, shard.num_ids, path)
    finally:
        os.close(fd)


def _read_checksums(
    fd: int, layout: RecordLayout, shard: ShardInfo, first_row: int, num_rows: int, path: Path
) -> np.ndarray:
    checksums = np.empty(num_rows, CHECKSUM)
    offset = layout.record_offset(shard.num_ids) + first_row * CHECKSUM.itemsize
    read_exactly(fd, checksums, offset, path)
    return checksums


def read_exactly(fd: int, out: np.ndarray, offset: int, path: Path) -> None:
    """Fill `out` from `offset` of an open file.

    Raises:
        TableError: the file ends before that, or can't be read.
    """
    buffer = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise TableError(
                f"{path}: can't be read at {offset + done}: {error.strerror}."
            ) from error
        if count == 0:
            raise TableError(
                f"{path}: truncated, expected {len(buffer)} bytes at offset {offset}, found {done}."
            )
        done += count


# ------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes the records of one shard, in any order, and picks up a shard begun before.

    A new file gets its full size at once, so that a full disk is noticed before hours of work.
    An existing file goes on if its header is the same, else it is refused. One writer at a time
    holds a file (`flock`).

    Args:
        path: the file to write; renaming it into place is the caller's.
        layout, shard, fingerprint: as they will stand in `table.json`.

    Raises:
        DiskFullError: no space for the whole shard.
        TableError: the file belongs to another build, or to a writer that is still running.
    """

    def __init__(
        self, path: Path | str, layout: RecordLayout, shard: ShardInfo, fingerprint: str
    ) -> None:
        self.path, self.layout, self.shard = Path(path), layout, shard
        content = _shard_content(layout, shard, fingerprint)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self.resumed = self._was_begun(content)
            """Whether the file had been begun before."""
            if not self.resumed:
                self._begin(content)
        except BaseException:
            self.close()
            raise

    def write(self, first_row: int, records: np.ndarray) -> None:
        """Write records `first_row`, `first_row + 1`, ... of the shard and their checksums.

        Args:
            records: uint8 [n, stride], C-contiguous, padding zero.
        """
        self._check_records(first_row, records)
        checksums = np.fromiter(map(zlib.crc32, records), CHECKSUM, len(records))
        self._write_at(self.layout.record_offset(first_row), records)
        self._write_at(self._checksum_offset(first_row), checksums)

    def verified_rows(self, limit: int) -> int:
        """How many of the first `limit` records are intact, counted up to the first that isn't."""
        rows = min(limit, self.shard.num_ids)
        for first, count in _chunks(rows, self.layout.stride):
            records = np.empty((count, self.layout.stride), np.uint8)
            read_exactly(self._fd, records, self.layout.record_offset(first), self.path)
            stored = _read_checksums(self._fd, self.layout, self.shard, first, count, self.path)
            bad = wrong_checksums(records, stored)
            if len(bad):
                return first + int(bad[0])
        return rows

    def finish(self) -> None:
        """Bring everything to the disk and close the file."""
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        """Close the file as it is, to go on later."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TableError(f"{self.path}: another process is writing it.") from error

    def _was_begun(self, content: dict[str, Any]) -> bool:
        """Whether the file holds the header of this shard; False for a file without a header."""
        header = os.pread(self._fd, DATA_START, 0)
        if not header.strip(b"\0"):
            return False
        try:
            _check_header(header, content, self.path)
        except TableError as error:
            raise TableError(
                f"{error} It is from another build; delete it to start anew."
            ) from error
        if os.fstat(self._fd).st_size != self.shard.bytes:
            raise TableError(f"{self.path}: its size is wrong; delete it to start anew.")
        return True

    def _begin(self, content: dict[str, Any]) -> None:
        try:
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, self.shard.bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self.path.unlink()
            raise DiskFullError(
                f"{self.path}: no space for {self.shard.bytes} bytes ({error.strerror}). "
                "Free some, or write to another disk."
            ) from error
        # The header comes last: a file with a header has its full size.
        self._write_at(0, np.frombuffer(_encode_header(content), np.uint8))

    def _check_records(self, first_row: int, records: np.ndarray) -> None:
        stride = self.layout.stride
        if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != stride:
            raise ValueError(f"Expected uint8 [n, {stride}], got {records.dtype} {records.shape}.")
        if first_row < 0 or first_row + len(records) > self.shard.num_ids:
            raise ValueError(f"Rows {first_row} + {len(records)} of {self.shard.num_ids}.")

    def _checksum_offset(self, row: int) -> int:
        return self.layout.record_offset(self.shard.num_ids) + row * CHECKSUM.itemsize

    def _write_at(self, offset: int, content: np.ndarray) -> None:
        buffer = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
        while buffer:
            count = os.pwrite(self._fd, buffer, offset)
            buffer, offset = buffer[count:], offset + count


# ----------------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class BadRecord:
    """One damaged record."""

    id: int
    file: str
    problem: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_table` found."""

    num_ids: int
    num_bad: int
    bad: tuple[BadRecord, ...]
    """The first of the damaged records, in the order of their ids."""
    num_bytes: int
    seconds: float

    @property
    def intact(self) -> bool:
        return self.num_bad == 0


MAX_BAD_LISTED = 20


def verify_table(table: Table, progress: Progress | None = None) -> VerifyReport:
    """Read every record; check its checksum and that its scales and numbers are finite.

    Holds a few megabytes for each of a few threads.

    Raises:
        TableError: a file can't be read to its end.
    """
    started_at = time.perf_counter()
    num_ids, done, num_bad = table.layout.shape.vocab_size, 0, 0
    listed: list[BadRecord] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for count, bad in threads.map(partial(_verify_chunk, table), _all_chunks(table)):
            listed += bad[: MAX_BAD_LISTED - len(listed)]
            num_bad += len(bad)
            done += count
            if progress:
                progress(done, num_ids)
    seconds = time.perf_counter() - started_at
    return VerifyReport(num_ids, num_bad, tuple(listed), table.layout.table_bytes, seconds)


def _all_chunks(table: Table) -> list[tuple[ShardInfo, int, int]]:
    """(shard, first row, rows) of pieces that cover the table in order."""
    return [
        (shard, first, count)
        for shard in table.shards
        for first, count in _chunks(shard.num_ids, table.layout.stride)
    ]


def _chunks(num_rows: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pieces of about `_CHUNK_BYTES`."""
    most = max(1, _CHUNK_BYTES // stride)
    return ((first, min(most, num_rows - first)) for first in range(0, num_rows, most))


def _verify_chunk(table: Table, chunk: tuple[ShardInfo, int, int]) -> tuple[int, list[BadRecord]]:
    shard, first_row, count = chunk
    path, layout = table.path(shard), table.layout
    records = np.empty((count, layout.stride), np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_exactly(fd, records, layout.record_offset(first_row), path)
        checksums = _read_checksums(fd, layout, shard, first_row, count, path)
    finally:
        os.close(fd)
    first_id = shard.first_id + first_row
    return count, [
        BadRecord(first_id + row, shard.file, problem)
        for row, problem in find_damage(layout, records, checksums)
    ]


def find_damage(
    layout: RecordLayout, records: np.ndarray, checksums: np.ndarray
) -> list[tuple[int, str]]:
    """(row, problem) of each damaged record, in order.

    Args:
        records: uint8 [n, stride].
        checksums: uint32 [n], as stored in the shard.
    """
    problems = dict.fromkeys(_invalid_rows(layout, records), "a number or scale is not valid")
    problems |= dict.fromkeys(wrong_checksums(records, checksums), "its checksum is another")
    return sorted((int(row), problem) for row, problem in problems.items())


def wrong_checksums(records: np.ndarray, checksums: np.ndarray) -> np.ndarray:
    """The rows of uint8 [n, stride] whose CRC-32 isn't the one in uint32 [n]."""
    found = np.fromiter(map(zlib.crc32, records), CHECKSUM, len(records))
    return np.flatnonzero(found != checksums)


def _invalid_rows(layout: RecordLayout, records: np.ndarray) -> np.ndarray:
    """The rows of uint8 [n, stride] in which a layer holds what its encoding never writes."""
    shape, tensor = layout.shape, torch.from_numpy(records)
    invalid = torch.zeros(len(records), dtype=torch.bool)
    for layer in range(shape.num_layers):
        layer_records = tensor[:, layout.layer_slice(layer)]
        invalid |= layout.encoding.invalid(layer_records, shape.num_experts, shape.hidden_size)
    return invalid.numpy().nonzero()[0]
