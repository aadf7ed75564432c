"""Latency at equal memory: each system in its own process, a few steps of each in turn.

A step of a system and the same step of dense in that round of turns give one ratio; medians of
those are the result. A slow system stops after `LONGEST` seconds of steps, so that it doesn't keep
the others.
"""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from lookup_experts.benchmarks.ceilings import disk_bytes_per_second
from lookup_experts.benchmarks.latency.models import SELECTED, Plan, expert_folder
from lookup_experts.benchmarks.latency.systems import CAPPED, DISK, PEERS, Counts, System
from lookup_experts.benchmarks.latency.worker import Failure, Pass, serve
from lookup_experts.benchmarks.speed import TextWindows
from lookup_experts.benchmarks.timing import median, pair_ratios, spread
from lookup_experts.errors import UserError
from lookup_experts.model.gateless_llama import SHAPES, paper_config
from lookup_experts.table.opening import Table, open_table

STEPS_PER_TURN = 4
"""Of which the first isn't counted: the processor's caches hold what another process left, as they
don't where one model decodes step after step. Nor is the first turn."""
FEWEST_STEPS = 5
PROMPT_PASSES = 3
"""Times that each system reads the prompts of a batch size, in turn."""
DISK_PASSES = 3
"""The fastest counts: a virtual disk is slowed down at times."""
LONGEST = 20.0
"""Seconds of steps at one batch size after which a system has taken part long enough."""
BREATH = 0.004
"""Seconds between two turns, in which the threads of the last one go to sleep."""

Advance = Callable[[int, int], None]


class SystemFailedError(Exception):
    """A system can't go on; why, in a few words."""


@dataclass
class Taken:
    """What a system did at one batch size."""

    prompts: list[Pass] = field(default_factory=list)
    """The same prompt, read again from its beginning."""
    steps: dict[int, Pass] = field(default_factory=dict)
    """By number; without those that warmed up."""
    digests: list[str] = field(default_factory=list)
    """Of every step."""
    resident_bytes: int = 0


class Worker:
    """The parent's side of a system."""

    def __init__(self, system: System, plan: Plan, target: Callable[..., None] = serve) -> None:
        self.system = system
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, system, plan, SHAPES[plan.shape])
        self._process = context.Process(target=target, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.taken: dict[int, Taken] = {}
        """By batch size."""
        self.facts: dict[str, Any] = {}
        self.failed: str | None = None

    def ask(self, *question: Any) -> Any:
        """What the process answers.

        Raises:
            SystemFailedError: it can't, or it has ended.
        """
        self.tell(*question)
        return self.answer()

    def tell(self, *question: Any) -> None:
        """Ask without waiting."""
        try:
            self._pipe.send(question)
        except OSError:
            raise self._ended() from None

    def answer(self) -> Any:
        """The answer to the question asked longest ago."""
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Failure):
            raise SystemFailedError(answer.words)
        return answer

    def _ended(self) -> SystemFailedError:
        self._process.join(10)
        code = self._process.exitcode
        # The kernel kills (signal 9) who takes the machine's last memory.
        return SystemFailedError(
            "killed, as when memory runs out" if code == -9 else f"ended with code {code}"
        )

    @contextmanager
    def or_failed(self) -> Iterator[None]:
        """Note a failure of the system and let it rest; the others go on."""
        try:
            yield
        except SystemFailedError as error:
            self.failed = str(error)
            self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            with suppress(OSError):
                self._pipe.send(("end",))
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
        self._pipe.close()


