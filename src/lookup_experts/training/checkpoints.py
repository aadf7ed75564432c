"""Checkpoints on disk: whole or not there.

A checkpoint is a folder with

    state/                   trained weights and optimizer, as torch.distributed.checkpoint writes
                             them: each process its part, so nothing is gathered; any number of
                             processes, with whole copies of the model or with shards, can go on
    scheduler.pt, rng_state*.pth, trainer_state.json   as transformers' Trainer writes them
    data.json                where streamed text was, see `streams.py`

It is written under `unfinished/` and renamed when all of it has reached the disk, so a folder that
is called `checkpoint-STEP` is complete.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

UNFINISHED = "unfinished"
STATE = "state"
DATA_POSITION = "data.json"
# What isn't trained comes from where the model came from.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
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


def save_state(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a model's trained weights and its optimizer's state; all processes take part."""
    # A forward pass without a backward, a validation, leaves what is outside of the blocks whole.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    state = {
        "model": _trained_weights(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_TRAINED),
    }
    try:
        with _quiet_alone() as alone:
            distributed_checkpoint.save(state, checkpoint_id=checkpoint / STATE, no_dist=alone)
    except CheckpointException as error:
        # Which is no `Exception`. What happened in one of the processes, a full disk say, is.
        happened, _ = next(iter(error.failures.values()))
        raise happened from error


def write_data_position(checkpoint: Path, position: dict[str, Any]) -> None:
    """Note where streamed text was; nothing where there is none."""
    (checkpoint / DATA_POSITION).write_text(json.dumps(position))


def read_data_position(checkpoint: Path) -> dict[str, Any]:
    position: dict[str, Any] = json.loads((checkpoint / DATA_POSITION).read_bytes())
    return position


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into a model, whichever part of it this process has."""
    _load(checkpoint, {"model": _trained_weights(model)})


def _trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, themselves: what is read into them is in the model.

    Not torch's `get_model_state_dict`, which stumbles over what quantised layers keep beside them.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same for the state of its optimizer."""
    state: dict[str, Any] = {
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_TRAINED)
    }
    _load(checkpoint, state)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_TRAINED)


def _load(checkpoint: Path, state: dict[str, Any]) -> None:
    """Read into the tensors of a state, in place."""
    with _quiet_alone() as alone:
        distributed_checkpoint.load(state, checkpoint_id=checkpoint / STATE, no_dist=alone)


@contextmanager
def _quiet_alone() -> Iterator[bool]:
    """Whether there are no other processes to write or read with; torch warns of it every time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not (torch.distributed.is_available() and torch.distributed.is_initialized())
