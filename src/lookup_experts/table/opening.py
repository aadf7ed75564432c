"""Opening a table: is it whole, and does everything that it says of itself fit together?"""

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lookup_experts.errors import TableError
from lookup_experts.table.files import say_why
from lookup_experts.table.format import DATA_START
from lookup_experts.table.layout import RecordLayout, ShardInfo
from lookup_experts.table.manifest import TableManifest, read_manifest
from lookup_experts.table.shard import check_header, shard_content, stored_checksums


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

    def own_id(self, record: int) -> int:
        """The token id of a record, as it is told."""
        return record

    def open_again(self) -> "Table":
        """What is there now."""
        return open_table(self.folder)


def open_table(folder: Path | str) -> Table:
    """The table in `folder`, after checking `table.json` and size and header of every shard.

    Raises:
        TableError: something is missing, truncated, foreign, or doesn't add up; says which file.
    """
    table = Table(Path(folder), read_manifest(folder))
    for shard in table.shards:
        _check_shard(table, shard)
    return table


def reopen_table(table: Table) -> Table:
    """The same table, opened again.

    Raises:
        TableError: it isn't sound any more, or another one is there now.
    """
    found = table.open_again()
    if found != table:
        raise TableError(
            f"{table.folder}: holds another table now than when it was opened first. Load the "
            "model that belongs to it."
        )
    return found


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
        check_header(header, shard_content(table.layout, shard, table.manifest.fingerprint), path)
    if num_bytes != shard.bytes:
        problem = "truncated" if num_bytes < shard.bytes else "too long"
        raise TableError(f"{path}: {problem}, expected {shard.bytes} bytes, found {num_bytes}.")


def read_checksums(table: Table, shard: ShardInfo) -> np.ndarray:
    """The stored CRC-32 of each record of `shard`, uint32 [num_ids]."""
    path = table.path(shard)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return stored_checksums(fd, table.layout, shard, 0, shard.num_ids, path)
    finally:
        os.close(fd)


def open_shards(table: Table, flags: int, stack: ExitStack) -> list[int]:
    """A descriptor for each shard, closed by `stack`; EINVAL (no direct reads) as an `OSError`."""
    fds: list[int] = []
    for shard in table.shards:
        try:
            fds.append(os.open(table.path(shard), os.O_RDONLY | os.O_CLOEXEC | flags))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise
            raise not_opened(table.path(shard), error) from error
        stack.callback(os.close, fds[-1])
    return fds


def not_opened(path: Path, error: OSError) -> TableError:
    """The error for a shard that can't be opened."""
    return TableError(f"{path}: can't be opened: {say_why(error)}")
