"""Latency at equal memory: each system in its own process, a few steps of each in turn.

A step of a system and the same step of dense in that round of turns give one ratio; medians of
those are the result. A slow system stops after `LONGEST` seconds of steps, so that it doesn't keep
the others.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from lookup_experts import console
from lookup_experts.benchmarks.latency.peers import Counts
from lookup_experts.benchmarks.latency.systems import (
    CAPPED,
    DISK,
    PEERS,
    SELECTED,
    Plan,
    System,
    expert_folder,
    parse_systems,
    prepare_tables,
)
from lookup_experts.benchmarks.latency.worker import Pass, Taken, Worker
from lookup_experts.benchmarks.machine import disk_bytes_per_second
from lookup_experts.benchmarks.plots import check_picture, picture
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import TextWindows, id_stream
from lookup_experts.benchmarks.timing import Advance, median, pair_ratios, spread
from lookup_experts.errors import UserError
from lookup_experts.model.gateless_llama import paper_config
from lookup_experts.table.opening import open_table

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


def bench_latency(
    names: Sequence[str],
    plan: Plan,
    batches: Sequence[int],
    prompt: int,
    steps: int,
    ids: Path | None,
    quality: Path | None,
    memory_plot: Path | None,
    results: Results,
) -> None:
    """`mole bench latency`: the systems of these names, or the default ones.

    Args:
        batches: sequences that are decoded at once.
        prompt, steps: see `measure_latency`.
        ids: see `id_stream`.
        quality: a report of `mole bench quality`, whose losses `memory_plot` shows.
    """
    console.quiet_transformers()
    losses = _read_losses(quality, memory_plot)
    check_picture(memory_plot)
    systems, batches = parse_systems(names), sorted(set(batches))
    windows = TextWindows(id_stream(ids, plan.case().layout.shape.vocab_size, plan.work))
    prepare_tables(plan, systems)
    results.resume()
    left = [size for size in batches if size not in {found["batch"] for found in results.found}]
    if len(left) < len(batches):
        console.say(f"Measured before: {len(batches) - len(left)} of {len(batches)} batch sizes.")
    if left:
        with console.progress_bar("Measuring") as advance:
            for found in measure_latency(systems, plan, windows, left, prompt, steps, advance):
                results.add(*(result | {"dtype": plan.case().dtype_name} for result in found))
    results.found.sort(key=lambda result: result["batch"])
    results.finish(draw_bars)
    if memory_plot:
        draw_memory(results.found, losses, memory_plot)


def _read_losses(quality: Path | None, memory_plot: Path | None) -> dict[str, float]:
    """The validation losses of a report, by system; empty if no plot needs them."""
    if (quality is None) != (memory_plot is None):
        raise UserError("--memory-plot needs --quality with a report of mole bench quality.")
    if quality is None:
        return {}
    try:
        results = json.loads(quality.read_text())["results"]
        return {
            entry["system"]: entry["validation_loss"]
            for entry in results
            if "validation_loss" in entry
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{quality}: expected the JSON of mole bench quality ({error}).") from error


def measure_latency(
    systems: Sequence[System],
    plan: Plan,
    windows: TextWindows,
    batches: Sequence[int],
    prompt: int,
    steps: int,
    advance: Advance,
) -> Iterator[list[Result]]:
    """Measure every batch size; gives one result per system for each, as soon as it is done.

    Args:
        systems: dense first; their tables are there.
        prompt: tokens before the first decoding step.
        steps: decoding steps of each system that count, or up to two more to fill its turns, or
            fewer if it is slow.
        advance: called with (rounds of turns done, rounds in all).

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
        for worker in workers:  # all are built at the same time
            worker.tell("facts")
        for worker in workers:
            worker.facts = worker.answer()
        for number, batch in enumerate(batches):
            tokens = windows.take(batch, prompt + taken).numpy()
            for turn in _take_turns(workers, tokens, prompt):
                advance(number * rounds + turn + 1, rounds * len(batches))
            yield _results(workers, plan, batch, prompt)
    finally:
        for worker in workers:
            worker.close()


