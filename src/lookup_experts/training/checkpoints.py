"""Checkpoints on disk: whole or not there.

A checkpoint is a folder as transformers' Trainer writes it: weights, optimizer, schedule, random
state. It is written under `unfinished/` and renamed when all of it has reached the disk, so a
folder that is called `checkpoint-STEP` is complete.
"""

import os
import re
import shutil
from pathlib import Path

UNFINISHED = "unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps that were done when it was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted(found, key=checkpoint_step)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint, if there is one."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def publish_checkpoint(folder: Path, step: int, keep: int) -> None:
    """Give the checkpoint that was written under `unfinished/` its name; remove the oldest ones."""
    name = f"checkpoint-{step}"
    written = folder / UNFINISHED / name
    _flush(written)
    written.rename(folder / name)
    _flush_entry(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove what was being written or removed, by this run or by one that was killed."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Rename first: a checkpoint that is half removed must not look like one."""
    doomed = checkpoint.parent / UNFINISHED / f"removed-{checkpoint.name}"
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    """Wait until everything in a folder is on the disk, not only in memory."""
    for path in folder.rglob("*"):
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
