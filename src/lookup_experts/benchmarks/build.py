"""Building a table: against the bare matrix products that it can't do without."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookup_experts import allocation, console
from lookup_experts.benchmarks.models import Case
from lookup_experts.benchmarks.plots import draw_bars
from lookup_experts.benchmarks.processes import high_water_mark
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.timing import Advance, median
from lookup_experts.errors import UserError
from lookup_experts.generation.folding import plan_folding
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.model.gateless_llama import paper_config
from lookup_experts.table.build import build_table

MATMUL_SAMPLES = 5


def bench_build(case: Case, work: Path, results: Results) -> None:
    """`mole bench build`: the table stays in `work` for the other benchmarks' taking."""
    allocation.keep_freed_memory()  # as `mole reparameterize` does
    folder = work / case.built_name
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it, or give another --work.")
    with console.progress_bar("Building") as progress:
        found = measure_build(case, folder, progress)
    results.add(found)
    results.finish(draw)


def measure_build(case: Case, folder: Path, progress: Advance) -> Result:
    """Build the case's table in `folder`, which must not exist; it is left there.

    For a true peak of memory, run it in a process of its own.

    Returns:
        `matmul_seconds`: what the experts' matrix products alone take, the median of samples all
        over the build; they aren't in `seconds`.
    """
    embedding, layers = random_experts(case)
    before = high_water_mark()
    layout = case.layout
    plan = plan_folding(embedding, layers, layout.shape.vocab_size, layout.encoding)
    samples: list[float] = []
    every = max(1, sum(1 for _ in plan.chunks()) // MATMUL_SAMPLES)
    calls = 0
    evaluate = evaluate_experts(embedding, layers)

    def rows_of(ids: torch.Tensor) -> Any:
        nonlocal calls
        if calls % every == 0 and len(ids) == plan.chunk_ids:
            samples.append(_matmul_seconds(embedding(ids), layers))
        calls += 1
        return evaluate(ids)

    started_at = time.perf_counter()
    build_table(folder, plan, rows_of, progress)
    seconds = time.perf_counter() - started_at - sum(samples)
    matmul_seconds = median(samples) * layout.shape.vocab_size / plan.chunk_ids
    return {
        "what": "build",
        "encoding": case.encoding,
        "table_bytes": layout.table_bytes,
        "seconds": seconds,
        "matmul_seconds": matmul_seconds,
        "ratio_to_matmul": seconds / matmul_seconds,
        "peak_bytes_beyond_model": high_water_mark() - before,
    }


def random_experts(case: Case) -> tuple[nn.Embedding, list[LayerExperts]]:
    """An embedding and the experts of every layer, with random weights."""
    config = paper_config(case.shape)
    torch.manual_seed(0)
    embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=case.dtype)
    layers = []
    for _ in range(config.num_hidden_layers):
        with torch.device("meta"):
            experts = LayerExperts(
                case.num_experts, config.hidden_size, config.intermediate_size, config.hidden_size
            )
        experts = experts.to(case.dtype).to_empty(device="cpu")
        for weight in experts.parameters():
            nn.init.normal_(weight, 0.0, 0.02)
        layers.append(experts)
    return embedding, layers


@torch.inference_mode()
def _matmul_seconds(embeddings: torch.Tensor, layers: list[LayerExperts]) -> float:
    """The two products of every expert of every layer on one chunk, and nothing else."""
    started_at = time.perf_counter()
    for experts in layers:
        hidden = torch.matmul(embeddings, experts.up_proj.transpose(1, 2))
        torch.bmm(hidden, experts.down_proj.transpose(1, 2))
    return time.perf_counter() - started_at


def draw(results: list[Result], path: Path) -> None:
    """Seconds beside those of the bare matrix products."""
    labels, heights = [], []
    for result in results:
        labels += ["matrix products", f"{result['encoding']} table"]
        heights += [result["matmul_seconds"], result["seconds"]]
    draw_bars(path, "Building a table", "seconds", labels, heights)
