"""Resident memory: what a process of its own holds after a prompt and some decoding."""

import multiprocessing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookup_experts.benchmarks.models import Case, dense_model, table_model
from lookup_experts.table.format import open_table

PROMPT_TOKENS = 512
DECODING_STEPS = 128


@dataclass(frozen=True)
class MemoryResult:
    """One process."""

    what: str
    system: str
    resident_bytes: int
    """Proportional set size, as the kernel counts it."""
    beyond_dense_bytes: int
    store: str | None = None
    cache_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what doesn't apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def measure_memory(
    case: Case, table_folder: Path, store: str, cache_bytes: int, ids: np.ndarray
) -> list[MemoryResult]:
    """Run the dense model and the table model in fresh processes, one after the other."""
    sample = ids[: PROMPT_TOKENS + DECODING_STEPS * 64]
    dense = _in_fresh_process(case, None, store, cache_bytes, sample)
    mole = _in_fresh_process(case, table_folder, store, cache_bytes, sample)
    return [
        MemoryResult("memory", "dense", dense, 0),
        MemoryResult("memory", "mole", mole, mole - dense, store, cache_bytes),
    ]


def _in_fresh_process(*arguments: Any) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_resident_bytes, arguments)


def _resident_bytes(
    case: Case, table_folder: Path | None, store: str, cache_bytes: int, ids: np.ndarray
) -> int:
    if table_folder is None:
        model = dense_model(case)
    else:
        model = table_model(case, open_table(table_folder), store, cache_bytes)
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
        cache = model(
            tokens[None, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1
        ).past_key_values
        for step in range(DECODING_STEPS):
            column = tokens[None, PROMPT_TOKENS + step, None]
            model(column, past_key_values=cache, use_cache=True)
    return proportional_set_size()


def proportional_set_size() -> int:
    """Bytes of memory that this process holds; shared pages count by their share."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Pss")
