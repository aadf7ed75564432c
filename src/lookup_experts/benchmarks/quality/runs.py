"""Training every system with every seed, and what came of each."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lookup_experts.benchmarks.quality.systems import System
from lookup_experts.evaluation.perplexity import perplexity
from lookup_experts.generation.folding import reparameterize
from lookup_experts.generation.loading import load
from lookup_experts.training.data import TokenShards
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.train import TrainingSummary, train

CURVE_POINTS = 12
"""Validations of a run."""
TABLE_TOKENS = 16_384
"""Held-out tokens on which a model with its table on disk is compared with its experts."""

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainedRun:
    """One system trained with one seed."""

    system: str
    seed: int
    summary: TrainingSummary | None
    """What training gave; None where there was not enough memory."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens trained on, validation loss in nats)."""
    table: dict[str, float] | None = None
    """Of MoLE: nats per token with its experts, and with its table on disk."""


def train_all(
    systems: Sequence[System],
    seeds: Sequence[int],
    base: Recipe,
    data: Path,
    tokens: int,
    out: Path,
    notify: Notify,
) -> Iterator[TrainedRun]:
    """Train what is not yet trained in `out`; every run has a folder of its own there.

    All systems with the first seed come first, so that an interrupted comparison compares.

    Raises:
        UserError: no text was held out, or a recipe, the data and a run's folder don't go
            together.
        TrainingInterrupted: on a signal; the same call goes on.
    """
    TokenShards(data, "validation")  # an error where no text was held out
    runs = [(seed, system) for seed in seeds for system in systems]
    for number, (seed, system) in enumerate(runs, 1):
        notify(f"Run {number} of {len(runs)}: {system.name}, seed {seed}")
        recipe = system.recipe(base, tokens=tokens, seed=seed, points=CURVE_POINTS)
        yield train_one(system, recipe, data, out / f"{system.folder_name}-seed{seed}", notify)


def train_one(
    system: System, recipe: Recipe, data: Path, folder: Path, notify: Notify
) -> TrainedRun:
    """Train one system, or take what is trained already."""
    seed = recipe.training.seed
    try:
        summary = train(recipe, data, folder)
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        notify(f"{system.name}: not enough memory; the others go on.")
        return TrainedRun(system.name, seed, None)
    table = table_agreement(folder, data) if system.section == "experts" else None
    return TrainedRun(system.name, seed, summary, read_curve(folder), table)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch has no class for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = str(error).lower()
    said = "not enough memory" in words or "can't allocate memory" in words
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def read_curve(folder: Path) -> list[tuple[int, float]]:
    """The validations of a run."""
    lines = map(json.loads, RunFolder(folder).history.read_text().splitlines())
    return [
        (line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]


def table_agreement(folder: Path, data: Path) -> dict[str, float]:
    """Nats per token of a trained model with its experts, and with a float32 table read from disk.

    Re-parameterising changes nothing (section 3.3 of the paper).
    """
    held_out = TokenShards(data, "validation")
    window = held_out.window(0, min(TABLE_TOKENS, held_out.num_tokens))
    token_ids = torch.from_numpy(window.astype("int64"))
    folded = folder.with_name(f"{folder.name}-table")
    if not folded.exists():
        reparameterize(folder, folded, encoding="float32")
    losses = {}
    for form, model in (("experts", load(folder)), ("table", load(folded, store="direct"))):
        losses[form] = _nats_per_token(model, token_ids)
    shutil.rmtree(folded)
    return losses


def _nats_per_token(model: Any, token_ids: torch.Tensor) -> float:
    context = model.config.get_text_config().max_position_embeddings
    return perplexity(model, token_ids, context, batch_size=8).nats_per_token
