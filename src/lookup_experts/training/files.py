"""Files that are either whole or not there; folders that one process works on."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lookup_experts.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it gets its name when the block ends, and is removed if the block fails.

    The temporary name holds the process id, so that a process that outlives a killed parent for a
    moment can't write into the file of its successor.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Create a folder and keep other processes from working on it.

    The lock is the system's, so that it goes with the process, however that ends.

    Args:
        folder: what the user named with --out.
        doing: what this process does there, for the message to another: "training".

    Raises:
        UserError: the folder can't be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {folder} is a file; expected a folder.") from None
    except OSError as error:
        raise UserError(f"--out {folder} can't be created: {error.strerror}.") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder, doing)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, doing: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another process is {doing} in {folder}. Wait for it, or choose another --out."
        ) from None
