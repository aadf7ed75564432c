"""Decoding and prefill: a model that reads a table from disk beside its own dense backbone.

Both run in one process, step by step in turn, so that whatever else the machine does meets both;
a pair of neighbouring steps gives one ratio, and the median of the ratios is the result.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lookup_experts.benchmarks.added_time import added_time
from lookup_experts.benchmarks.ceilings import (
    DiskCounter,
    disk_bytes_per_second,
    matmul_flops_per_second,
    memory_bytes_per_second,
)
from lookup_experts.benchmarks.timing import median, pair_ratios, spread
from lookup_experts.errors import UserError
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.table.reader import ReaderStatistics, TableExperts

SEQUENCE_STEPS = 64
"""Decoding steps before new sequences begin, so that contexts stay alike."""
CONTEXT = 64
"""Tokens of each sequence before its first decoding step."""
WARM_UP_STEPS = 8
CACHE_WARM_UP_TOKENS = 60_000
DISK_SAMPLE_BYTES = 2**28

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class SpeedResult:
    """One measurement; `tokens` is a prompt's length, `batch` a decoding step's."""

    what: str
    system: str
    ms_per_step: float
    ratio_to_dense: float
    spread: tuple[float, float]
    """10th and 90th percentile of the ratios."""
    pairs: int
    batch: int | None = None
    tokens: int | None = None
    store: str | None = None
    backend: str | None = None
    encoding: str | None = None
    cache_bytes: int | None = None
    bytes_per_step: float | None = None
    hit_rate: float | None = None
    wait_ms: float | None = None
    entrance_ms: float | None = None
    """Of a decoding step on a CPU: asking for the records, before the first block."""
    blocks_ms: float | None = None
    """Likewise: what attaching added to all blocks, waiting included."""
    device: str | None = None
    """The GPU's name; None on a CPU."""
    page_cache_bypassed: bool | None = None
    """Whether the kernel brought from the disk at least what the store says it read."""
    share_of_memory_bandwidth: float | None = None
    """Of a decoding step: its weights and rows, over its time and what memory reaches at best."""
    share_of_disk_bandwidth: float | None = None
    """What the store read, over the time of the steps and what the disk reaches at best."""
    share_of_matmul_flops: float | None = None
    """Of a prompt: its products with weights, over its time and what a plain product reaches."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what doesn't apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best, measured beside a benchmark."""

    memory_bytes_per_second: float
    disk_bytes_per_second: float

    @classmethod
    def measure(cls, mole: Any) -> "Ceilings":
        """For a model and the table that it reads."""
        table = mole.expert_source.table
        return cls(
            memory_bytes_per_second(mole.device),
            disk_bytes_per_second(table.path(table.shards[0]), DISK_SAMPLE_BYTES),
        )


def weight_bytes(model: Any, batch: int) -> int:
    """What a decoding step of `batch` sequences reads of a model's weights."""
    total = sum(weight.nbytes for weight in model.parameters())
    embedding = model.get_input_embeddings().weight
    if embedding is model.get_output_embeddings().weight:
        return total
    return total - embedding.nbytes + batch * embedding[0].nbytes


