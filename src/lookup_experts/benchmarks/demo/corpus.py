"""The demo's text: Python's standard library, which is on every machine, or the user's own."""

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.training.documents import read_documents
from lookup_experts.training.files import atomic_write
from lookup_experts.training.inputs import Input, TextFile, find_inputs
from lookup_experts.units import format_bytes

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
