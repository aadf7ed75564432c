"""The ways others have to keep experts elsewhere, as they are; what we add is the memory limit.

Both peers read files through the kernel's page cache, which would soon hold all experts: more
memory than the other systems are given. So after each forward pass the pages of all experts but
those used last, as many as fit the budget, are taken back, outside of the measured time; those that
the kernel read ahead unasked as well. That is what it does under a memory limit, done exactly and
without the rights that a limit needs.
"""

import mmap
import os
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.benchmarks.processes import DiskCounter
from lookup_experts.errors import UserError
from lookup_experts.offloading.cache import Compute
from lookup_experts.offloading.expert_table import matrices_of
from lookup_experts.offloading.experts import mix_visited
from lookup_experts.table.opening import Table, open_shards

Expert = tuple[int, int]
"""Layer, and number in it."""


@dataclass
class Counts:
    """What a system did for one forward pass."""

    bytes_loaded: int = 0
    stall_seconds: float = 0.0
    experts_used: int = 0
    """Summed over layers."""
    experts_loaded: int = 0


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, and their mapping if they stay mapped; multiples of pages."""

    fd: int
    offset: int
    num_bytes: int
    mapped: mmap.mmap | None = None

    def announce(self) -> None:
        """Have the kernel start to read what isn't in the page cache."""
        assert self.mapped is not None
        self.mapped.madvise(mmap.MADV_WILLNEED, self.offset, self.num_bytes)

    def drop(self) -> None:
        """Take the pages back from this process and from the page cache."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED, self.offset, self.num_bytes)
        os.posix_fadvise(self.fd, self.offset, self.num_bytes, os.POSIX_FADV_DONTNEED)


class PageBudget:
    """Keeps the pages of the experts used last, up to a number of experts.

    Args:
        most: how many experts' pages may stay.
        places: where the numbers of each expert are; nothing of them stays at first.
    """

    def __init__(self, most: int, places: Mapping[Expert, Sequence[FileRange]]) -> None:
        self._most, self._places = most, places
        self._cached: OrderedDict[Expert, None] = OrderedDict()
        self._used = self._missed = 0
        self._disk = DiskCounter()
        self.limit_memory()

    def use(self, expert: Expert) -> None:
        """An expert is about to be read, from the page cache or from the disk."""
        self._used += 1
        self._missed += expert not in self._cached
        self._cached[expert] = None
        self._cached.move_to_end(expert)

    def limit_memory(self) -> None:
        """Take back the pages of all but the experts used last."""
        while len(self._cached) > self._most:
            self._cached.popitem(last=False)
        for expert, parts in self._places.items():
            if expert not in self._cached:
                for part in parts:
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
    """The experts of one layer, computed straight from a mapping of their file.

    The kernel is asked for all that a batch needs before the first is computed, and to read nothing
    else ahead: better than page faults, one after the other, as in llama.cpp.
    """

    def __init__(
        self,
        layer: int,
        places: list[FileRange],
        matrices: list[tuple[Tensor, Tensor]],
        pages: PageBudget,
    ) -> None:
        super().__init__()
        self._layer, self._places, self._matrices = layer, places, matrices
        self._pages = pages

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """[S, d], [S, k], [S, k] -> [S, d]"""
        visit = partial(self._visit, hidden.device)
        return mix_visited(hidden, selected, weights, len(self._matrices), visit)

    def _visit(self, device: torch.device, needed: Sequence[int], compute: Compute) -> None:
        for expert in needed:
            self._pages.use((self._layer, expert))
            self._places[expert].announce()
        for expert in needed:
            up, down = self._matrices[expert]
            compute(expert, up.to(device), down.to(device))  # as they are, on the CPU


def map_experts(model: Any, table: Table, budget_bytes: int) -> PageBudget:
    """Put mapped experts in place of a model's own."""
    layout, num_experts = table.layout, model.config.num_experts
    fds = open_shards(table, 0, ExitStack())  # for as long as this process lives
    maps = [
        mmap.mmap(fd, shard.bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for fd, shard in zip(fds, table.shards, strict=True)
    ]
    records = [
        (fd, layout.record_offset(row), mapped)
        for fd, mapped, shard in zip(fds, maps, table.shards, strict=True)
        for row in range(shard.num_ids)
    ]
    places = [_pages_of(fd, offset, layout.stride, mapped) for fd, offset, mapped in records]
    for mapped in maps:
        mapped.madvise(mmap.MADV_RANDOM)
    pages = PageBudget(
        budget_bytes // layout.stride,
        {divmod(number, num_experts): [place] for number, place in enumerate(places)},
    )
    matrices = [
        matrices_of(
            torch.frombuffer(mapped, dtype=torch.uint8, count=layout.stride, offset=offset), layout
        )
        for _, offset, mapped in records
    ]
    for layer, ffn in enumerate(model.moe_layers):
        own = slice(layer * num_experts, (layer + 1) * num_experts)
        ffn.experts = MappedExperts(layer, places[own], matrices[own], pages)
    return pages


def _pages_of(fd: int, offset: int, num_bytes: int, mapped: mmap.mmap) -> FileRange:
    """The pages that hold these bytes; at the ends they may hold others' as well."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    stop = -(-(offset + num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return FileRange(fd, start, stop - start, mapped)


# ---------------------------------------------------------------------------------- accelerate


def dispatch_by_accelerate(model: Any, folder: Path, budget_bytes: int) -> PageBudget:
    """Let accelerate keep the experts in `folder` and everything else where the model runs.

    The model is changed in place.

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
    dispatch_model(model, _device_map(model, device), offload_dir=str(folder))
    pages = PageBudget(budget_bytes // expert_bytes, _offloaded_places(folder, model))
    for layer, ffn in enumerate(model.moe_layers):
        ffn.experts.register_forward_pre_hook(partial(_note, layer, pages))
    return pages


def _device_map(model: Any, device: str | int) -> dict[str, str | int]:
    """The experts on disk, every other module with weights on the device."""
    places: dict[str, str | int] = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            places[name] = "disk"
        elif not list(module.children()) and ".experts." not in name:
            places[name] = device
    return places


def _note(layer: int, pages: PageBudget, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    for expert in torch.unique(inputs[1]).tolist():
        pages.use((layer, expert))


def _offloaded_places(folder: Path, model: Any) -> dict[Expert, list[FileRange]]:
    """Where accelerate put the experts: a file per tensor, as it is in memory."""
    num_experts = model.config.num_experts
    places: dict[Expert, list[FileRange]] = defaultdict(list)
    for layer in range(len(model.moe_layers)):
        for kind in ("up", "down"):
            fd = os.open(folder / f"model.layers.{layer}.mlp.experts.{kind}_proj.dat", os.O_RDWR)
            os.fsync(fd)  # pages that aren't written yet can't be taken back
            size = os.fstat(fd).st_size // num_experts
            for expert in range(num_experts):
                places[layer, expert].append(FileRange(fd, expert * size, size))
    return places
