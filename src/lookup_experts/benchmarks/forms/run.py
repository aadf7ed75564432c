"""The study, from the command's arguments to its report.

What a point gave is a file of its own as soon as its group is finished, and nothing that has one is
trained again.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lookup_experts import console
from lookup_experts.benchmarks.forms.draw import draw
from lookup_experts.benchmarks.forms.plan import Group, Point, Study
from lookup_experts.benchmarks.forms.worker import Place, Workers, workers
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.errors import UserError, unknown_name
from lookup_experts.training.data import TokenShards
from lookup_experts.training.models import with_vocabulary
from lookup_experts.training.progress import format_duration
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.sources import TrainingData

DEVICES = ("cpu", "cuda")


def bench_forms(
    base: Recipe,
    data: Path,
    tokens: int,
    seeds: tuple[int, ...],
    work: Path,
    device: str,
    jobs: int,
    side_by_side: int,
    graphs: bool | None,
    results: Results,
) -> None:
    """`mole bench quality --forms`.

    Args:
        base: a dense recipe, for sizes and schedule.
        data: a folder of `mole prepare` with held-out text.
        tokens: to train on in all stages but the last.
        seeds: of the main stages.
        work: where the points' files go.
        device: `cpu` or `cuda`.
        jobs: processes that train.
        side_by_side: points that each trains at the same time.
        graphs: capture steps as CUDA graphs; None: on a GPU.

    Raises:
        UserError: something doesn't go together, or a process ended.
        KeyboardInterrupt: on a signal; the report has what there was.
    """
    if base.model.experts is not None or base.model.moe is not None:
        raise UserError("--forms compares forms on a dense --recipe; this one has experts.")
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU that it can use; leave it out.")
    if graphs and device == "cpu":
        raise UserError("--graphs captures CUDA graphs; give --device cuda, or leave it out.")
    console.quiet_transformers()
    TokenShards(data, "validation")  # an error where no text was held out
    base = with_vocabulary(base, TrainingData([data]).vocabulary.vocab_size)
    base = replace(base, training=replace(base.training, tokens=tokens, steps=None))
    study = Study(base, tokens, seeds)
    captures = device == "cuda" if graphs is None else graphs
    place = Place(base, data, device, captures, max(1, torch.get_num_threads() // jobs))
    folder = PointFolder(work, base)
    try:
        with _interruptible(), workers(jobs, place) as started:
            _train_all(study, folder, started, side_by_side, results)
    finally:
        if results.found:
            results.finish(draw)


class PointFolder:
    """The files of points; those of another recipe are refused.

    Args:
        folder: is made where it is missing.
        base: the recipe of all.
    """

    def __init__(self, folder: Path, base: Recipe) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.yaml"
        # Tokens and seeds are in the points' names.
        text = replace(base, training=replace(base.training, tokens=1)).to_yaml()
        if not recipe.exists():
            _write(recipe, text)
        elif recipe.read_text() != text:
            raise UserError(
                f"{folder} has points of another recipe ({recipe}); give another --work."
            )

    def load(self, point: Point) -> Result | None:
        """What a point gave; None: it is still to be trained."""
        path = self._folder / point.file_name
        if not path.exists():
            return None
        result: Result = json.loads(path.read_text())
        return result

    def save(self, point: Point, result: Result) -> None:
        """Keep what a point gave."""
        _write(self._folder / point.file_name, json.dumps(result, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _train_all(
    study: Study, folder: PointFolder, started: Workers, side_by_side: int, results: Results
) -> None:
    found: dict[Point, Result] = {}
    pace = Pace()

    def take(point: Point, result: Result) -> None:
        found[point] = result
        results.add(result, say=lambda shown: f"{in_words(shown)}{pace.in_words()}")

    while True:
        under_way = {point for group in started.in_work for point in group}
        groups, waiting = study.groups(found, under_way, side_by_side)
        before = len(found)
        for group in groups:
            for point in group:
                kept = folder.load(point)
                if kept is not None:
                    take(point, kept)
        if len(found) > before:  # which may tell what else there is to do
            continue
        left = [*under_way, *(point for group in groups for point in group)]
        pace.left = waiting + sum(point.tokens for point in left)
        for group in groups[: started.num_idle]:
            started.begin(group)
        if not started.in_work:
            return
        for group, answer in started.finished():
            if isinstance(answer, str):
                raise _no_memory(group, answer)
            for point, result in zip(group, answer, strict=True):
                pace.add(point.tokens)
                folder.save(point, result)
                take(point, result)


def _no_memory(group: Group, why: str) -> UserError:
    return UserError(
        f"{len(group)} models side by side, the first {group[0].system.name}: {why}. Run the "
        "command again with fewer --jobs: it goes on."
    )


class Pace:
    """How fast points are trained, all processes together."""

    def __init__(self) -> None:
        self._begun_at = time.perf_counter()
        self._done = 0
        self.left = 0
        """Tokens, when the last group began."""

    def add(self, tokens: int) -> None:
        """So many were trained on."""
        self._done += tokens
        self.left -= tokens

    def in_words(self) -> str:
        """Nothing before anything was trained."""
        if not self._done:
            return ""
        rate = self._done / (time.perf_counter() - self._begun_at)
        return f"  {rate:,.0f} tokens/s, ETA {format_duration(max(0, self.left) / rate)}"


def in_words(result: Result) -> str:
    """One point in one line."""
    what = (
        f"  {result['system']}, seed {result['seed']}, rate {result['learning_rate']:g}, "
        f"{result['tokens'] / 1e6:g} M tokens"
    )
    if "failed" in result:
        return f"{what}: {result['failed']}"
    return f"{what}: {result['validation_loss']:.4f}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM interrupt, also where the process was started without."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[Any, Any] = {s: signal.signal(s, signal.default_int_handler) for s in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
