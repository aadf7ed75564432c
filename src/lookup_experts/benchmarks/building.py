"""Building a table: against the bare matrix products that it can't do without."""

import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookup_experts.benchmarks.models import Case
from lookup_experts.benchmarks.timing import median
from lookup_experts.generation.folding import plan_folding
from lookup_experts.model.experts import LayerExperts
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.model.gateless_llama import paper_config
from lookup_experts.table.build import build_table
from lookup_experts.table.progress import Progress

MATMUL_SAMPLES = 5


@dataclass(frozen=True)
class BuildResult:
    """One table, built from experts with random weights."""

    what: str
    encoding: str
    table_bytes: int
    seconds: float
    matmul_seconds: float
    """What the experts' matrix products alone take: the median of samples all over the build."""
    ratio_to_matmul: float
    peak_bytes_beyond_model: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def measure_build(case: Case, folder: Path, progress: Progress | None = None) -> BuildResult:
    """Build the case's table in `folder`, which must not exist; it is left there.

    For a true peak of memory, run it in a process of its own.
    """
    embedding, layers = random_experts(case)
    before = _peak_bytes()
    plan = plan_folding(embedding, layers, case.layout.shape.vocab_size, case.layout.encoding)
    samples: list[float] = []
    num_chunks = sum(1 for _ in plan.chunks())
    every = max(1, num_chunks // MATMUL_SAMPLES)
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
    per_chunk = median(samples)
    matmul_seconds = per_chunk * case.layout.shape.vocab_size / plan.chunk_ids
    return BuildResult(
        what="build",
        encoding=case.encoding,
        table_bytes=case.layout.table_bytes,
        seconds=seconds,
        matmul_seconds=matmul_seconds,
        ratio_to_matmul=seconds / matmul_seconds,
        peak_bytes_beyond_model=_peak_bytes() - before,
    )


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


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
