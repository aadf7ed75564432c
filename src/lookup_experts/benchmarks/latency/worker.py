"""A process that runs one system: what it does, and how it is asked.

It is asked `(name, *arguments)` over a pipe and answers with a value, or with the error that it
can't go on; it ends when the pipe is closed. What it measures, it measures itself: the pipe isn't
in it.
"""

import hashlib
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lookup_experts import allocation
from lookup_experts.benchmarks.latency.peers import Counts
from lookup_experts.benchmarks.latency.systems import Built, Plan, System, build
from lookup_experts.benchmarks.processes import (
    ProcessFailedError,
    ending,
    lack_of_memory_told,
    proportional_set_size,
)
from lookup_experts.benchmarks.timing import clock_of
from lookup_experts.errors import UserError
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.model.gateless_llama import SHAPES


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    seconds: float
    counts: Counts
    digest: str
    """Of the logits of the last position of every sequence."""


class Runner:
    """A system at work on one batch of sequences at a time."""

    def __init__(self, built: Built, device: str) -> None:
        self._built, self._device = built, torch.device(device)
        self._clock = clock_of(device)
        self._cache_argument = cache_argument(built.model)
        self._past: Any = None

    def facts(self) -> dict[str, Any]:
        """What is to be said of the system with its results."""
        return self._built.facts

    def prompt(self, ids: np.ndarray) -> Pass:
        """Read prompts [B, T]; the sequences before them are forgotten."""
        self._past = None
        return self._run(ids)

    def step(self, ids: np.ndarray) -> Pass:
        """Decode one token [B, 1] of each sequence."""
        return self._run(ids)

    def memory(self) -> int:
        """Bytes held: of the process, or on a GPU of its memory."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return proportional_set_size()

    def forget(self) -> None:
        """The sequences aren't continued."""
        self._past = None

    @torch.inference_mode()
    def _run(self, ids: np.ndarray) -> Pass:
        tokens = torch.from_numpy(ids).to(self._device)
        self._built.take_counts()
        started_at = self._clock()
        output = self._built.model(
            tokens, use_cache=True, logits_to_keep=1, **{self._cache_argument: self._past}
        )
        seconds = self._clock() - started_at
        counts = self._built.take_counts()
        self._past = cache_of(output)
        self._built.between_steps()
        logits = output.logits.float().cpu().numpy()
        return Pass(seconds, counts, hashlib.sha256(logits.tobytes()).hexdigest())


def serve(connection: Any, system: System, plan: Plan, sizes: dict[str, int]) -> None:
    """Build the system and run what is asked: what the process does.

    Args:
        connection: its end of the pipe.
        sizes: of the plan's shape, which may be one that only the parent knows.
    """
    SHAPES[plan.shape] = sizes
    allocation.keep_freed_memory()
    runner: Runner | None = None
    while True:
        try:
            name, *arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            with lack_of_memory_told():
                if runner is None:
                    runner = Runner(build(system, plan), plan.device)
                answer = getattr(runner, name)(*arguments)
        except (UserError, ProcessFailedError) as error:
            answer = ProcessFailedError(str(error))
        try:
            connection.send(answer)
        except ConnectionError:  # nobody waits for it any more
            return


@dataclass
class Taken:
    """What a system did at one batch size."""

    batch: int
    prompts: list[Pass] = field(default_factory=list)
    """The same prompt, read again from its beginning."""
    steps: dict[int, Pass] = field(default_factory=dict)
    """By number; without those that warmed up."""
    digests: list[str] = field(default_factory=list)
    """Of every step."""
    resident_bytes: int = 0


class Worker:
    """The parent's side of a system. One that can't go on rests, and the others go on.

    Attributes:
        facts: of the system, for its results.
        taken: what it did, by batch size.
        failed: why it can't go on, in a few words.
    """

    def __init__(self, system: System, plan: Plan, target: Callable[..., None] = serve) -> None:
        self.system = system
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, system, plan, SHAPES[plan.shape])
        self._process = context.Process(target=target, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = {}
        self.taken: dict[int, Taken] = {}
        self.failed: str | None = None

    def ask(self, *question: Any) -> Any:
        """What the process answers; None once it has failed."""
        self.tell(*question)
        return self.answer()

    def tell(self, *question: Any) -> None:
        """Ask without waiting."""
        if self.failed is None:
            with suppress(OSError):  # there will be no answer
                self._pipe.send(question)

    def answer(self) -> Any:
        """The answer to the question asked longest ago; None once the process has failed."""
        if self.failed is not None:
            return None
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            answer = ProcessFailedError(ending(self._process.exitcode))
        if isinstance(answer, ProcessFailedError):
            self.failed, answer = str(answer), None
            self.close()
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
