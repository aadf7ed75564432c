"""Training every system with every seed, each in its process, and what came of each."""

import errno
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lookup_experts import console
from lookup_experts.benchmarks.processes import ProcessFailedError, in_own_process
from lookup_experts.benchmarks.quality.systems import System
from lookup_experts.evaluation.perplexity import perplexity
from lookup_experts.folders.load import load
from lookup_experts.generation.folding import reparameterize
from lookup_experts.training.checkpoints import checkpoint_step, last_checkpoint
from lookup_experts.training.data import TokenShards
from lookup_experts.training.progress import format_duration
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.train import TrainingSummary, train

CURVE_POINTS = 12
"""Validations of a run."""
TABLE_TOKENS = 16_384
"""Held-out tokens on which a model with its table on disk is compared with its experts."""

OUT_OF_MEMORY = "out of memory"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainedRun:
    """One system trained with one seed."""

    system: str
    seed: int
    summary: TrainingSummary | None
    """What training gave; None where it failed."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens trained on, validation loss in nats)."""
    table: dict[str, float] | None = None
    """Of MoLE: nats per token with its experts, and with its table on disk."""
    failure: str | None = None
    """Why there is no summary, or else no comparison with its table."""


@dataclass(frozen=True)
class _Plan:
    """A run that is to be there at the end."""

    system: System
    recipe: Recipe
    folder: Path

    def share_left(self) -> float:
        """How much of its steps is still to be taken, from 1 to 0."""
        run = RunFolder(self.folder)
        if run.summary.exists():
            return 0.0
        checkpoint = last_checkpoint(run.checkpoints)
        done = checkpoint_step(checkpoint) if checkpoint else 0
        return 1 - done / self.recipe.training.num_steps


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
        KeyboardInterrupt: on a signal outside of the training; likewise.
    """
    TokenShards(data, "validation")  # an error where no text was held out
    plans = [
        _Plan(
            system,
            system.recipe(base, tokens=tokens, seed=seed, points=CURVE_POINTS),
            out / f"{system.folder_name}-seed{seed}",
        )
        for seed in seeds
        for system in systems
    ]
    pace = Pace()
    for number, plan in enumerate(plans, 1):
        name, share = plan.system.name, plan.share_left()
        left = pace.seconds_left([(p.system.name, p.share_left()) for p in plans[number - 1 :]])
        notify(
            f"Run {number} of {len(plans)}: {name}, seed {plan.recipe.training.seed}"
            + ("" if left is None else f"  ETA of all runs {format_duration(left)}")
        )
        started_at = time.perf_counter()
        run = train_one(plan.system, plan.recipe, data, plan.folder, notify)
        pace.add(name, share, time.perf_counter() - started_at)
        yield run


class Pace:
    """How long runs take, by those that are done."""

    def __init__(self) -> None:
        self._done: dict[str, list[float]] = {}
        """Seconds of whole runs, by system."""

    def add(self, system: str, share: float, seconds: float) -> None:
        """A share of a run's steps took so long. Nothing is learned from one without any."""
        if share > 0:
            self._done.setdefault(system, []).append(seconds / share)

    def seconds_left(self, runs: Sequence[tuple[str, float]]) -> float | None:
        """For runs as (system, share left), by their system's or else by all; None at first."""
        everything = [seconds for done in self._done.values() for seconds in done]
        if not everything:
            return None
        return sum(
            share * statistics.mean(self._done.get(system, everything)) for system, share in runs
        )


def train_one(
    system: System, recipe: Recipe, data: Path, folder: Path, notify: Notify
) -> TrainedRun:
    """Train one system, or take what is trained already; in a process that may be killed."""
    table, failure = None, None
    try:
        table = in_own_process(_train_and_compare, system, recipe, data, folder)
    except ProcessFailedError as error:
        failure = str(error)
        _leave_progress_bar()
    seed, run = recipe.training.seed, RunFolder(folder)
    trained = run.summary.exists()
    if failure is not None:
        failure = f"the check of its table: {failure}" if trained else failure
        notify(f"{system.name}, seed {seed}: {failure}. The others go on.")
    if not trained:
        return TrainedRun(system.name, seed, None, failure=failure)
    summary = TrainingSummary.load(run.summary)
    return TrainedRun(system.name, seed, summary, read_curve(folder), table, failure)


def _leave_progress_bar() -> None:
    """Give the terminal its cursor and a new line, which the bar of a killed process keeps."""
    from rich.console import Console

    terminal = Console(stderr=True)
    if terminal.is_terminal:
        terminal.show_cursor()
        terminal.print()


def _train_and_compare(
    system: System, recipe: Recipe, data: Path, folder: Path
) -> dict[str, float] | None:
    """A run in its process; the agreement of MoLE with its table."""
    console.quiet_transformers()
    try:
        train(recipe, data, folder)
        return table_agreement(folder, data) if system.section == "experts" else None
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ProcessFailedError(OUT_OF_MEMORY) from error


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
