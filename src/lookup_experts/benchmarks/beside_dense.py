"""MoLE that reads its table from disk beside its own dense backbone: what `decode` and `prefill`,
which measure it, have in common.

The models, these two for each way of having linear layers that is asked for, run in one process,
step by step in turn, so that whatever else the machine does meets all of them; a pair of
neighbouring steps gives one ratio, and the median of the ratios is the result.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookup_experts import allocation, console
from lookup_experts.benchmarks.machine import disk_bytes_per_second
from lookup_experts.benchmarks.models import Case, dense_model, random_table, table_model
from lookup_experts.benchmarks.peers import Peer, find_peers
from lookup_experts.benchmarks.results import Result
from lookup_experts.benchmarks.text import TextWindows, id_stream
from lookup_experts.benchmarks.timing import median, pair_ratios, spread
from lookup_experts.model.fast_linears import Int8Linear, check_weights, make_fast
from lookup_experts.table.lanes import check_device
from lookup_experts.table.reader import ReaderStatistics

System = tuple[str, str]
"""How a model has its linear layers, one of `WEIGHTS`, and whether it is `mole` or `dense`."""


@dataclass(frozen=True)
class Comparison:
    """The models, and what they are run on."""

    case: Case
    store: str
    """Where MoLE's records are read from."""
    cache_bytes: int
    """Of its row cache."""
    ids: Path | None
    """See `id_stream`."""
    work: Path
    """Where the table is kept."""
    device: str = "cpu"
    weights: tuple[str, ...] = ("auto",)
    """How linear layers are had; two models for each."""
    with_peers: bool = False
    """Also measure what people would run instead."""

    def peers(self) -> list[Peer]:
        """Other engines with the dense model, where they are asked for.

        Raises:
            UserError: none is installed.
        """
        return find_peers(self.case, self.device, self.work) if self.with_peers else []

    def prepare(self, text: np.ndarray | None = None) -> tuple[dict[System, Any], TextWindows]:
        """The models, and text for them.

        Args:
            text: token ids, in place of those that `ids` names.

        Raises:
            UserError: no such weights, device, shape, encoding or text.
            DiskFullError: the table doesn't fit.
        """
        for weights in self.weights:
            check_weights(weights, self.device)
        check_device(self.device)
        allocation.keep_freed_memory()
        table = random_table(self.case, self.work)
        ids = text
        if ids is None:
            ids = id_stream(self.ids, self.case.layout.shape.vocab_size, self.work)
        models = {}
        for weights in self.weights:
            mole = table_model(
                self.case, table, self.store, self.cache_bytes, console.say, self.device
            )
            models[weights, "mole"] = make_fast(mole, weights, console.say)
            models[weights, "dense"] = make_fast(dense_model(self.case, self.device), weights)
        return models, TextWindows(ids, device=self.device)


def disk_rate(mole: Any) -> float:
    """Bytes per second that the disk of a model's table reaches at best."""
    table = mole.expert_source.table
    return disk_bytes_per_second(table.path(table.shards[0]))


def moles_of(models: dict[System, Any]) -> dict[str, Any]:
    """The models with a table, by how they have their linear layers."""
    return {weights: model for (weights, system), model in models.items() if system == "mole"}


def speeds(
    what: str,
    size: dict[str, int],
    models: dict[System, Any],
    seconds: dict[System, list[float]],
    read: dict[str, ReaderStatistics],
    from_disk: int,
    bytes_per_second: float,
) -> list[Result]:
    """What was measured, of the dense model and then of MoLE, for each kind of linear layers.

    Args:
        what: `decode` or `prefill`.
        size: `batch` of a step, or `tokens` of a prompt.
        models: what was run.
        seconds: of every step, by model; steps of one place are neighbours.
        read: what the steps of each MoLE asked of its reader.
        from_disk: bytes that came from the disk meanwhile, for all of them.
        bytes_per_second: what the disk reaches at best.

    Returns:
        `weights` tells how linear layers are had, `ratio_to_dense` compares models that have them
        alike, and `speedup_over_plain` a model with itself as torch has them. `spread` is the 10th
        and 90th percentile of the ratios; `device` a GPU's name; `page_cache_bypassed` tells
        whether the kernel brought from the disk at least what the store says it read;
        `share_of_disk_bandwidth` is what the store read over the time of the steps, of what the
        disk reaches at best. What doesn't apply is None.
    """
    all_read = sum(each.bytes_read for each in read.values())

    def common(weights: str, system: str) -> Result:
        model, taken = models[weights, system], seconds[weights, system]
        ratios = pair_ratios(taken, seconds[weights, "dense"])
        plain = seconds.get(("plain", system))
        cuda = model.device.type == "cuda"
        return {
            "what": what,
            "system": system,
            "weights": weights,
            "ms_per_step": median(taken) * 1e3,
            "tokens_per_second": size.get("batch", size.get("tokens", 0)) / median(taken),
            "ratio_to_dense": median(ratios),
            "spread": spread(ratios),
            "speedup_over_plain": median(pair_ratios(plain, taken)) if plain else None,
            "pairs": len(ratios),
            **size,
            "device": torch.cuda.get_device_name(model.device) if cuda else None,
        }

    def of_table(weights: str) -> Result:
        mole, statistics = models[weights, "mole"], read[weights]
        batches = max(1, statistics.batches)
        bytes_per_step = statistics.bytes_read / batches
        past_page_cache = statistics.store == "direct"
        rate = bytes_per_step / median(seconds[weights, "mole"])
        layout = mole.expert_source.table.layout
        return {
            "store": statistics.store,
            "backend": statistics.backend,
            "form": mole.lookup_settings.row_form,
            "row_size": layout.shape.row_size,
            "encoding": layout.encoding.name,
            "cache_bytes": statistics.cache_bytes,
            "bytes_per_step": bytes_per_step,
            "hit_rate": (
                statistics.cache_hits / statistics.ids_unique if statistics.ids_unique else None
            ),
            "wait_ms": statistics.wait_seconds / batches * 1e3,
            "page_cache_bypassed": from_disk >= all_read if past_page_cache else None,
            "share_of_disk_bandwidth": rate / bytes_per_second if past_page_cache else None,
        }

    results = []
    for weights in read:
        results += [common(weights, "dense"), common(weights, "mole") | of_table(weights)]
    return results


def weight_bytes(model: Any, batch: int) -> int:
    """What a forward pass of `batch` sequences of one token reads of a model's weights."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    others = sum(weight.nbytes for weight in model.parameters() if weight is not embedding)
    if head.weight is not embedding:
        return others + batch * embedding[0].nbytes
    return others + (head.codes.nbytes if isinstance(head, Int8Linear) else embedding.nbytes)


def draw_ratios(results: list[Result], path: Path) -> None:
    """Time over that of the dense backbone."""
    from lookup_experts.benchmarks.plots import draw_bars

    found = [result for result in results if result["system"] == "mole"]
    draw_bars(
        path,
        f"{found[0]['what']}: {found[0]['encoding']} table, store {found[0]['store']}",
        "time / dense",
        [_size_and_weights(result) for result in found],
        [result["ratio_to_dense"] for result in found],
        spreads=[result["spread"] for result in found],
        mark=1.0,
    )


def _size_and_weights(result: Result) -> str:
    size = f"batch {result['batch']}" if "batch" in result else f"{result['tokens']} tokens"
    return size if result["weights"] == "auto" else f"{size}, {result['weights']}"
