"""Quality: dense, MoE and MoLE of one small shape, trained alike, over several seeds.

Systems go by name:

    dense                                 the backbone alone
    moe-10e                               top-2 of 10 routed experts on the hidden state
    mole-4e                               4 lookup experts beside the FFN
    mole-4e:size=128,z_loss=0.001         the same with keys of the recipe's section changed
    meki                                  one row per layer beside a gate
    meki:row_size=64, mole-4e:row_size=64 the same with narrower rows

Everything else is the same for all: the recipe that they are made from. Every run is trained in a
process and in a folder of its own; what is finished isn't trained again.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import yaml  # type: ignore[import-untyped]

from lookup_experts import console
from lookup_experts.benchmarks.plots import picture
from lookup_experts.benchmarks.processes import (
    ProcessFailedError,
    in_own_processes,
    lack_of_memory_told,
)
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.errors import UserError, unknown_name
from lookup_experts.evaluation.perplexity import perplexity
from lookup_experts.folders.load import load
from lookup_experts.generation.folding import reparameterize
from lookup_experts.model.forms import get_form
from lookup_experts.model.settings import ROW_FORMS
from lookup_experts.training.checkpoints import checkpoint_step, last_checkpoint
from lookup_experts.training.data import TokenShards
from lookup_experts.training.models import with_vocabulary
from lookup_experts.training.progress import format_duration
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.run_folder import RunFolder, write_text
from lookup_experts.training.sources import TrainingData
from lookup_experts.training.train import TrainingSummary, train

DEFAULT_SYSTEMS = ("dense", "moe-10e", "mole-4e")
CURVE_POINTS = 12
"""Validations of a run."""
TABLE_TOKENS = 16_384
"""Held-out tokens on which a model with its table on disk is compared with its experts."""

Notify = Callable[[str], None]


def bench_quality(
    names: Sequence[str],
    ablation: str | None,
    seeds: Sequence[int],
    base: Recipe,
    data: Path,
    tokens: int,
    work: Path,
    jobs: int,
    results: Results,
) -> None:
    """`mole bench quality`: the systems of these names, or those of an ablation of the paper, or
    the default ones; see `train_all` for the rest."""
    if names and ablation:
        raise UserError("Name systems, or an --ablation, which names its own; not both.")
    require_dense(base)
    console.quiet_transformers()
    chosen = ablation_systems(ablation, base) if ablation else names or DEFAULT_SYSTEMS
    systems = [System.parse(name) for name in chosen]
    runs = train_all(systems, seeds, base, data, tokens, work, console.say, jobs)
    results.add(*add_up(runs), say=in_words)
    results.finish(draw_curves)


def require_dense(base: Recipe) -> None:
    """Refuse a recipe whose experts those of the systems would replace without a word."""
    if base.model.experts is not None or base.model.moe is not None:
        raise UserError(
            "Systems are compared on a dense --recipe, to which each adds its experts; this one "
            "has some."
        )


# ------------------------------------------------------------------------------------ systems

_SECTIONS = {"moe": "moe", "mole": "experts"}
_UNCOUNTED = [form for form in ROW_FORMS if not get_form(form).HAS_ROUTER]
"""Forms of rows that have no number of experts."""


@dataclass(frozen=True)
class System:
    """One model to train."""

    name: str
    section: str | None
    """The section of the recipe's model that holds its experts; None for dense."""
    settings: Mapping[str, Any]
    """What stands in that section."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The system of a name; a `UserError` for what is none."""
        kind, _, changes = name.partition(":")
        if kind == "dense" and not changes:
            return cls(name, None, {})
        if kind in _UNCOUNTED:
            settings = {"form": kind, **_read_changes(name, changes)}
            return cls(name, "experts", settings)
        family, _, experts = kind.partition("-")
        if family not in _SECTIONS or not experts.endswith("e") or not experts[:-1].isdigit():
            raise UserError(
                f"No system is called {name!r}; expected dense, moe-10e, mole-4e, meki or the "
                "like, with changed keys after a colon: mole-4e:size=128, meki:row_size=64."
            )
        settings = {"num_experts": int(experts[:-1]), **_read_changes(name, changes)}
        return cls(name, _SECTIONS[family], settings)

    def recipe(self, base: Recipe, *, tokens: int, seed: int, points: int) -> Recipe:
        """The base recipe with this system's experts.

        Args:
            base: a dense recipe; its schedule is stretched to `tokens`.
            seed: decides the weights before training and the order of the data.
            points: validations, spread evenly.
        """
        values = base.to_dict()
        model, training = values["model"], values["training"]
        for section in _SECTIONS.values():
            model.pop(section, None)
        if self.section is not None:
            model[self.section] = dict(self.settings)
        training.pop("steps", None)
        steps = -(-tokens // base.training.tokens_per_step)
        every = max(1, steps // points)
        training |= {"tokens": tokens, "seed": seed}
        training |= {"validate_every": every, "checkpoint_every": every, "keep_checkpoints": 1}
        return Recipe.from_dict(values)

    @property
    def folder_name(self) -> str:
        """The name as a folder's, without the characters that folders don't like."""
        return self.name.replace(":", "+").replace(",", "+")


def _read_changes(name: str, text: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{name!r}: {word!r} should be key=value.")
        changes[key] = yaml.safe_load(value)
    return changes


def ablation_systems(name: str, base: Recipe) -> tuple[str, ...]:
    """The systems of one of the paper's ablations (section 4.3).

    Args:
        name: `losses`, auxiliary losses on MoLE; `size`, the experts' hidden size D_r = d, 4d,
            16d; `number`, N = 2 to 32; `path`, from MoE to MoLE, one change at a time.
        base: the recipe, for its sizes.
    """
    width, ffn_size = base.model.hidden_size, base.model.ffn_size
    sets = {
        "losses": (
            "mole-4e",
            "mole-4e:load_balance_loss=0.01",
            "mole-4e:load_balance_loss=0.01,z_loss=0.001",
        ),
        "size": tuple(f"mole-4e:size={factor * width}" for factor in (1, 4, 16)),
        "number": tuple(f"mole-{count}e" for count in (2, 4, 8, 16, 32)),
        "path": (
            "moe-10e",
            "moe-10e:experts_per_token=10,load_balance_loss=0,z_loss=0",
            f"moe-4e:experts_per_token=4,size={ffn_size},shared_size={ffn_size},"
            "load_balance_loss=0,z_loss=0",
            "mole-4e",
        ),
    }
    if name not in sets:
        raise unknown_name("ablation", name, sets)
    return sets[name]


# --------------------------------------------------------------------------------------- runs


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
    """With its vocabulary settled."""
    folder: Path

    def share_left(self) -> float:
        """How much of its steps is still to be taken, from 1 to 0."""
        run = RunFolder(self.folder)
        if run.summary.exists():
            return 0.0
        checkpoint = last_checkpoint(run.checkpoints)
        done = checkpoint_step(checkpoint) if checkpoint else 0
        return 1 - done / self.recipe.training.num_steps

    def is_finished(self, data: TrainingData) -> bool:
        """Whether there is nothing left to do; a `UserError` where the folder holds another run."""
        run = RunFolder(self.folder)
        if not run.summary.exists() or (self.has_table and not self.agreement.exists()):
            return False
        run.check(self.recipe, data.identity())
        return True

    @property
    def has_table(self) -> bool:
        return self.system.section == "experts"

    @property
    def agreement(self) -> Path:
        """The file of what `table_agreement` gave."""
        return self.folder / "table-agreement.json"

    def trained(self, failure: str | None) -> TrainedRun:
        """What is in its folder.

        Args:
            failure: of its process.
        """
        seed, run = self.recipe.training.seed, RunFolder(self.folder)
        if not run.summary.exists():
            return TrainedRun(self.system.name, seed, None, failure=failure)
        if failure is not None:
            failure = f"the check of its table: {failure}"
        summary, table = TrainingSummary.load(run.summary), None
        if self.agreement.exists():
            table = json.loads(self.agreement.read_text())
        curve = read_curve(self.folder)
        return TrainedRun(self.system.name, seed, summary, curve, table, failure)


def train_all(
    systems: Sequence[System],
    seeds: Sequence[int],
    base: Recipe,
    data: Path,
    tokens: int,
    out: Path,
    notify: Notify,
    jobs: int = 1,
) -> list[TrainedRun]:
    """Train what is not yet trained in `out`; every run has a folder of its own there.

    All systems with the first seed come first, so that an interrupted comparison compares.

    Args:
        jobs: runs at the same time, each in a process that may be killed.

    Raises:
        UserError: no text was held out, or a recipe, the data and a run's folder don't go
            together.
        TrainingInterrupted: on a signal; the same call goes on.
        KeyboardInterrupt: on a signal outside of the training; likewise.
    """
    TokenShards(data, "validation")  # an error where no text was held out
    source = TrainingData([data])
    plans = [
        _Plan(
            system,
            with_vocabulary(
                system.recipe(base, tokens=tokens, seed=seed, points=CURVE_POINTS),
                source.vocabulary.vocab_size,
            ),
            out / f"{system.folder_name}-seed{seed}",
        )
        for seed in seeds
        for system in systems
    ]
    left = [plan for plan in plans if not plan.is_finished(source)]
    pace, begun = Pace(), {}
    failures: dict[Path, str] = {}

    def begin(number: int) -> None:
        plan, name = left[number], left[number].system.name
        seconds = pace.seconds_left([(p.system.name, p.share_left()) for p in left])
        notify(
            f"Run {plans.index(plan) + 1} of {len(plans)}: {name}, "
            f"seed {plan.recipe.training.seed}"
            + ("" if seconds is None else f"  ETA of all runs {format_duration(seconds / jobs)}")
        )
        begun[number] = plan.share_left(), time.perf_counter()

    # Several bars in one place tell nothing.
    calls = [(plan, data, jobs == 1) for plan in left]
    for number, outcome in in_own_processes(_train_and_compare, calls, jobs, begin):
        plan, (share, begun_at) = left[number], begun[number]
        pace.add(plan.system.name, share, time.perf_counter() - begun_at)
        if isinstance(outcome, ProcessFailedError):
            failures[plan.folder] = str(outcome)
            _leave_progress_bar()
            run = plan.trained(str(outcome))
            notify(f"{run.system}, seed {run.seed}: {run.failure}. The others go on.")
        elif jobs > 1:
            notify(in_words(_add_up_system([plan.trained(None)])))
    return [plan.trained(failures.get(plan.folder)) for plan in plans]


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


def _leave_progress_bar() -> None:
    """Give the terminal its cursor and a new line, which the bar of a killed process keeps."""
    from rich.console import Console

    terminal = Console(stderr=True)
    if terminal.is_terminal:
        terminal.show_cursor()
        terminal.print()


def _train_and_compare(plan: _Plan, data: Path, progress: bool) -> None:
    """A run in its process; where it has lookup experts, their agreement with their table."""
    console.quiet_transformers()
    with lack_of_memory_told():
        train(plan.recipe, data, plan.folder, progress=progress)
        if plan.has_table and not plan.agreement.exists():
            write_text(plan.agreement, json.dumps(table_agreement(plan.folder, data)) + "\n")


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
        context = model.config.get_text_config().max_position_embeddings
        losses[form] = perplexity(model, token_ids, context, batch_size=8).nats_per_token
    shutil.rmtree(folded)
    return losses


# ------------------------------------------------------------------------------------ results


def add_up(runs: Sequence[TrainedRun]) -> list[Result]:
    """One object per system, in the order of the runs.

    Losses are nats per token on held-out text; `validation_loss_std` is the sample's standard
    deviation over the seeds, and absent for a single one. `seeds` are those that were trained, or
    all where none was; `failures` tells what failed, `failed` why nothing was trained.
    """
    names = list(dict.fromkeys(run.system for run in runs))
    return [_add_up_system([run for run in runs if run.system == name]) for name in names]


def _add_up_system(runs: Sequence[TrainedRun]) -> Result:
    trained = [run for run in runs if run.summary is not None]
    counted = trained or runs
    result: Result = {"system": runs[0].system, "seeds": [run.seed for run in counted]}
    failures = [(run.seed, run.failure) for run in runs if run.failure is not None]
    if failures:
        result["failures"] = [{"seed": seed, "why": why} for seed, why in failures]
    if not trained:
        return {**result, "failed": "; ".join(dict.fromkeys(why for _, why in failures))}
    summaries = [run.summary for run in trained if run.summary is not None]
    losses = [s.validation_loss for s in summaries if s.validation_loss is not None]
    points = zip(*(run.curve for run in trained), strict=True)
    result |= {
        "tokens": summaries[0].tokens,
        "validation_loss": statistics.mean(losses),
        "validation_losses": losses,
        # Medians: a run that was interrupted counts the pause.
        "training_seconds": statistics.median(s.seconds for s in summaries),
        "tokens_per_second": statistics.median(s.tokens_per_second for s in summaries),
        "parameters": summaries[0].to_dict()["parameters"],
        # Tokens and loss, the mean over the seeds.
        "curve": [[point[0][0], statistics.mean(loss for _, loss in point)] for point in points],
    }
    if len(losses) > 1:
        result["validation_loss_std"] = statistics.stdev(losses)
    tables = [run.table for run in trained if run.table is not None]
    if tables:
        result["table_difference"] = max(abs(found["table"] - found["experts"]) for found in tables)
    return result


def in_words(result: Result) -> str:
    """One system in one line."""
    if "failed" in result:
        return f"  {result['system']}: {result['failed']}"
    spread = f" ± {result['validation_loss_std']:.4f}" if "validation_loss_std" in result else ""
    seeds = len(result["seeds"])
    return (
        f"  {result['system']}: validation loss {result['validation_loss']:.4f}{spread} "
        f"({seeds} seed{'s' if seeds > 1 else ''}, {result['tokens']:,} tokens, "
        f"{result['training_seconds']:,.0f} s each)"
        + "".join(f"; seed {f['seed']}: {f['why']}" for f in result.get("failures", []))
    )


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """Validation loss against tokens, a line per system."""
    with picture(path, 6, 4) as axes:
        for result in results:
            if "failed" in result:
                continue
            tokens, losses = zip(*result["curve"], strict=True)
            axes.plot([count / 1e6 for count in tokens], losses, marker="o", label=result["system"])
        axes.set_xlabel("million tokens trained on")
        axes.set_ylabel("validation loss, nats per token")
        axes.legend()
