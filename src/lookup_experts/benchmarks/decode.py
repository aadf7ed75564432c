"""Decoding: steps over real text, MoLE with its table on disk beside its dense backbone."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lookup_experts import console
from lookup_experts.benchmarks.beside_dense import (
    Comparison,
    System,
    disk_rate,
    draw_ratios,
    moles_of,
    speeds,
    weight_bytes,
)
from lookup_experts.benchmarks.machine import memory_bytes_per_second
from lookup_experts.benchmarks.peers import measured_peers
from lookup_experts.benchmarks.processes import DiskCounter
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import TextWindows
from lookup_experts.benchmarks.timing import (
    Advance,
    clock_of,
    interleave,
    interleave_queued,
    median,
)
from lookup_experts.errors import UserError
from lookup_experts.generation.captured import Decoding
from lookup_experts.model.blocks import find_ffns
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.table.reader import ReaderStatistics, TableReader

SEQUENCE_STEPS = 64
"""Decoding steps before new sequences begin, so that contexts stay alike."""
CONTEXT = 64
"""Tokens of each sequence before its first decoding step."""
WARM_UP_STEPS = 8
CACHE_WARM_UP_TOKENS = 60_000


def bench_decode(
    comparison: Comparison, batches: Sequence[int], pairs: int, graphs: bool, results: Results
) -> None:
    """`mole bench decode`: so many pairs of steps of each batch size; with `graphs` on a GPU, each
    system's steps captured as CUDA graphs and replayed."""
    if graphs and not comparison.device.startswith("cuda"):
        raise UserError(
            f"CUDA graphs need a GPU; give --device cuda instead of {comparison.device}."
        )
    peers = comparison.peers()
    models, windows = comparison.prepare()
    decodings = None
    if graphs:
        longest = CONTEXT + SEQUENCE_STEPS
        decodings = {name: Decoding(model, longest) for name, model in models.items()}
    options = {"dtype": comparison.case.dtype_name, "cuda_graphs": True if graphs else None}
    for batch in batches:
        with console.progress_bar(f"decode {batch}") as advance:
            found = measure_decode(models, windows, batch, pairs, advance, decodings)
        results.add(*(result | options for result in found))
        results.add(*measured_peers(peers, comparison.case, batch=batch))
    results.finish(draw_ratios)


@torch.inference_mode()
def measure_decode(
    models: dict[System, Any],
    windows: TextWindows,
    batch: int,
    pairs: int,
    advance: Advance,
    decodings: dict[System, Decoding] | None = None,
) -> list[Result]:
    """Decoding steps of `batch` sequences, all models in turn.

    Args:
        models: what is run.
        windows: text.
        batch: sequences.
        pairs: steps of each.
        advance: told how far it is.
        decodings: of the models, to measure captured steps; None: the models' own.

    Returns:
        What `speeds` says, and `share_of_memory_bandwidth`: a step's weights and rows, over its
        time and what memory reaches at best. Of MoLE on a CPU also `entrance_ms` and `blocks_ms`:
        what asking for the records takes before the first block, and what attaching added to all
        blocks, waiting included.
    """
    moles, length = moles_of(models), CONTEXT + SEQUENCE_STEPS
    readers = {weights: mole.expert_source for weights, mole in moles.items()}
    mole = next(iter(moles.values()))
    run = partial(_decode_sequences, models)
    if decodings is not None:
        run = partial(_replay_sequences, decodings, readers)
    memory_rate, bytes_per_second = memory_bytes_per_second(mole.device), disk_rate(mole)
    for reader in readers.values():
        warm_cache(reader, windows)
    # Not counted: on a GPU attention is planned anew for each length that it meets first, which
    # takes several steps' time, and graphs are captured.
    run(windows.take(batch, length))
    seconds: dict[System, list[float]] = {name: [] for name in models}
    for reader in readers.values():
        reader.reset_stats()
    read = {weights: reader.stats() for weights, reader in readers.items()}
    from_disk, unique_ids, num_steps, done = 0, 0, 0, 0
    while done < pairs:
        tokens = windows.take(batch, length)
        taken, statistics, disk_bytes = run(tokens)
        for name, values in taken.items():
            seconds[name] += values
        read = {weights: _sum(before, statistics[weights]) for weights, before in read.items()}
        from_disk += disk_bytes
        steps = tokens[:, CONTEXT:].cpu().unbind(1)
        unique_ids += sum(len(column.unique()) for column in steps)
        num_steps += len(steps)
        done = min(map(len, seconds.values()))
        advance(min(done, pairs), pairs)
    # A step that is replayed isn't counted.
    read = {weights: replace(found, batches=num_steps) for weights, found in read.items()}
    results = speeds("decode", {"batch": batch}, models, seconds, read, from_disk, bytes_per_second)
    for result in results:
        weights, system = result["weights"], result["system"]
        num_bytes = float(weight_bytes(models[weights, system], batch))
        if system == "mole":
            num_bytes += unique_ids / num_steps * readers[weights].table.layout.record_bytes
            if mole.device.type == "cpu":
                result |= _added_ms(moles[weights], windows.take(batch, length))
        rate = num_bytes / (result["ms_per_step"] / 1e3)
        result["share_of_memory_bandwidth"] = rate / memory_rate
    return results


