"""Which stages of a demo are finished, and from what: `stages.json` in its folder.

A stage is done again if anything it depends on was changed: its own inputs, or a stage that it
builds on. What was begun from the same inputs is left in place, so that a stage that can go on
where it was interrupted does.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lookup_experts import __version__
from lookup_experts.errors import UserError
from lookup_experts.training.files import atomic_write

JOURNAL_NAME = "stages.json"

Result = dict[str, Any]
"""What came out of a stage, as plain JSON values."""


@dataclass(frozen=True)
class Stage:
    """One step of the demo."""

    name: str
    why: str
    """One line: what happens, and what for."""
    work: Callable[[Mapping[str, Result]], Result]
    """Does it, given the results of all stages before; called again after an interruption."""
    tell: Callable[[Result], str]
    """What came out, in one line."""
    inputs: Any = None
    """What it depends on beside other stages, as plain JSON values."""
    needs: tuple[str, ...] = ()
    """The stages that it builds on."""
    outputs: tuple[str, ...] = ()
    """The files and folders that it makes."""
    leftovers: tuple[str, ...] = ()
    """Those that may be there while it isn't finished."""


@dataclass(frozen=True)
class _Entry:
    """What the journal says of a stage: the digest of everything that it depends on, and what came
    out; None until it is finished."""

    digest: str
    result: Result | None = None


class Journal:
    """The entries of all stages that were begun in a folder.

    Args:
        folder: of the demo; empty, or one of an earlier demo.

    Raises:
        UserError: the folder holds something else, or can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL_NAME
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--out {folder} can't be written to; choose another folder.")
        self._entries = self._load()
        for leftover in folder.glob("*.tmp"):
            _remove(leftover)

    def _load(self) -> dict[str, _Entry]:
        if not self._path.exists():
            self._refuse_foreign_files()
            return {}
        try:
            entries = json.loads(self._path.read_bytes())
            return {name: _Entry(**entry) for name, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path} can't be read: {error}. Delete {self._folder}, or choose another "
                "--out."
            ) from None

    def _refuse_foreign_files(self) -> None:
        foreign = sorted(path.name for path in self._folder.iterdir() if path.suffix != ".tmp")
        if foreign:
            raise UserError(
                f"{self._folder} is not empty and holds no demo (found {foreign[0]}). "
                "Choose another --out, or an empty folder."
            )

    def result(self, stage: Stage) -> Result | None:
        """What came out of a stage, if it is finished and nothing it depends on was changed."""
        entry = self._entries.get(stage.name)
        if entry is None or entry.digest != self._digest(stage):
            return None
        if not all((self._folder / name).exists() for name in stage.outputs):
            return None
        return entry.result

    def begin(self, stage: Stage) -> None:
        """Note that a stage is under way; remove what it made from other inputs."""
        digest = self._digest(stage)
        before = self._entries.pop(stage.name, None)
        # Saved before anything is removed: half of an output must not count as finished.
        self._save()
        if before is None or before.digest != digest:
            for name in stage.outputs + stage.leftovers:
                _remove(self._folder / name)
        self._entries[stage.name] = _Entry(digest)
        self._save()

    def finish(self, stage: Stage, result: Result) -> None:
        """Note what came out of a stage."""
        self._entries[stage.name] = _Entry(self._digest(stage), result)
        self._save()

    def _digest(self, stage: Stage) -> str:
        builds_on = [self._entries[name].digest for name in stage.needs]
        content = json.dumps([__version__, stage.inputs, builds_on], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _save(self) -> None:
        entries = {name: asdict(entry) for name, entry in self._entries.items()}
        with atomic_write(self._path) as file:
            file.write((json.dumps(entries, indent=1) + "\n").encode())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
