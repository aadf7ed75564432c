"""Resident memory: what a process of its own holds after a prompt and some decoding."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookup_experts.benchmarks.models import Case, dense_model, table_model
from lookup_experts.benchmarks.processes import in_fresh_process
from lookup_experts.errors import UserError
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.table.opening import open_table
from lookup_experts.table.reader import ReaderStatistics, TableExperts
from lookup_experts.table.store_choice import open_store

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
    """Where the table was read from, as opened."""
    backend: str | None = None
    """What did the reading."""
    cache_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what doesn't apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def measure_memory(
    case: Case, table_folder: Path, store: str, cache_bytes: int, ids: np.ndarray
) -> list[MemoryResult]:
    """Run the dense model and the table model in fresh processes, one after the other."""
    sample = ids[: PROMPT_TOKENS + DECODING_STEPS * 64]
    dense, _ = in_fresh_process(
        "Resident memory", _resident_bytes, case, None, store, cache_bytes, sample
    )
    mole, reader = in_fresh_process(
        "Resident memory", _resident_bytes, case, table_folder, store, cache_bytes, sample
    )
    assert reader is not None
    return [
        MemoryResult("memory", "dense", dense, 0),
        MemoryResult(
            "memory", "mole", mole, mole - dense, reader.store, reader.backend, cache_bytes
        ),
    ]


@dataclass(frozen=True)
class PromptMemoryResult:
    """What the rows of one prompt take at most while its layers are mixed; without a model."""

    what: str
    tokens: int
    unique_ids: int
    peak_bytes: int
    """Beyond what the process held before: buffers, decoded rows and the mixed layer."""
    rows_bytes: int
    """What the rows of all its layers would take at once."""
    store: str
    """Where the table was read from, as opened."""
    backend: str
    """What did the reading."""
    encoding: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def measure_prompt_memory(
    case: Case, table_folder: Path, store: str, tokens: int, ids: np.ndarray
) -> PromptMemoryResult:
    """Read and mix every layer of a prompt of so many tokens in a fresh process."""
    if len(ids) < tokens:
        raise UserError(f"{len(ids)} token ids are too few for a prompt of {tokens}.")
    prompt = ids[:tokens]
    shape = case.layout.shape
    unique_ids = len(np.unique(prompt))
    row_bytes = shape.num_experts * shape.row_size * case.dtype.itemsize
    peak, reader = in_fresh_process(
        "A prompt's memory", _peak_of_prompt, case, table_folder, store, prompt
    )
    return PromptMemoryResult(
        what="memory",
        tokens=tokens,
        unique_ids=unique_ids,
        peak_bytes=peak,
        rows_bytes=unique_ids * shape.num_layers * row_bytes,
        store=reader.store,
        backend=reader.backend,
        encoding=case.encoding,
    )


def _peak_of_prompt(
    case: Case, table_folder: Path, store: str, prompt: np.ndarray
) -> tuple[int, ReaderStatistics]:
    """Bytes, and what the reader did."""
    table = open_table(table_folder)
    opened = open_store(table, store, notify=lambda message: None)
    reader = TableExperts(table, opened, case.dtype)
    with torch.inference_mode():
        _mix_all_layers(reader, prompt[:8])  # what is set up once is no part of a prompt
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        _mix_all_layers(reader, prompt)
        peak = _status_bytes("VmHWM")
    statistics = reader.stats()
    reader.close()
    return peak - before, statistics


def _mix_all_layers(reader: TableExperts, prompt: np.ndarray) -> None:
    rows = reader.rows(torch.from_numpy(prompt)[None])
    shape = reader.table.layout.shape
    weights = torch.full((len(prompt), shape.num_experts), 1 / shape.num_experts)
    for layer in range(shape.num_layers):
        rows.mix(layer, weights)


def _status_bytes(name: str) -> int:
    """A figure of memory in the process's status: VmRSS, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {name}")


def _resident_bytes(
    case: Case, table_folder: Path | None, store: str, cache_bytes: int, ids: np.ndarray
) -> tuple[int, ReaderStatistics | None]:
    """Bytes, and what the reader did; None for the dense model."""
    if table_folder is None:
        model = dense_model(case)
    else:
        model = table_model(case, open_table(table_folder), store, cache_bytes)
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
        cache = cache_of(model(tokens[None, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1))
        past = {cache_argument(model): cache}
        for step in range(DECODING_STEPS):
            column = tokens[None, PROMPT_TOKENS + step, None]
            model(column, use_cache=True, **past)
    resident = proportional_set_size()
    return resident, None if table_folder is None else model.expert_source.stats()


def proportional_set_size() -> int:
    """Bytes of memory that this process holds; shared pages count by their share."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Pss")
