"""What `mole prepare` was pointed at: text files, found in folders too, and hub data sets.

Of a folder the files with a known ending are taken. Where some of them hold rows, the folder is a
data set, and the README.md and .py files in it are its card and scripts. What is passed over, and
why, is told.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError

PLAIN_SUFFIXES = (".txt", ".md", ".py", ".txt.gz", ".txt.zst")
"""Of files that are one document each."""
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
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

    @property
    def has_rows(self) -> bool:
        """Whether a row is a document, not the whole file."""
        return suffix_of(self.path) in ROW_SUFFIXES


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
    has_rows = True


Input = TextFile | HubDataset


@dataclass(frozen=True)
class PassedOver:
    """A file or folder that was found and not taken."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """Everything behind the names that were given."""

    inputs: list[Input]
    passed_over: list[PassedOver]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: what each input was taken as, and what was not taken and why."""
        return {
            "inputs": [{**i.for_manifest(), "taken_as": taken_as(i)} for i in self.inputs],
            "passed_over": [{"name": p.name, "reason": p.reason} for p in self.passed_over],
        }


def taken_as(source: Input) -> str:
    return "a document per row" if source.has_rows else "one document"


def find_inputs(names: Sequence[str], out: Path | None = None) -> list[Input]:
    """The inputs alone of `survey`."""
    return survey(names, out).inputs


def survey(names: Sequence[str], out: Path | None = None) -> Found:
    """Every input behind the names, in their order; folders are walked in sorted order.

    Args:
        names: files, folders, and data sets as `name` or `name:config`.
        out: the folder to be written, if any, which must not lie in a folder that is read.
    """
    parts = [_find(name, out) for name in names]
    inputs = [source for part in parts for source in part.inputs]
    seen: set[Any] = set()
    for found in inputs:
        key = found.path.resolve() if isinstance(found, TextFile) else (found.path, found.config)
        if key in seen:
            raise UserError(f"{found.name} is given twice. Name every input once.")
        seen.add(key)
    return Found(inputs, [passed for part in parts for passed in part.passed_over])


def suffix_of(path: Path) -> str | None:
    """The known ending of a file's name, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _find(name: str, out: Path | None) -> Found:
    path = Path(name).expanduser()
    if path.is_dir():
        return _walk(path, out)
    if path.exists():
        if suffix_of(path) is None:
            raise UserError(
                f"{name} has an unknown file type. Known endings: {', '.join(SUFFIXES)}."
            )
        return Found([_text_file(path)], [])
    match = _HUB_NAME.fullmatch(name)
    if match is None or suffix_of(path) is not None:
        raise UserError(f"{name} not found: there is no such file or folder.")
    return Found([_hub_dataset(match["name"], match["config"])], [])


def _walk(folder: Path, out: Path | None) -> Found:
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--out {out} lies in {folder}, which is read. Choose a folder outside of it."
        )
    paths: list[Path] = []
    passed_over: list[PassedOver] = []
    for parent, folders, files in os.walk(folder):
        for names, reason_of in ((folders, _folder_refusal), (files, _file_refusal)):
            names.sort()
            for path in (Path(parent, name) for name in names):
                if reason := reason_of(path):
                    passed_over.append(PassedOver(str(path), reason))
                elif names is files:
                    paths.append(path)
        folders[:] = [name for name in folders if not _folder_refusal(Path(parent, name))]
    is_data_set = any(suffix_of(path) in ROW_SUFFIXES for path in paths)
    reasons = [_BESIDE_ROWS.get(_kind(path)) if is_data_set else None for path in paths]
    passed_over += [
        PassedOver(str(path), reason)
        for path, reason in zip(paths, reasons, strict=True)
        if reason is not None
    ]
    taken = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    if not taken:
        raise UserError(
            f"The folder {folder} has no text in it. Known endings: {', '.join(SUFFIXES)}."
        )
    return Found([_text_file(path) for path in taken], passed_over)


_BESIDE_ROWS = {
    "README.md": "the card of a data set, beside its rows; name the file to take it",
    ".py": "a script of a data set, beside its rows; name the file to take it",
}


def _kind(path: Path) -> str:
    return "README.md" if path.name.lower() == "readme.md" else path.suffix.lower()


def _folder_refusal(path: Path) -> str | None:
    """Why a folder in a folder is not read, or None."""
    if path.name.startswith("."):
        return "hidden"
    return "a link to a folder" if path.is_symlink() else None


def _file_refusal(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if suffix_of(path) is None:
        return "unknown ending"
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "no regular file"
    return None


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
