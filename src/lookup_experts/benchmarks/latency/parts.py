"""Batch sizes that were measured before an interruption, so that the same command goes on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookup_experts import __version__
from lookup_experts.benchmarks.latency.models import Plan
from lookup_experts.benchmarks.latency.systems import System
from lookup_experts.training.files import atomic_write


class Parts:
    """The results of one command, batch size by batch size, in files of the work folder.

    Args:
        plan, systems, *settings: what is measured; with another of them, or another version of
            this package, nothing is taken over.
    """

    def __init__(self, plan: Plan, systems: Sequence[System], *settings: object) -> None:
        names = [system.name for system in systems]
        what = [__version__, plan.shape, plan.cache_bytes, plan.device, str(plan.dtype), names]
        key = hashlib.sha256(json.dumps([*what, *map(str, settings)]).encode()).hexdigest()[:12]
        self._folder = plan.work / f"latency-{key}"

    def keep(self, batch: int, results: list[dict[str, Any]]) -> None:
        """Write the results of a batch size, all or nothing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path(batch)) as file:
            file.write(json.dumps(results).encode())

    def has(self, batch: int) -> bool:
        """Whether this batch size was measured."""
        return self._path(batch).exists()

    def results(self, batches: Sequence[int]) -> list[dict[str, Any]]:
        """Of all batch sizes, in order."""
        return [result for batch in batches for result in json.loads(self._path(batch).read_text())]

    def remove(self, batches: Sequence[int]) -> None:
        """The report is written; the next run measures anew."""
        for batch in batches:
            self._path(batch).unlink()
        self._folder.rmdir()

    def _path(self, batch: int) -> Path:
        return self._folder / f"batch-{batch}.json"
