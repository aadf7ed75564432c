"""A shard's header and checksums; writing one is in `shard_writer.py`."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lookup_experts.errors import TableError
from lookup_experts.table.files import read_exactly
from lookup_experts.table.format import CHECKSUM, DATA_START, FORMAT
from lookup_experts.table.json_fields import Fields, parse_json
from lookup_experts.table.layout import RecordLayout, ShardInfo

_CHUNK_BYTES = 2**23
"""What one thread holds while it reads a shard from end to end."""


def shard_content(layout: RecordLayout, shard: ShardInfo, fingerprint: str) -> dict[str, Any]:
    """The JSON header of a shard, before padding."""
    end_of_records = shard.num_ids * layout.stride
    end = end_of_records + shard.num_ids * CHECKSUM.itemsize
    return {
        "__metadata__": {
            "format": f"{FORMAT} shard",
            "version": str(layout.version),
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


def encode_header(content: dict[str, Any]) -> bytes:
    """The first `DATA_START` bytes of a shard."""
    text = json.dumps(content).encode()
    length = DATA_START - 8
    assert len(text) <= length, "texts are bounded so that the header fits"
    return length.to_bytes(8, "little") + text.ljust(length)


def check_header(header: bytes, expected: dict[str, Any], path: Path) -> None:
    """Raise a `TableError` unless the first bytes of a shard say what `table.json` makes expect."""
    if header[:8] != (DATA_START - 8).to_bytes(8, "little"):
        raise TableError(f"{path}: not a shard of a table (the length of its header is another).")
    found = parse_json(header[8:].decode("utf-8", errors="replace"), str(path))
    fields = Fields(found, str(path))
    metadata = fields.inner("__metadata__")
    for key, value in expected["__metadata__"].items():
        metadata.must_be(key, value)
    metadata.end()
    fields.must_be("records", expected["records"])
    fields.must_be("crc32", expected["crc32"])
    fields.end()


def stored_checksums(
    fd: int, layout: RecordLayout, shard: ShardInfo, first_row: int, num_rows: int, path: Path
) -> np.ndarray:
    """The CRC-32 that an open shard holds for each of these records, uint32 [num_rows]."""
    checksums = np.empty(num_rows, CHECKSUM)
    offset = layout.record_offset(shard.num_ids) + first_row * CHECKSUM.itemsize
    read_exactly(fd, checksums, offset, path)
    return checksums


def wrong_checksums(records: np.ndarray, checksums: np.ndarray) -> np.ndarray:
    """The rows of uint8 [n, stride] whose CRC-32 isn't the one in uint32 [n]."""
    found = np.fromiter(map(zlib.crc32, records), CHECKSUM, len(records))
    return np.flatnonzero(found != checksums)


def row_chunks(num_rows: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pieces of about `_CHUNK_BYTES`."""
    most = max(1, _CHUNK_BYTES // stride)
    return ((first, min(most, num_rows - first)) for first in range(0, num_rows, most))