def _added_ms(mole: Any, tokens: Tensor) -> Result:
    """`entrance_ms` and `blocks_ms` of a model, apart from the steps that are compared: looking at
    the clock takes time as well."""
    with added_time(mole) as added:
        _decode_sequences({("", "mole"): mole}, tokens)
    # The first of them is the prompt.
    entrance_ms, blocks_ms = medians_ms(*added, skip=1 + WARM_UP_STEPS)
    return {"entrance_ms": entrance_ms, "blocks_ms": blocks_ms}


def _decode_sequences(
    models: dict[System, Any], tokens: Tensor
) -> tuple[dict[System, list[float]], dict[str, ReaderStatistics], int]:
    """Seconds of each step that counts, what all steps asked of the readers, and bytes that came
    from the disk meanwhile."""
    readers = {weights: mole.expert_source for weights, mole in moles_of(models).items()}
    pasts = {
        name: {
            cache_argument(model): cache_of(
                model(tokens[:, :CONTEXT], use_cache=True, logits_to_keep=1)
            )
        }
        for name, model in models.items()
    }
    seconds: dict[System, list[float]] = {name: [] for name in models}
    clock = clock_of(tokens.device)
    for reader in readers.values():
        reader.reset_stats()
    disk = DiskCounter()
    for number in range(SEQUENCE_STEPS):
        column = tokens[:, CONTEXT + number, None]
        steps = {
            name: partial(model, column, use_cache=True, **pasts[name])
            for name, model in models.items()
        }
        for name, taken in interleave(steps, 1, number, clock).items():
            seconds[name] += taken if number >= WARM_UP_STEPS else []
    read = {weights: reader.stats() for weights, reader in readers.items()}
    return seconds, read, disk.bytes_read()


def _replay_sequences(
    decodings: dict[System, Decoding], readers: dict[str, TableReader], tokens: Tensor
) -> tuple[dict[System, list[float]], dict[str, ReaderStatistics], int]:
    """The same of captured steps, all asked for before the first is waited for: as in a loop whose
    host is ahead of the device, what it takes to ask is hidden."""
    for decoding in decodings.values():
        decoding.begin(tokens[:, :CONTEXT])
    for reader in readers.values():
        reader.reset_stats()
    disk = DiskCounter()
    seconds = interleave_queued(
        {name: decoding.step for name, decoding in decodings.items()},
        {name: decoding.feed for name, decoding in decodings.items()},
        tokens[:, CONTEXT:].unbind(1),
        tokens.device,
    )
    counted = {name: taken[WARM_UP_STEPS:] for name, taken in seconds.items()}
    read = {weights: reader.stats() for weights, reader in readers.items()}
    return counted, read, disk.bytes_read()


def _sum(first: ReaderStatistics, second: ReaderStatistics) -> ReaderStatistics:
    counts = {
        field.name: getattr(first, field.name) + getattr(second, field.name)
        for field in fields(first)
        if field.name not in ("store", "backend", "cache_bytes")
    }
    return replace(first, **counts)


def warm_cache(reader: TableReader, windows: TextWindows) -> None:
    """Bring the row cache to the state that a long run would have left it in."""
    if not reader.cache_bytes:
        return
    for _ in range(CACHE_WARM_UP_TOKENS // 32):
        reader.rows(windows.take(1, 32), ready=False).layer(0)


# --------------------------------------------------------------------- where MoLE's time is spent


@contextmanager
def added_time(model: Any) -> Iterator[tuple[list[float], list[float]]]:
    """Times what attaching added to `model`, every time it is called within.

    By hooks right before and after those of `attach`. Only on a CPU: on a GPU the host is done
    before the work is.

    Returns:
        Seconds as they come: of asking for a batch's records, before the first block, a number per
        pass; and of router, waiting, sum and addition, a number per block and pass.
    """
    entrance: list[float] = []
    blocks: list[float] = []
    started_at = 0.0

    def start(*_: Any) -> None:
        nonlocal started_at
        started_at = time.perf_counter()

    def stop(seconds: list[float], *_: Any) -> None:
        seconds.append(time.perf_counter() - started_at)

    with ExitStack() as hooks:
        base = model.base_model
        hooks.callback(base.register_forward_pre_hook(start, prepend=True).remove)
        hooks.callback(base.register_forward_pre_hook(partial(stop, entrance)).remove)
        for ffn in find_ffns(model):
            if hasattr(ffn, "lookup_experts"):
                hooks.callback(ffn.register_forward_hook(start, prepend=True).remove)
                hooks.callback(ffn.register_forward_hook(partial(stop, blocks)).remove)
        yield entrance, blocks


def medians_ms(
    entrance: Sequence[float], blocks: Sequence[float], skip: int
) -> tuple[float, float]:
    """Milliseconds per pass, at the entrance and in all blocks, without the first passes."""
    num_blocks = len(blocks) // len(entrance)
    passes = [
        sum(blocks[first : first + num_blocks])
        for first in range(skip * num_blocks, len(blocks), num_blocks)
    ]
    return median(entrance[skip:]) * 1e3, median(passes) * 1e3
