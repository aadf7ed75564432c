"""Experts where the model runs, within a budget of bytes; the others come when they are needed.

The memory is slots of one expert each. A few slots are in transit: they hold experts that are on
their way, or that a batch needs beyond what its layer may keep. The rest is shared out evenly to
the layers, and keeps for each the experts it used last: with two per layer, those of the previous
step, as in the paper (arXiv 2503.15798, section 4.3).

Why by layer, and not the least recently used of all: a model uses its layers in a circle, so what
was used least recently is what is needed next. For the same reason an expert that the present batch
uses is never given up for another that it uses too; each batch would push out all that is kept.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lookup_experts.errors import TableError, UserError
from lookup_experts.offloading.expert_table import matrices_of
from lookup_experts.offloading.loading import open_loader
from lookup_experts.table.store import PendingRead, RecordStore
from lookup_experts.units import format_bytes

IN_TRANSIT = 4
"""Slots in transit where the budget allows: enough reads at once to keep a disk busy."""

Compute = Callable[[int, Tensor, Tensor], None]
"""Called with an expert's number in its layer, its up_proj [D, d] and its down_proj [d, D]."""


@dataclass
class OffloadStatistics:
    """What was asked of the cache since it was opened or reset; experts are counted per layer
    and forward pass, each once."""

    visits: int = 0
    """Layers times forward passes."""
    experts_used: int = 0
    experts_loaded: int = 0
    bytes_loaded: int = 0
    wait_seconds: float = 0.0
    """The host waited for experts. On a GPU with experts in RAM its queue waits instead."""


class ExpertCache:
    """Gives the experts of all layers.

    Args:
        store: over a table of experts (`expert_table.py`); closed with the cache.
        num_layers: L.
        budget_bytes: of memory where the model runs; at least one expert's.
        device: where the model runs.

    Raises:
        UserError: the budget is too small.
    """

    def __init__(
        self,
        store: RecordStore,
        num_layers: int,
        budget_bytes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        stride, total = store.layout.stride, store.layout.shape.vocab_size
        slots = min(budget_bytes // stride, total)
        if slots < 1:
            raise UserError(
                f"A cache of {format_bytes(budget_bytes)} holds no expert; one takes "
                f"{format_bytes(stride)}, and decoding is best with at least the selected ones of "
                "every layer."
            )
        self.store, self.device = store, torch.device(device)
        self.in_transit = 0 if slots == total else min(IN_TRANSIT, max(1, slots // 4))
        kept = slots - self.in_transit
        self.kept_per_layer = [
            kept // num_layers + (layer < kept % num_layers) for layer in range(num_layers)
        ]
        self._experts_per_layer = total // num_layers
        self._loader = open_loader(store, slots, self.device)
        self._matrices = [matrices_of(slot, store.layout) for slot in self._loader.slots]
        self._free = list(range(slots))
        self._resident: list[dict[int, int]] = [{} for _ in range(num_layers)]
        """Of each layer, the slots of the experts that are there, the last used at the end."""
        self._lock = threading.Lock()
        self.statistics = OffloadStatistics()

    @property
    def num_bytes(self) -> int:
        """What the slots take."""
        return len(self._matrices) * self.store.layout.stride

    def visit(self, layer: int, needed: Sequence[int], compute: Compute) -> None:
        """Call `compute` for each expert: those that are here first, while the others are read,
        then those as they arrive.

        Args:
            layer: from 0.
            needed: numbers of experts of this layer, all different.

        Raises:
            TableError: an expert can't be read. What was computed is then not of use; the cache
                goes on.
        """
        with self._lock:
            self._visit(layer, needed, compute)

    def _visit(self, layer: int, needed: Sequence[int], compute: Compute) -> None:
        resident = self._resident[layer]
        here = [expert for expert in needed if expert in resident]
        missing = deque(expert for expert in needed if expert not in resident)
        self._count(len(needed), len(missing))
        surplus = len(resident) + len(missing) - self.kept_per_layer[layer]
        self._make_room(resident, set(needed), max(0, surplus))
        under_way: deque[tuple[int, int, PendingRead]] = deque()
        try:
            self._begin(layer, missing, under_way)
            for expert in here:
                resident[expert] = slot = resident.pop(expert)  # the last used, now
                compute(expert, *self._matrices[slot])
            while under_way:
                expert, slot, read = under_way[0]
                self._wait(read)
                under_way.popleft()
                try:
                    compute(expert, *self._matrices[slot])
                finally:
                    self._keep_or_free(layer, expert, slot)
                self._begin(layer, missing, under_way)
        finally:
            for _, slot, read in under_way:  # only after an error
                with suppress(TableError):
                    read.wait()
                self._free.append(slot)

    def _make_room(self, resident: dict[int, int], needed: set[int], surplus: int) -> None:
        """Give up this many of the layer's experts, or as many as the batch doesn't use."""
        unused = [expert for expert in resident if expert not in needed]
        for expert in unused[:surplus]:
            self._free.append(resident.pop(expert))

    def _begin(
        self, layer: int, missing: deque[int], under_way: deque[tuple[int, int, PendingRead]]
    ) -> None:
        """Begin as many reads as there are free slots."""
        while missing and self._free:
            number = layer * self._experts_per_layer + missing[0]
            read = self._loader.begin(number, self._free[-1])
            under_way.append((missing.popleft(), self._free.pop(), read))

    def _wait(self, read: PendingRead) -> None:
        started_at = time.perf_counter()
        read.wait()
        self.statistics.wait_seconds += time.perf_counter() - started_at

    def _keep_or_free(self, layer: int, expert: int, slot: int) -> None:
        resident = self._resident[layer]
        if len(resident) < self.kept_per_layer[layer]:
            resident[expert] = slot
        else:
            self._free.append(slot)

    def _count(self, needed: int, missing: int) -> None:
        counts = self.statistics
        counts.visits += 1
        counts.experts_used += needed
        counts.experts_loaded += missing
        counts.bytes_loaded += missing * self.store.layout.stride

    def reset_statistics(self) -> None:
        """Count from zero."""
        self.statistics = OffloadStatistics()

    def close(self) -> None:
        """Give back the memory and close the store."""
        with self._lock:
            self._matrices.clear()
            self._loader.close()
            self.store.close()