def measure_latency(
    systems: Sequence[System],
    plan: Plan,
    windows: TextWindows,
    batches: Sequence[int],
    prompt: int,
    steps: int,
    advance: Advance,
    keep: Callable[[int, list[dict[str, Any]]], None],
) -> None:
    """Measure every batch size; `keep` is given each with one result per system.

    Args:
        systems: dense first; their tables are there.
        prompt: tokens before the first decoding step.
        steps: decoding steps of each system that count, or up to two more to fill its turns, or
            fewer if it is slow.
        advance: called with (rounds of turns done, rounds in all).
        keep: called with (batch size, results) as soon as they are there.

    Raises:
        UserError: the sequences are longer than the model's context, or dense itself failed.
    """
    context = paper_config(plan.shape).max_position_embeddings
    rounds = 1 + -(-steps // (STEPS_PER_TURN - 1))
    taken = rounds * STEPS_PER_TURN
    if prompt + taken > context:
        raise UserError(
            f"A prompt of {prompt} tokens and {taken} steps (for {steps} that count) are more than "
            f"the model's context of {context}."
        )
    workers = [Worker(system, plan) for system in systems]
    try:
        _start(workers)
        for number, batch in enumerate(batches):
            _measure_batch(
                [worker for worker in workers if worker.failed is None],
                windows.take(batch, prompt + taken).numpy(),
                prompt,
                partial(_advance_from, advance, number * rounds, rounds * len(batches)),
            )
            keep(batch, _results(workers, plan, batch, prompt))
    finally:
        for worker in workers:
            worker.close()


def _advance_from(advance: Advance, before: int, total: int, done: int) -> None:
    advance(before + done, total)


def _start(workers: Sequence[Worker]) -> None:
    """Build all systems, at the same time."""
    for worker in workers:
        with worker.or_failed():
            worker.tell("facts")
    for worker in workers:
        if worker.failed is None:
            with worker.or_failed():
                worker.facts = worker.answer()


def _measure_batch(
    workers: list[Worker], tokens: np.ndarray, prompt: int, advance: Callable[[int], None]
) -> None:
    """Prompts and then the turns of all systems; tokens [B, prompt + steps]."""
    batch, length = tokens.shape
    order = random.Random(0)
    for worker in workers:
        worker.taken[batch] = Taken()
    for _ in range(PROMPT_PASSES):
        for worker in order.sample(workers, len(workers)):
            if worker.failed is None:
                with worker.or_failed():
                    worker.taken[batch].prompts.append(worker.ask("prompt", tokens[:, :prompt]))
    active = [worker for worker in workers if worker.failed is None]
    for turn in range((length - prompt) // STEPS_PER_TURN):
        # In any order: always after the same one, a system would pay for what that leaves behind.
        for worker in order.sample(active, len(active)):
            with worker.or_failed():
                _take_turn(worker, worker.taken[batch], turn, tokens[:, prompt:])
            time.sleep(BREATH)
        if turn == 1:  # of all after as many tokens: slow systems take fewer turns
            _note_memory(active, batch)
        active = [worker for worker in active if _goes_on(worker, batch)]
        advance(turn + 1)
    for worker in workers:
        if worker.failed is None:
            with worker.or_failed():
                worker.ask("forget")


def _note_memory(workers: Sequence[Worker], batch: int) -> None:
    for worker in workers:
        if worker.failed is None:
            with worker.or_failed():
                worker.taken[batch].resident_bytes = worker.ask("memory")


def _take_turn(worker: Worker, taken: Taken, turn: int, columns: np.ndarray) -> None:
    first = turn * STEPS_PER_TURN
    for number in range(first, first + STEPS_PER_TURN):
        found: Pass = worker.ask("step", columns[:, number, None])
        taken.digests.append(found.digest)
        if turn > 0 and number > first:
            taken.steps[number] = found


def _goes_on(worker: Worker, batch: int) -> bool:
    if worker.failed is not None:
        return False
    steps = worker.taken[batch].steps
    spent = sum(step.seconds for step in steps.values())
    is_baseline = worker.system.family == "dense"
    return is_baseline or spent < LONGEST or len(steps) < FEWEST_STEPS


# ------------------------------------------------------------------------------------ results


def _results(
    workers: Sequence[Worker], plan: Plan, batch: int, prompt: int
) -> list[dict[str, Any]]:
    dense = workers[0]
    if dense.failed is not None:
        raise UserError(f"The dense model, which all are compared with: {dense.failed}.")
    results = [result_of(worker, dense, plan, workers, batch, prompt) for worker in workers]
    for worker, result in zip(workers, results, strict=True):
        if worker.system.family == "moe" and worker.system.way == DISK and "failed" not in result:
            result |= _disk_floor(
                result, open_table(expert_folder(plan, worker.system.num_experts))
            )
    return results


def result_of(
    worker: Worker,
    dense: Worker,
    plan: Plan,
    workers: Sequence[Worker],
    batch: int,
    prompt: int,
) -> dict[str, Any]:
    """What a system did at a batch size, as JSON values; times in milliseconds."""
    system = worker.system
    result: dict[str, Any] = {"what": "latency", "system": system.name, "batch": batch}
    taken = worker.taken.get(batch)
    if taken is None or worker.failed:
        return {**result, "failed": worker.failed or "not measured"}
    baseline = dense.taken[batch]
    steps = list(taken.steps.values())
    ratios = _ratios(taken, baseline)
    seconds = median(_seconds(steps))
    result |= {
        "prompt": prompt,
        "prefill_ms": median(_seconds(taken.prompts)) * 1e3,
        "prefill_ratio_to_dense": median(
            pair_ratios(_seconds(taken.prompts), _seconds(baseline.prompts))
        ),
        "prefill_bytes_loaded": taken.prompts[-1].counts.bytes_loaded,
        "ms_per_step": seconds * 1e3,
        "ratio_to_dense": median(ratios),
        "spread": list(spread(ratios)),
        "tokens_per_second": batch / seconds,
        "steps": len(steps),
        "bytes_per_step": _mean(steps, lambda counts: counts.bytes_loaded),
        "resident_bytes": taken.resident_bytes,
        "beyond_dense_bytes": taken.resident_bytes - baseline.resident_bytes,
        **worker.facts,
    }
    if system.way not in PEERS:
        result["stall_ms"] = _mean(steps, lambda counts: counts.stall_seconds) * 1e3
    if system.family == "moe":
        result |= _against_mole(taken, workers, batch)
        result |= _routing(worker, plan, steps, batch)
        result |= _agreement(worker, workers, batch)
    if system.family == "mole":
        result["cache_bytes"] = plan.cache_bytes
    return result


def _seconds(passes: Sequence[Pass]) -> list[float]:
    return [one.seconds for one in passes]


def _ratios(taken: Taken, baseline: Taken) -> list[float]:
    """How many times another system's time each step took; of the steps that both have."""
    shared = [number for number in taken.steps if number in baseline.steps]
    return pair_ratios(
        *(_seconds([one.steps[number] for number in shared]) for one in (taken, baseline))
    )


def _against_mole(taken: Taken, workers: Sequence[Worker], batch: int) -> dict[str, float]:
    """How many times the time of MoLE, where that was measured, a step of a mixture takes."""
    for worker in workers:
        if worker.system.family == "mole" and worker.failed is None and batch in worker.taken:
            return {"ratio_to_mole": median(_ratios(taken, worker.taken[batch]))}
    return {}


def _disk_floor(result: dict[str, Any], table: Table) -> dict[str, float]:
    """What no prefetching can beat: the time that the disk takes to give so many bytes."""
    path = table.path(table.shards[0])
    speed = max(disk_bytes_per_second(path) for _ in range(DISK_PASSES))
    return {
        "disk_bytes_per_second": speed,
        "disk_floor_ms": result["bytes_per_step"] / speed * 1e3,
    }


def _mean(steps: Sequence[Pass], value: Callable[[Counts], float]) -> float:
    return sum(value(step.counts) for step in steps) / len(steps)


def _routing(worker: Worker, plan: Plan, steps: Sequence[Pass], batch: int) -> dict[str, Any]:
    """Experts per layer and step: measured, and as even routing would have it."""
    if worker.system.way not in CAPPED:
        return {}
    config = plan.moe_config(worker.system.num_experts)
    count, layers = config.num_experts, config.num_hidden_layers
    selected = config.num_experts_per_tok
    even = count * (1 - (1 - selected / count) ** batch)
    return {
        "cache_bytes": plan.expert_budget,
        "experts_used_per_layer": _mean(steps, lambda counts: counts.experts_used) / layers,
        "experts_loaded_per_layer": _mean(steps, lambda counts: counts.experts_loaded) / layers,
        "even_routing_used_per_layer": even,
        # The paper's count: two experts of each layer, those of the step before, are there.
        "paper_loaded_per_layer": even * (1 - SELECTED / count),
    }


def _agreement(worker: Worker, workers: Sequence[Worker], batch: int) -> dict[str, Any]:
    """The share of steps whose logits are those of the resident model, to the last bit."""
    name = worker.system.model_name
    resident = [other for other in workers if other.system.name == name]
    if not resident or resident[0] is worker or batch not in resident[0].taken:
        return {}
    pairs = list(zip(worker.taken[batch].digests, resident[0].taken[batch].digests, strict=False))
    return {"same_logits_as_resident": sum(a == b for a, b in pairs) / max(1, len(pairs))}