def _take_turns(workers: list[Worker], tokens: np.ndarray, prompt: int) -> Iterator[int]:
    """Prompts and then the turns of all systems, by number; tokens [B, prompt + steps]."""
    batch, length = tokens.shape
    order = random.Random(0)
    workers = [worker for worker in workers if worker.failed is None]
    for worker in workers:
        worker.taken[batch] = Taken(batch)
    for _ in range(PROMPT_PASSES):
        for worker in order.sample(workers, len(workers)):
            if found := worker.ask("prompt", tokens[:, :prompt]):
                worker.taken[batch].prompts.append(found)
    active = [worker for worker in workers if worker.failed is None]
    for turn in range((length - prompt) // STEPS_PER_TURN):
        # In any order: always after the same one, a system would pay for what that leaves behind.
        for worker in order.sample(active, len(active)):
            _take_turn(worker, worker.taken[batch], turn, tokens[:, prompt:])
            time.sleep(BREATH)
        if turn == 1:  # of all after as many tokens: slow systems take fewer turns
            for worker in active:
                worker.taken[batch].resident_bytes = worker.ask("memory")
        active = [worker for worker in active if _goes_on(worker, batch)]
        yield turn
    for worker in workers:
        worker.ask("forget")


def _take_turn(worker: Worker, taken: Taken, turn: int, columns: np.ndarray) -> None:
    first = turn * STEPS_PER_TURN
    for number in range(first, first + STEPS_PER_TURN):
        found: Pass | None = worker.ask("step", columns[:, number, None])
        if found is None:
            return
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


def _results(workers: Sequence[Worker], plan: Plan, batch: int, prompt: int) -> list[Result]:
    """What each system did at a batch size; times in milliseconds."""
    dense = workers[0]
    if dense.failed is not None:
        raise UserError(f"The dense model, which all are compared with: {dense.failed}.")
    done = {worker.system.name: worker for worker in workers if worker.failed is None}
    mole = next((one for one in done.values() if one.system.family == "mole"), None)
    results: list[Result] = []
    for worker in workers:
        system = worker.system
        result: Result = {"what": "latency", "system": system.name, "batch": batch}
        results.append(result)
        if worker.failed is not None:
            result["failed"] = worker.failed
            continue
        taken = worker.taken[batch]
        result |= {"prompt": prompt, **_times(taken, dense.taken[batch]), **worker.facts}
        if system.way not in PEERS:
            result["stall_ms"] = _mean(taken, lambda counts: counts.stall_seconds) * 1e3
        if system.family == "mole":
            result["cache_bytes"] = plan.cache_bytes
        if system.family == "moe" and mole:
            result["ratio_to_mole"] = median(_ratios(taken, mole.taken[batch]))
        if system.way in CAPPED and system.family == "moe":
            result |= _routing(taken, plan, system.num_experts, batch)
            if system.model_name in done:
                resident = done[system.model_name].taken[batch]
                same = [a == b for a, b in zip(taken.digests, resident.digests, strict=False)]
                result["same_logits_as_resident"] = sum(same) / max(1, len(same))
        if system.way == DISK and system.family == "moe":
            # What no prefetching can beat: the time that the disk takes to give so many bytes.
            table = open_table(expert_folder(plan, system.num_experts))
            path = table.path(table.shards[0])
            speed = max(disk_bytes_per_second(path, 2**29) for _ in range(DISK_PASSES))
            result["disk_bytes_per_second"] = speed
            result["disk_floor_ms"] = result["bytes_per_step"] / speed * 1e3
    return results


def _times(taken: Taken, dense: Taken) -> Result:
    ratios, seconds = _ratios(taken, dense), median(_seconds(taken.steps.values()))
    prompts = _seconds(taken.prompts)
    return {
        "prefill_ms": median(prompts) * 1e3,
        "prefill_ratio_to_dense": median(pair_ratios(prompts, _seconds(dense.prompts))),
        "prefill_bytes_loaded": taken.prompts[-1].counts.bytes_loaded,
        "ms_per_step": seconds * 1e3,
        "ratio_to_dense": median(ratios),
        "spread": list(spread(ratios)),
        "tokens_per_second": taken.batch / seconds,
        "steps": len(taken.steps),
        "bytes_per_step": _mean(taken, lambda counts: counts.bytes_loaded),
        "resident_bytes": taken.resident_bytes,
        "beyond_dense_bytes": taken.resident_bytes - dense.resident_bytes,
    }


def _routing(taken: Taken, plan: Plan, num_experts: int, batch: int) -> Result:
    """Experts per layer and step: measured, and as even routing would have it."""
    config = plan.moe_config(num_experts)
    layers, selected = config.num_hidden_layers, config.num_experts_per_tok
    even = num_experts * (1 - (1 - selected / num_experts) ** batch)
    return {
        "cache_bytes": plan.expert_budget,
        "experts_used_per_layer": _mean(taken, lambda counts: counts.experts_used) / layers,
        "experts_loaded_per_layer": _mean(taken, lambda counts: counts.experts_loaded) / layers,
        "even_routing_used_per_layer": even,
        # The paper's count: two experts of each layer, those of the step before, are there.
        "paper_loaded_per_layer": even * (1 - SELECTED / num_experts),
    }


def _seconds(passes: Iterable[Pass]) -> list[float]:
    return [one.seconds for one in passes]


def _mean(taken: Taken, value: Callable[[Counts], float]) -> float:
    return fmean(value(step.counts) for step in taken.steps.values())


def _ratios(taken: Taken, baseline: Taken) -> list[float]:
    """How many times another system's time each step took; of the steps that both have."""
    shared = [number for number in taken.steps if number in baseline.steps]
    return pair_ratios(
        *(_seconds(one.steps[number] for number in shared) for one in (taken, baseline))
    )


# ------------------------------------------------------------------------------------ pictures

COLORS = {
    "dense": "#7f8c9b",
    "mole": "#b44d12",
    "resident": "#334e68",
    "disk": "#2f7f86",
    "ram": "#6fb1a0",
    "mmap": "#a58bc4",
    "accelerate": "#d3b1d9",
}


def draw_bars(results: Sequence[Result], path: Path) -> None:
    """Milliseconds per decoding step, a group of bars for each batch size: the paper's figure 3."""
    batches = list(dict.fromkeys(result["batch"] for result in results))
    names = list(dict.fromkeys(result["system"] for result in results))
    found = {(result["system"], result["batch"]): result for result in results}
    width = 0.84 / len(names)
    with picture(path, 2 + 0.5 * len(names) * len(batches), 4.2) as axes:
        for number, name in enumerate(names):
            left = (number - (len(names) - 1) / 2) * width
            places = [place + left for place in range(len(batches))]
            times = [found[name, batch].get("ms_per_step", 0.0) for batch in batches]
            bars = axes.bar(places, times, width * 0.92, label=name, color=_color(name))
            axes.bar_label(bars, [f"{value:.0f}" for value in times], fontsize=8, padding=1)
            for place, batch in zip(places, batches, strict=True):
                axes.text(
                    place, 0.02, found[name, batch].get("failed", ""),
                    transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="bottom",
                    fontsize=8,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axes.set_ylabel("milliseconds per decoding step")
        axes.legend(frameon=False, fontsize=8, ncols=2)
        axes.margins(y=0.25)


def draw_memory(results: Sequence[Result], losses: dict[str, float], path: Path) -> None:
    """Validation loss against resident memory, each point with its latency: the paper's figure 1.

    Args:
        results: of which those of the smallest batch are drawn.
        losses: of dense, moe-10e, mole-4e.

    Raises:
        UserError: there is no loss of any of the systems.
    """
    batch = min(result["batch"] for result in results)
    points = [
        (_megabytes(result), losses[System.parse(result["system"]).model_name], result)
        for result in results
        if result["batch"] == batch
        and "failed" not in result
        and System.parse(result["system"]).model_name in losses
    ]
    if not points:
        raise UserError(
            "The quality report has no loss of any system here; it has those of "
            f"{', '.join(losses) or 'none'}."
        )
    together, labels = Counter(loss for _, loss, _ in points), Counter[float]()
    with picture(path, 7, 4.5) as axes:
        for size, loss, result in sorted(points, key=lambda point: -point[0]):
            axes.scatter(size, loss, s=70, color=_color(result["system"]), zorder=3)
            # Systems of one model have one loss: their labels stand below each other.
            height = 8 if together[loss] == 1 else -22 - 13 * labels[loss]
            axes.annotate(
                f"{result['system']}, {result['ms_per_step']:.0f} ms",
                (size, loss), xytext=(8, height), textcoords="offset points", fontsize=8,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.3)},
            )  # fmt: skip
            labels[loss] += 1
        axes.set_xlabel(f"resident memory at batch {batch}, MB")
        axes.set_ylabel("validation loss of small models, nats per token")
        axes.margins(0.2)
        axes.grid(alpha=0.3)


def _color(name: str) -> str:
    system = System.parse(name)
    return COLORS[system.family if system.family in COLORS else system.way]


def _megabytes(result: Result) -> float:
    """Resident, without the copy of all experts in RAM that stands for storage."""
    return (result["resident_bytes"] - result.get("host_copy_bytes", 0)) / 1e6
