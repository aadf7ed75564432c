"""Memory: what a process of its own holds after a prompt and some decoding, dense and MoLE; and
what the rows of one prompt take at most."""

from pathlib import Path

import numpy as np
import torch

from lookup_experts.benchmarks.models import Case, dense_model, random_table, table_model
from lookup_experts.benchmarks.processes import (
    high_water_mark,
    in_fresh_process,
    proportional_set_size,
    reset_high_water_mark,
)
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import id_stream
from lookup_experts.errors import UserError
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.model.forms import shapes_of_layer
from lookup_experts.table.opening import open_table
from lookup_experts.table.reader import ReaderStatistics, TableReader
from lookup_experts.table.store_choice import open_store

PROMPT_TOKENS = 512
DECODING_STEPS = 128


def bench_memory(
    case: Case,
    store: str,
    cache_bytes: int,
    prompt: int | None,
    ids: Path | None,
    work: Path,
    results: Results,
) -> None:
    """`mole bench memory`; with `prompt`, of the rows of a prompt of so many tokens instead."""
    folder = random_table(case, work).folder
    stream = id_stream(ids, case.layout.shape.vocab_size, work)
    if prompt:
        results.add(measure_prompt(case, folder, store, prompt, stream))
    else:
        results.add(*measure_models(case, folder, store, cache_bytes, stream))
    results.finish()


def measure_models(
    case: Case, table: Path, store: str, cache_bytes: int, ids: np.ndarray
) -> tuple[Result, Result]:
    """Run the dense model and the table model in fresh processes, one after the other.

    Returns:
        `resident_bytes` is the proportional set size, as the kernel counts it; `store` and
        `backend` are what was opened; `reader_bytes`: of the weights that read the rows.
    """
    sample = ids[: PROMPT_TOKENS + DECODING_STEPS * 64]
    (dense, _), (mole, reader) = (
        in_fresh_process(
            "Resident memory", _after_decoding, case, folder, store, cache_bytes, sample
        )
        for folder in (None, table)
    )
    assert reader is not None
    common: Result = {"what": "memory"}
    return (
        common | {"system": "dense", "resident_bytes": dense, "beyond_dense_bytes": 0},
        common
        | {
            "system": "mole",
            "resident_bytes": mole,
            "beyond_dense_bytes": mole - dense,
            "store": reader.store,
            "backend": reader.backend,
            "cache_bytes": cache_bytes,
            "form": case.form,
            "row_size": case.layout.shape.row_size,
            "reader_bytes": reader_bytes(case),
        },
    )


def reader_bytes(case: Case) -> int:
    """Of all layers' weights that read the rows."""
    _, reader = shapes_of_layer(case.settings, case.sizes)
    numbers = sum(weight.numel() for weight in reader.parameters())
    return case.layout.shape.num_layers * numbers * case.dtype.itemsize


def _after_decoding(
    case: Case, table: Path | None, store: str, cache_bytes: int, ids: np.ndarray
) -> tuple[int, ReaderStatistics | None]:
    """Bytes, and what the reader did; None for the dense model."""
    if table is None:
        model = dense_model(case)
    else:
        model = table_model(case, open_table(table), store, cache_bytes)
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
        cache = cache_of(model(tokens[None, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1))
        past = {cache_argument(model): cache}
        for step in range(DECODING_STEPS):
            column = tokens[None, PROMPT_TOKENS + step, None]
            model(column, use_cache=True, **past)
    resident = proportional_set_size()
    return resident, None if table is None else model.expert_source.stats()


def measure_prompt(case: Case, table: Path, store: str, tokens: int, ids: np.ndarray) -> Result:
    """Read and mix every layer of a prompt of so many tokens in a fresh process, without a model.

    Returns:
        `peak_bytes`, beyond what the process held before: buffers, decoded rows and the mixed
        layer; `rows_bytes`: what the rows of all its layers would take at once.
    """
    if len(ids) < tokens:
        raise UserError(f"{len(ids)} token ids are too few for a prompt of {tokens}.")
    prompt = ids[:tokens]
    shape = case.layout.shape
    unique_ids = len(np.unique(prompt))
    row_bytes = shape.num_experts * shape.row_size * case.dtype.itemsize
    peak, reader = in_fresh_process("A prompt's memory", peak_of_prompt, case, table, store, prompt)
    return {
        "what": "memory",
        "tokens": tokens,
        "unique_ids": unique_ids,
        "peak_bytes": peak,
        "rows_bytes": unique_ids * shape.num_layers * row_bytes,
        "store": reader.store,
        "backend": reader.backend,
        "form": case.form,
        "row_size": shape.row_size,
        "encoding": case.encoding,
    }


def peak_of_prompt(
    case: Case, folder: Path, store: str, prompt: np.ndarray
) -> tuple[int, ReaderStatistics]:
    """Bytes, and what the reader did; to be called in a fresh process."""
    table = open_table(folder)
    reader = TableReader(table, open_store(table, store, notify=lambda message: None), case.dtype)
    with torch.inference_mode():
        _mix_all_layers(reader, prompt[:8])  # what is set up once is no part of a prompt
        before = reset_high_water_mark()
        _mix_all_layers(reader, prompt)
        peak = high_water_mark()
    statistics = reader.stats()
    reader.close()
    return peak - before, statistics


def _mix_all_layers(reader: TableReader, prompt: np.ndarray) -> None:
    rows = reader.rows(torch.from_numpy(prompt)[None])
    shape = reader.table.layout.shape
    weights = torch.full((len(prompt), shape.num_experts), 1 / shape.num_experts)
    for layer in range(shape.num_layers):
        rows.mix(layer, weights)
