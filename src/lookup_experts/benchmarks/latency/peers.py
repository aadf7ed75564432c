"""The ways others have to keep experts elsewhere, as they are; what we add is the memory limit.

Both peers read files through the kernel's page cache, which would soon hold all experts: more
memory than the other systems are given. So after each forward pass the pages of all experts but
those used last, as many as fit the budget, are taken back, outside of the measured time. That is
what the kernel does under a memory limit, done exactly and without the rights that a limit needs.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.benchmarks.bandwidth import DiskCounter
from lookup_experts.benchmarks.latency.systems import Counts
from lookup_experts.errors import UserError
from lookup_experts.offloading.cache import Compute
from lookup_experts.offloading.expert_table import matrices_of
from lookup_experts.offloading.experts import mix_visited
from lookup_experts.table.format import Table
from lookup_experts.table.store import open_shards

Expert = tuple[int, int]
"""Layer, and number in it."""


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, and their mapping if they stay mapped; multiples of pages."""

    fd: int
    offset: int
    num_bytes: int
    mapped: mmap.mmap | None = None

    def drop(self) -> None:
        """Take the pages back from this process and from the page cache."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED, self.offset, self.num_bytes)
        os.posix_fadvise(self.fd, self.offset, self.num_bytes, os.POSIX_FADV_DONTNEED)


class PageBudget:
    """Keeps the pages of the experts used last, up to a number of experts.

    Args:
        most: how many experts' pages may stay.
        ranges_of: where an expert's numbers are.
    """

    def __init__(self, most: int, ranges_of: Callable[[Expert], Sequence[FileRange]]) -> None:
        self._most, self._ranges_of = most, ranges_of
        self._cached: OrderedDict[Expert, None] = OrderedDict()
        self._used = self._missed = 0
        self._disk = DiskCounter()

    def use(self, expert: Expert) -> None:
        """An expert is about to be read, from the page cache or from the disk."""
        self._used += 1
        self._missed += expert not in self._cached
        self._cached[expert] = None
        self._cached.move_to_end(expert)

    def limit_memory(self) -> None:
        """Take back the pages of all but the experts used last."""
        while len(self._cached) > self._most:
            expert, _ = self._cached.popitem(last=False)
            for part in self._ranges_of(expert):
                part.drop()

    def take_counts(self) -> Counts:
        """Since the last time; the bytes are the kernel's own count of what the disk gave."""
        counts = Counts(
            bytes_loaded=self._disk.bytes_read(),
            experts_used=self._used,
            experts_loaded=self._missed,
        )
        self._used = self._missed = 0
        self._disk = DiskCounter()
        return counts


# ------------------------------------------------------------------------------ memory-mapped


class MappedExperts(nn.Module):
    """The experts of one layer, computed straight from a mapping of their file."""

    def __init__(self, layer: int, matrices: list[tuple[Tensor, Tensor]], pages: PageBudget):
        super().__init__()
        self._layer, self._matrices, self._pages = layer, matrices, pages

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """[S, d], [S, k], [S, k] -> [S, d]"""
        return mix_visited(hidden, selected, weights, len(self._matrices), self._visit)

    def _visit(self, needed: Sequence[int], compute: Compute) -> None:
        for expert in needed:
            self._pages.use((self._layer, expert))
            compute(expert, *self._matrices[expert])


def map_experts(model: Any, table: Table, budget_bytes: int) -> PageBudget:
    """Put mapped experts in place of a model's own."""
    layout, num_experts = table.layout, model.config.num_experts
    fds = open_shards(table, 0, ExitStack())  # for as long as this process lives
    maps = [
        mmap.mmap(fd, shard.bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for fd, shard in zip(fds, table.shards, strict=True)
    ]
    places = [
        FileRange(fd, layout.record_offset(row), layout.stride, mapped)
        for fd, mapped, shard in zip(fds, maps, table.shards, strict=True)
        for row in range(shard.num_ids)
    ]
    for place in places:
        place.drop()
    pages = PageBudget(
        budget_bytes // layout.stride,
        lambda expert: [places[expert[0] * num_experts + expert[1]]],
    )
    matrices = [
        matrices_of(
            torch.frombuffer(place.mapped, dtype=torch.uint8, count=layout.stride,
                             offset=place.offset),
            layout,
        )
        for place in places
    ]  # fmt: skip
    for layer, ffn in enumerate(model.moe_layers):
        first = layer * num_experts
        ffn.experts = MappedExperts(layer, matrices[first : first + num_experts], pages)
    return pages


# ---------------------------------------------------------------------------------- accelerate


@dataclass(frozen=True)
class AcceleratePeer:
    """A model that accelerate keeps the experts of on disk."""

    model: Any
    pages: PageBudget

    @property
    def take_counts(self) -> Callable[[], Counts]:
        """See `PageBudget`."""
        return self.pages.take_counts

    @property
    def limit_memory(self) -> Callable[[], None]:
        """See `PageBudget`."""
        return self.pages.limit_memory


def dispatch_by_accelerate(model: Any, folder: Path, budget_bytes: int) -> AcceleratePeer:
    """Let accelerate keep the experts in `folder` and everything else where the model runs.

    Raises:
        UserError: accelerate isn't installed.
    """
    try:
        from accelerate import dispatch_model
    except ImportError as error:
        raise UserError(
            "The systems -accelerate need accelerate: pip install accelerate."
        ) from error
    expert_bytes = sum(weight[0].nbytes for weight in model.moe_layers[0].experts.parameters())
    device = "cpu" if model.device.type == "cpu" else (model.device.index or 0)
    dispatched = dispatch_model(model, _device_map(model, device), offload_dir=str(folder))
    files = _OffloadedFiles(folder, model)
    pages = PageBudget(budget_bytes // expert_bytes, files.ranges)
    for layer, ffn in enumerate(model.moe_layers):
        ffn.experts.register_forward_pre_hook(_noting(layer, pages))
        for expert in range(model.config.num_experts):
            for part in files.ranges((layer, expert)):
                part.drop()
    return AcceleratePeer(dispatched, pages)


def _device_map(model: Any, device: str | int) -> dict[str, str | int]:
    """The experts on disk, every other module with weights on the device."""
    places: dict[str, str | int] = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            places[name] = "disk"
        elif not list(module.children()) and ".experts." not in name:
            places[name] = device
    return places


def _noting(layer: int, pages: PageBudget) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for expert in torch.unique(inputs[1]).tolist():
            pages.use((layer, expert))

    return note


class _OffloadedFiles:
    """Accelerate's files: one per tensor, as it is in memory."""

    def __init__(self, folder: Path, model: Any) -> None:
        self._fds: list[list[int]] = []
        for layer in range(len(model.moe_layers)):
            names = [f"model.layers.{layer}.mlp.experts.{kind}_proj.dat" for kind in ("up", "down")]
            self._fds.append([os.open(folder / name, os.O_RDWR) for name in names])
        for fd in (fd for fds in self._fds for fd in fds):
            os.fsync(fd)  # pages that aren't written yet can't be taken back
        self._num_experts = model.config.num_experts

    def ranges(self, expert: Expert) -> list[FileRange]:
        """Of both matrices."""
        layer, number = expert
        sizes = [os.fstat(fd).st_size // self._num_experts for fd in self._fds[layer]]
        return [
            FileRange(fd, number * size, size)
            for fd, size in zip(self._fds[layer], sizes, strict=True)
        ]