def prompt_flops(model: Any, tokens: int) -> float:
    """Of a prompt's products with a model's weights, two for each number and token.

    Only the last token goes through the output layer. What attention multiplies besides, keys and
    values, is left out.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    per_token = sum(
        weight.numel()
        for weight in model.parameters()
        if weight.dim() == 2 and weight is not embedding and weight is not head
    )
    return 2.0 * (tokens * per_token + head.numel())


class TextWindows:
    """Windows of a stream of token ids, at random places, on the device of the models."""

    def __init__(self, ids: np.ndarray, seed: int = 0, device: str = "cpu") -> None:
        self._ids = torch.from_numpy(ids)
        self._device = torch.device(device)
        self._random = np.random.default_rng(seed)

    def take(self, rows: int, length: int) -> Tensor:
        """[rows, length] int64."""
        if len(self._ids) <= length:
            raise UserError(f"{len(self._ids)} token ids are too few; more than {length} needed.")
        starts = self._random.integers(0, len(self._ids) - length, rows)
        windows = torch.stack([self._ids[start : start + length] for start in starts])
        return windows.to(self._device)


@torch.inference_mode()
def measure_decode(
    dense: Any, mole: Any, windows: TextWindows, batch: int, pairs: int, advance: Advance
) -> list[SpeedResult]:
    """Decoding steps of `batch` sequences over real text, dense and MoLE in turn."""
    reader: TableExperts = mole.expert_source
    ceilings = Ceilings.measure(mole)
    warm_cache(reader, windows)
    # Not counted: on a GPU attention is planned anew for each length that it meets first, which
    # takes several steps' time, and with graphs the first steps are compiled.
    tokens = windows.take(batch, CONTEXT + SEQUENCE_STEPS)
    _decode_sequences(dense, mole, tokens, {"dense": [], "mole": []})
    times: dict[str, list[float]] = {"dense": [], "mole": []}
    reader.reset_stats()
    total, from_disk = reader.stats(), 0
    while len(times["dense"]) < pairs:
        tokens = windows.take(batch, CONTEXT + SEQUENCE_STEPS)
        statistics, disk_bytes = _decode_sequences(dense, mole, tokens, times)
        total, from_disk = _sum(total, statistics), from_disk + disk_bytes
        advance(min(len(times["dense"]), pairs), pairs)
    dense_result, result = _results(
        "decode", times, total, from_disk, reader, ceilings, batch=batch
    )
    if reader.device.type == "cpu":
        result = _with_added_time(
            result, dense, mole, windows.take(batch, CONTEXT + SEQUENCE_STEPS)
        )
    rows = total.ids_unique / total.batches * reader.table.layout.record_bytes
    return [
        _with_memory_share(dense_result, weight_bytes(dense, batch), ceilings),
        _with_memory_share(result, weight_bytes(mole, batch) + rows, ceilings),
    ]


def _with_added_time(result: SpeedResult, dense: Any, mole: Any, tokens: Tensor) -> SpeedResult:
    """Apart from the steps that are compared: looking at the clock takes time as well."""
    with added_time(mole) as added:
        _decode_sequences(dense, mole, tokens, {"dense": [], "mole": []})
    entrance_ms, blocks_ms = added.medians_ms(skip=1 + WARM_UP_STEPS)  # the first is the prompt
    return replace(result, entrance_ms=entrance_ms, blocks_ms=blocks_ms)


def _with_memory_share(result: SpeedResult, num_bytes: float, ceilings: Ceilings) -> SpeedResult:
    rate = num_bytes / (result.ms_per_step / 1e3)
    return replace(result, share_of_memory_bandwidth=rate / ceilings.memory_bytes_per_second)


def _decode_sequences(
    dense: Any, mole: Any, tokens: Tensor, times: dict[str, list[float]]
) -> tuple[ReaderStatistics, int]:
    """Adds the seconds of each step to `times`; what the steps asked of the reader, and bytes that
    came from the disk meanwhile."""
    models = {"dense": dense, "mole": mole}
    caches = {
        name: {
            cache_argument(model): cache_of(
                model(tokens[:, :CONTEXT], use_cache=True, logits_to_keep=1)
            )
        }
        for name, model in models.items()
    }
    mole.expert_source.reset_stats()
    disk = DiskCounter()
    for step in range(SEQUENCE_STEPS):
        column = tokens[:, CONTEXT + step, None]
        for name in ("dense", "mole") if step % 2 else ("mole", "dense"):
            started_at = time_now(column.device)
            models[name](column, use_cache=True, **caches[name])
            seconds = time_now(column.device) - started_at
            if step >= WARM_UP_STEPS:
                times[name].append(seconds)
    return mole.expert_source.stats(), disk.bytes_read()


def _sum(first: ReaderStatistics, second: ReaderStatistics) -> ReaderStatistics:
    counts = {
        field.name: getattr(first, field.name) + getattr(second, field.name)
        for field in fields(first)
        if field.name not in ("store", "backend", "cache_bytes")
    }
    return replace(first, **counts)


@torch.inference_mode()
def measure_prefill(
    dense: Any, mole: Any, windows: TextWindows, tokens: int, pairs: int, advance: Advance
) -> list[SpeedResult]:
    """Prompts of `tokens` tokens of real text, dense and MoLE in turn."""
    reader: TableExperts = mole.expert_source
    models = {"dense": dense, "mole": mole}
    times: dict[str, list[float]] = {"dense": [], "mole": []}
    ceilings = Ceilings.measure(mole)
    product_rate = matmul_flops_per_second(mole.dtype, mole.device)
    for model in models.values():
        model(windows.take(1, tokens), logits_to_keep=1)
    disk = DiskCounter()
    reader.reset_stats()
    for pair in range(pairs):
        prompt = windows.take(1, tokens)
        for name in ("dense", "mole") if pair % 2 else ("mole", "dense"):
            started_at = time_now(prompt.device)
            models[name](prompt, logits_to_keep=1)
            times[name].append(time_now(prompt.device) - started_at)
        advance(pair + 1, pairs)
    results = _results(
        "prefill", times, reader.stats(), disk.bytes_read(), reader, ceilings, tokens=tokens
    )
    return [
        _with_matmul_share(result, prompt_flops(models[result.system], tokens), product_rate)
        for result in results
    ]


def _with_matmul_share(result: SpeedResult, flops: float, product_rate: float) -> SpeedResult:
    rate = flops / (result.ms_per_step / 1e3)
    return replace(result, share_of_matmul_flops=rate / product_rate)


def time_now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gpu_name(device: torch.device) -> str | None:
    """The name of a GPU; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def warm_cache(reader: TableExperts, windows: TextWindows) -> None:
    """Bring the row cache to the state that a long run would have left it in."""
    if not reader.cache_bytes:
        return
    for _ in range(CACHE_WARM_UP_TOKENS // 32):
        reader.rows(windows.take(1, 32), ready=False).layer(0)


def _results(
    what: str,
    times: dict[str, list[float]],
    statistics: ReaderStatistics,
    from_disk: int,
    reader: TableExperts,
    ceilings: Ceilings,
    *,
    batch: int | None = None,
    tokens: int | None = None,
) -> list[SpeedResult]:
    ratios = pair_ratios(times["mole"], times["dense"])
    batches = max(1, statistics.batches)
    bytes_per_step = statistics.bytes_read / batches
    dense = SpeedResult(
        what=what,
        system="dense",
        ms_per_step=median(times["dense"]) * 1e3,
        ratio_to_dense=1.0,
        spread=(1.0, 1.0),
        pairs=len(ratios),
        device=gpu_name(reader.device),
        batch=batch,
        tokens=tokens,
    )
    mole = SpeedResult(
        what=what,
        system="mole",
        ms_per_step=median(times["mole"]) * 1e3,
        ratio_to_dense=median(ratios),
        spread=spread(ratios),
        pairs=len(ratios),
        device=gpu_name(reader.device),
        store=statistics.store,
        backend=statistics.backend,
        encoding=reader.table.layout.encoding.name,
        cache_bytes=statistics.cache_bytes,
        bytes_per_step=bytes_per_step,
        hit_rate=statistics.cache_hits / max(1, statistics.ids_unique),
        wait_ms=statistics.wait_seconds / batches * 1e3,
        page_cache_bypassed=(
            from_disk >= statistics.bytes_read if statistics.store == "direct" else None
        ),
        share_of_disk_bandwidth=(
            bytes_per_step / median(times["mole"]) / ceilings.disk_bytes_per_second
            if statistics.store == "direct"
            else None
        ),
        batch=batch,
        tokens=tokens,
    )
    return [dense, mole]
