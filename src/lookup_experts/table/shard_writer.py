"""Writing a shard, in any order, and going on with one that was begun."""

import errno
import fcntl
import os
import zlib
from pathlib import Path
from typing import Any, Self

import numpy as np

from lookup_experts.errors import DiskFullError, TableError
from lookup_experts.table.files import read_exactly
from lookup_experts.table.format import CHECKSUM, DATA_START
from lookup_experts.table.layout import RecordLayout, ShardInfo
from lookup_experts.table.shard import (
    check_header,
    encode_header,
    row_chunks,
    shard_content,
    stored_checksums,
    wrong_checksums,
)


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
        content = shard_content(layout, shard, fingerprint)
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
        for first, count in row_chunks(rows, self.layout.stride):
            records = np.empty((count, self.layout.stride), np.uint8)
            read_exactly(self._fd, records, self.layout.record_offset(first), self.path)
            stored = stored_checksums(self._fd, self.layout, self.shard, first, count, self.path)
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
            check_header(header, content, self.path)
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
        self._write_at(0, np.frombuffer(encode_header(content), np.uint8))

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
