"""Files, read in full or not at all, and written likewise."""

import errno
import os
import threading
from pathlib import Path

import numpy as np

from lookup_experts.errors import TableError

UNFINISHED = ".unfinished-"
"""How the name of a file begins that `write_whole` is writing; a killed process leaves one."""


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


def say_why(error: OSError) -> str:
    """The error in words, and what to do where that is known."""
    hint = " Raise the limit with ulimit -n." if error.errno == errno.EMFILE else ""
    return f"{error.strerror}.{hint}"
