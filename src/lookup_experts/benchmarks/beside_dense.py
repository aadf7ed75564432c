"""MoLE that reads its table from disk beside its own dense backbone: what `decode` and `prefill`,
which measure it, have in common.

Both models run in one process, step by step in turn, so that whatever else the machine does meets
both; a pair of neighbouring steps gives one ratio, and the median of the ratios is the result.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookup_experts import allocation, console
from lookup_experts.benchmarks.machine import disk_bytes_per_second
from lookup_experts.benchmarks.models import Case, dense_model, random_table, table_model
from lookup_experts.benchmarks.results import Result
from lookup_experts.benchmarks.text import TextWindows, id_stream
from lookup_experts.benchmarks.timing import median, pair_ratios, spread
from lookup_experts.table.lanes import check_device
from lookup_experts.table.reader import ReaderStatistics


@dataclass(frozen=True)
class Comparison:
    """Two models, and what they are run on."""

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

    def prepare(self, text: np.ndarray | None = None) -> tuple[dict[str, Any], TextWindows]:
        """The models by name, `mole` and `dense`, and text for them.

        Args:
            text: token ids, in place of those that `ids` names.

        Raises:
            UserError: no such device, shape, encoding or text.
            DiskFullError: the table doesn't fit.
        """
        check_device(self.device)
        allocation.keep_freed_memory()
        table = random_table(self.case, self.work)
        ids = text
        if ids is None:
            ids = id_stream(self.ids, self.case.layout.shape.vocab_size, self.work)
        dense = dense_model(self.case, self.device)
        mole = table_model(self.case, table, self.store, self.cache_bytes, console.say, self.device)
        return {"mole": mole, "dense": dense}, TextWindows(ids, device=self.device)


def disk_rate(mole: Any) -> float:
    """Bytes per second that the disk of a model's table reaches at best."""
    table = mole.expert_source.table
    return disk_bytes_per_second(table.path(table.shards[0]))


def speeds(
    what: str,
    size: dict[str, int],
    mole: Any,
    seconds: dict[str, list[float]],
    read: ReaderStatistics,
    from_disk: int,
    bytes_per_second: float,
) -> tuple[Result, Result]:
    """What was measured of the dense model and of MoLE.

    Args:
        what: `decode` or `prefill`.
        size: `batch` of a step, or `tokens` of a prompt.
        mole: the model with its table.
        seconds: of every step, by model; steps of one place are pairs.
        read: what these steps asked of the reader.
        from_disk: bytes that came from the disk meanwhile.
        bytes_per_second: what the disk reaches at best.

    Returns:
        `spread` is the 10th and 90th percentile of the ratios; `device` a GPU's name;
        `page_cache_bypassed` tells whether the kernel brought from the disk at least what the store
        says it read; `share_of_disk_bandwidth` is what the store read over the time of the steps,
        of what the disk reaches at best. What doesn't apply is None.
    """
    reader = mole.expert_source
    gpu = torch.cuda.get_device_name(reader.device) if reader.device.type == "cuda" else None
    batches = max(1, read.batches)
    bytes_per_step = read.bytes_read / batches
    past_page_cache = read.store == "direct"

    def common(system: str) -> Result:
        ratios = pair_ratios(seconds[system], seconds["dense"])
        return {
            "what": what,
            "system": system,
            "ms_per_step": median(seconds[system]) * 1e3,
            "ratio_to_dense": median(ratios),
            "spread": spread(ratios),
            "pairs": len(ratios),
            **size,
            "device": gpu,
        }

    return common("dense"), common("mole") | {
        "store": read.store,
        "backend": read.backend,
        "form": mole.lookup_settings.row_form,
        "row_size": reader.table.layout.shape.row_size,
        "encoding": reader.table.layout.encoding.name,
        "cache_bytes": read.cache_bytes,
        "bytes_per_step": bytes_per_step,
        "hit_rate": read.cache_hits / read.ids_unique if read.ids_unique else None,
        "wait_ms": read.wait_seconds / batches * 1e3,
        "page_cache_bypassed": from_disk >= read.bytes_read if past_page_cache else None,
        "share_of_disk_bandwidth": (
            bytes_per_step / median(seconds["mole"]) / bytes_per_second if past_page_cache else None
        ),
    }


def draw_ratios(results: list[Result], path: Path) -> None:
    """Time over that of the dense backbone."""
    from lookup_experts.benchmarks.plots import draw_bars

    found = [result for result in results if result["system"] != "dense"]
    draw_bars(
        path,
        f"{found[0]['what']}: {found[0]['encoding']} table, store {found[0]['store']}",
        "time / dense",
        [
            f"batch {result['batch']}" if "batch" in result else f"{result['tokens']} tokens"
            for result in found
        ],
        [result["ratio_to_dense"] for result in found],
        spreads=[result["spread"] for result in found],
        mark=1.0,
    )
