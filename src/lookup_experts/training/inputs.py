"""What `mole prepare` was pointed at: text files, found in folders too, and hub data sets."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError

PLAIN_SUFFIXES = (".txt", ".md", ".py", ".txt.gz")
"""Of files that are one document each."""
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Of files with one document per row."""
SUFFIXES = PLAIN_SUFFIXES + ROW_SUFFIXES

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class TextFile:
    """A file, and what tells whether it was changed since."""

    path: Path
    num_bytes: int
    modified_ns: int

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "num_bytes": self.num_bytes, "modified_ns": self.modified_ns}

    def for_manifest(self) -> dict[str, Any]:
        """Without the date, so that the same text gives the same manifest."""
        return {"name": self.name, "num_bytes": self.num_bytes}


@dataclass(frozen=True)
class HubDataset:
    """The train split of a data set on the Hugging Face hub, at one revision."""

    path: str
    config: str | None
    revision: str

    @property
    def name(self) -> str:
        return self.path if self.config is None else f"{self.path}:{self.config}"

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "revision": self.revision}

    for_manifest = identity


Input = TextFile | HubDataset


def find_inputs(names: Sequence[str], out: Path | None = None) -> list[Input]:
    """Every input behind the names, in their order; folders are walked in sorted order.

    Of a folder the files with a known ending are taken, hidden ones are not.

    Args:
        names: files, folders, and data sets as `name` or `name:config`.
        out: the folder to be written, if any, which must not lie in a folder that is read.
    """
    inputs = [found for name in names for found in _find(name, out)]
    seen: set[Any] = set()
    for found in inputs:
        key = found.path.resolve() if isinstance(found, TextFile) else (found.path, found.config)
        if key in seen:
            raise UserError(f"{found.name} is given twice. Name every input once.")
        seen.add(key)
    return inputs


def suffix_of(path: Path) -> str | None:
    """The known ending of a file's name, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _find(name: str, out: Path | None) -> list[Input]:
    path = Path(name).expanduser()
    if path.is_dir():
        return list(_walk(path, out))
    if path.exists():
        if suffix_of(path) is None:
            raise UserError(
                f"{name} has an unknown file type. Known endings: {', '.join(SUFFIXES)}."
            )
        return [_text_file(path)]
    match = _HUB_NAME.fullmatch(name)
    if match is None or suffix_of(path) is not None:
        raise UserError(f"{name} not found: there is no such file or folder.")
    return [_hub_dataset(match["name"], match["config"])]


def _walk(folder: Path, out: Path | None) -> Iterator[TextFile]:
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--out {out} lies in {folder}, which is read. Choose a folder outside of it."
        )
    found = False
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(name for name in files if not name.startswith(".")):
            if suffix_of(Path(file)) is not None:
                found = True
                yield _text_file(Path(parent, file))
    if not found:
        raise UserError(
            f"The folder {folder} has no text in it. Known endings: {', '.join(SUFFIXES)}."
        )


def _text_file(path: Path) -> TextFile:
    status = path.stat()
    return TextFile(path, status.st_size, status.st_mtime_ns)


def _hub_dataset(name: str, config: str | None) -> HubDataset:
    """The data set at its present revision, which a resumed run must find again."""
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(name).sha
    # The client lets errors of the connection through, whose class depends on its version.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{name} is no file or folder here, and no data set that can be reached on the "
            f"Hugging Face hub. Reason: {reason}"
        ) from error
    return HubDataset(name, config, str(revision))
