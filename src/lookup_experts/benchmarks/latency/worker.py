"""A process that runs one system and answers over a pipe.

It is asked `(name, *arguments)` and answers with a value, or with a `Failure`; it ends when asked
"end" or when the pipe is closed. What it measures, it measures itself: the pipe isn't in it.
"""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lookup_experts.allocation import keep_freed_memory
from lookup_experts.benchmarks.latency.models import Built, Plan, build
from lookup_experts.benchmarks.latency.systems import Counts, System
from lookup_experts.benchmarks.residency import proportional_set_size
from lookup_experts.errors import UserError
from lookup_experts.model.cache_names import cache_argument, cache_of


@dataclass(frozen=True)
class Failure:
    """Why a system can't go on, in a few words."""

    words: str


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    seconds: float
    counts: Counts
    digest: str
    """Of the logits of the last position of every sequence."""


def serve(connection: Any, system: System, plan: Plan, sizes: dict[str, int]) -> None:
    """Build the system and run what is asked.

    Args:
        connection: our end of the pipe.
        sizes: of the plan's shape, which may be one that only the parent knows.
    """
    from lookup_experts.model.gateless_llama import SHAPES

    SHAPES[plan.shape] = sizes
    keep_freed_memory()
    runner: Runner | None = None
    while True:
        try:
            name, *arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        if name == "end":
            return
        try:
            if runner is None:
                runner = Runner(build(system, plan), plan.device)
            answer = getattr(runner, name)(*arguments)
        except UserError as error:
            answer = Failure(str(error))
        except (MemoryError, OSError, RuntimeError) as error:
            from lookup_experts.benchmarks.quality.runs import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            answer = Failure("out of memory")
        try:
            connection.send(answer)
        except ConnectionError:  # nobody waits for it any more
            return


class Runner:
    """A system at work on one batch of sequences at a time."""

    def __init__(self, built: Built, device: str) -> None:
        self._built, self._device = built, torch.device(device)
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
        self._synchronize()
        started_at = time.perf_counter()
        output = self._built.model(
            tokens, use_cache=True, logits_to_keep=1, **{self._cache_argument: self._past}
        )
        self._synchronize()
        seconds = time.perf_counter() - started_at
        counts = self._built.take_counts()
        self._past = cache_of(output)
        self._built.between_steps()
        logits = output.logits.float().cpu().numpy()
        return Pass(seconds, counts, hashlib.sha256(logits.tobytes()).hexdigest())

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
