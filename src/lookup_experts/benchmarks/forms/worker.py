"""Processes that train groups of points, one group at a time each."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lookup_experts.benchmarks.forms.measure import measure
from lookup_experts.benchmarks.forms.plan import Group
from lookup_experts.benchmarks.forms.training import (
    Text,
    Trainee,
    evaluate_every_id,
    train_side_by_side,
)
from lookup_experts.benchmarks.processes import (
    ProcessFailedError,
    ending,
    lack_of_memory_told,
    signals_blocked,
)
from lookup_experts.benchmarks.results import Result
from lookup_experts.errors import UserError
from lookup_experts.evaluation.recall import word_ids
from lookup_experts.training.prepare import TOKENIZER_NAME
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Place:
    """Where and on what groups are trained."""

    base: Recipe
    """With its vocabulary settled."""
    data: Path
    """A folder of `mole prepare`."""
    device: str
    graphs: bool
    """Whether steps are captured; on a GPU alone."""
    threads: int
    """Of each process."""


class Workers:
    """So many processes, which end with this one.

    Args:
        count: of processes.
        place: what they train on.
    """

    def __init__(self, count: int, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        self._busy: dict[Connection, Group] = {}
        self._idle: list[Connection] = []
        self._processes: dict[Connection, Any] = {}
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(target=_serve, args=(theirs, place), daemon=True)
            with signals_blocked():
                process.start()
            theirs.close()
            self._processes[ours] = process
            self._idle.append(ours)

    @property
    def num_idle(self) -> int:
        """How many groups could begin now."""
        return len(self._idle)

    @property
    def in_work(self) -> list[Group]:
        """The groups that are being trained."""
        return list(self._busy.values())

    def begin(self, group: Group) -> None:
        """Have an idle process train a group."""
        pipe = self._idle.pop()
        pipe.send(group)
        self._busy[pipe] = group

    def finished(self) -> Iterator[tuple[Group, list[Result] | str]]:
        """Wait for one group or more; gives each with its results, or why it has none.

        Raises:
            UserError: a process has ended.
        """
        for pipe in wait(list(self._busy)):
            assert isinstance(pipe, Connection)
            answer = self._answer(pipe)
            group = self._busy.pop(pipe)
            self._idle.append(pipe)
            yield group, answer

    def wait_until_ready(self) -> None:
        """Until all processes have their text and their device.

        Raises:
            UserError: a process has ended.
        """
        for pipe in self._idle:
            self._answer(pipe)

    def _answer(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            process = self._processes[pipe]
            process.join()
            systems = {point.system.name for point in self._busy.get(pipe, ())}
            what = ", ".join(sorted(systems)) or "nothing yet"
            raise UserError(
                f"The process that trained {what} {ending(process.exitcode)}. Run the command "
                "again, with fewer --jobs if memory ran out: it goes on."
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()


@contextmanager
def workers(count: int, place: Place) -> Iterator[Workers]:
    """`Workers` that have ended when the block has."""
    started = Workers(count, place)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def _serve(pipe: Connection, place: Place) -> None:
    """In a process of its own: train the groups that come, until nobody sends any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        trainer = GroupTrainer(place)
        pipe.send(None)
        while True:
            pipe.send(trainer.train(pipe.recv()))
    except EOFError:
        return
    except BaseException as error:  # the parent tells of it
        pipe.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class GroupTrainer:
    """Trains and measures groups of points in this process."""

    def __init__(self, place: Place) -> None:
        self._base, self._graphs = place.base, place.graphs
        self._device = torch.device(place.device)
        if self._device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_num_threads(place.threads)
        self._text = Text.load(place.data, place.base.training, self._device)
        self._words = word_ids_or_none(place.data)

    def train(self, group: Group) -> list[Result] | str:
        """The results of a group, or why there are none: memory ran out."""
        started_at = time.perf_counter()
        try:
            with lack_of_memory_told():
                results = self._train(group)
        except ProcessFailedError as error:
            return str(error)
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - started_at
        for result in results:
            result["seconds_of_group"] = seconds
            result["points_of_group"] = len(group)
        return results

    def _train(self, group: Group) -> list[Result]:
        trainees = []
        vocab_size = self._base.model.vocab_size
        assert vocab_size is not None
        for point in group:
            recipe = point.system.recipe(
                self._base,
                tokens=point.tokens,
                seed=point.seed,
                learning_rate=point.learning_rate,
            )
            model = point.system.build(recipe, vocab_size, self._device).train()
            evaluate_every_id(model)
            trainees.append(Trainee(model, recipe, self._text, self._graphs))
        train_side_by_side(trainees)
        return [
            measure(point, trainee, self._text, self._base.model, self._words)
            for point, trainee in zip(group, trainees, strict=True)
        ]


def word_ids_or_none(data: Path) -> torch.Tensor | None:
    """The words that recall is measured with; None where the tokenizer has too few."""
    try:
        return word_ids(load_tokenizer(str(data / TOKENIZER_NAME)))
    except UserError:
        return None
