"""The systems that are compared, by name, and how each is built.

    dense                 the backbone alone
    mole-4e               4 lookup experts per layer, their table on disk
    moe-10e               top-2 of 10 experts per layer, all in memory: more than the others have
    moe-10e-disk          its experts on disk, read past the page cache; our offloading
    moe-10e-ram           its experts in RAM beside, copied to where the model computes; likewise
    moe-10e-mmap          its experts mapped into memory, as in llama.cpp
    moe-10e-accelerate    its experts offloaded to disk by accelerate

Any number of experts will do: mole-16e, moe-34e-disk.

Weights are random, of one seed, so that all systems of one model say the same. Experts are first
written to disk as a table (`offloading/expert_table.py`), and every system takes them from there:
the resident MoE by loading them all, the others in their own way.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from lookup_experts import console
from lookup_experts.benchmarks.latency.peers import Counts, dispatch_by_accelerate, map_experts
from lookup_experts.benchmarks.models import (
    SPREAD,
    Case,
    dense_model,
    random_model,
    random_table,
    table_model,
)
from lookup_experts.errors import UserError
from lookup_experts.model.gateless_llama import paper_config
from lookup_experts.model.moe import MoeExperts, MoeGatelessLlamaConfig, MoeGatelessLlamaForCausalLM
from lookup_experts.offloading.expert_table import (
    check_belongs,
    expert_layout,
    matrices_of,
    router_hash,
    write_expert_records,
)
from lookup_experts.offloading.experts import offload_experts
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.store_choice import open_store

DEFAULT_SYSTEMS = (
    "dense",
    "mole-4e",
    "moe-10e",
    "moe-10e-disk",
    "moe-10e-ram",
    "moe-10e-mmap",
    "moe-10e-accelerate",
)
RESIDENT, DISK, RAM, MMAP, ACCELERATE = "resident", "disk", "ram", "mmap", "accelerate"
CAPPED = (DISK, RAM, MMAP, ACCELERATE)
"""Where experts are kept elsewhere, within a budget of memory."""
PEERS = (MMAP, ACCELERATE)
"""Those that wait for the disk inside of reading their memory, so that it can't be told apart."""

SELECTED = 2
"""Experts per token, as in the paper."""

_NAME = re.compile(r"moe-([1-9]\d*)e(?:-(disk|ram|mmap|accelerate))?")
_TABLE_NAME = re.compile(r"(?:mole-([1-9]\d*)e|meki)(?:-r([1-9]\d*))?")


@dataclass(frozen=True)
class System:
    """A model, and where its experts are."""

    name: str
    family: str
    """dense, moe, or mole for a table of any form."""
    num_experts: int = 0
    """N of each layer."""
    way: str = RESIDENT
    """Where its experts are."""
    form: str = "mole"
    """Of a table's rows."""
    row_size: int | None = None
    """Numbers of a table's row; None: the model's width."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The system of a name; a `UserError` for what is none."""
        if name == "dense":
            return cls(name, "dense")
        if (found := _TABLE_NAME.fullmatch(name)) is not None:
            form = "mole" if found[1] else "meki"
            row_size = int(found[2]) if found[2] else None
            return cls(name, "mole", int(found[1] or 1), DISK, form, row_size)
        if (found := _NAME.fullmatch(name)) is not None:
            return cls(name, "moe", int(found[1]), found[2] or RESIDENT)
        raise UserError(
            f"No system is called {name!r}; expected dense, mole-4e or meki, with rows narrower "
            "than the model as mole-4e-r192 or meki-r96, moe-10e, or a MoE with its experts "
            "elsewhere: moe-10e-disk, -ram, -mmap or -accelerate."
        )

    @property
    def model_name(self) -> str:
        """The model without where its experts are: systems of one give the same logits."""
        return self.name.removesuffix(f"-{self.way}")


def parse_systems(names: Sequence[str]) -> list[System]:
    """The systems of the given names, the default ones if there are none; dense comes first.

    Raises:
        UserError: an unknown name.
    """
    chosen = dict.fromkeys(["dense", *(names or DEFAULT_SYSTEMS)])
    return [System.parse(name) for name in chosen]


# ------------------------------------------------------------------------------------ building


@dataclass
class Built:
    """A system that can run."""

    model: Any
    facts: dict[str, Any] = field(default_factory=dict)
    """For the result: how records are read, and what memory beside the model's is used."""
    take_counts: Callable[[], Counts] = Counts
    """Counts since it was last called."""
    between_steps: Callable[[], None] = lambda: None
    """Called after every forward pass, and not timed."""


@dataclass(frozen=True)
class Plan:
    """What all systems of a run share."""

    shape: str
    """160m, 410m or 1b."""
    cache_bytes: int
    """What each system that keeps experts elsewhere may hold beyond the dense model's memory."""
    work: Path
    """Where tables are kept."""
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16

    def case(self, system: System | None = None) -> Case:
        """Of a system with a table; else of the dense model."""
        encoding = str(self.dtype).removeprefix("torch.")
        if system is None:
            return Case(self.shape, encoding=encoding, dtype=self.dtype)
        return Case(
            self.shape, system.num_experts, encoding, self.dtype, system.form, system.row_size
        )

    @property
    def expert_budget(self) -> int:
        """Bytes for a MoE's experts, so that it has the dense model's memory, whose FFNs take as
        much as k experts in each layer, and the cache."""
        config = paper_config(self.shape)
        numbers = 2 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
        return numbers * self.dtype.itemsize + self.cache_bytes

    def moe_config(self, num_experts: int) -> MoeGatelessLlamaConfig:
        """The paper's MoE of the shape: an expert is half as large as the dense FFN."""
        sizes = paper_config(self.shape).to_dict()
        for key in ("model_type", "architectures", "dtype", "transformers_version"):
            sizes.pop(key, None)
        sizes["intermediate_size"] //= SELECTED
        selected = min(SELECTED, num_experts)
        return MoeGatelessLlamaConfig(
            **sizes, num_experts=num_experts, num_experts_per_tok=selected
        )


def prepare_tables(plan: Plan, systems: Sequence[System]) -> None:
    """Write the tables that the systems need, where they aren't there yet.

    Raises:
        DiskFullError: they don't fit.
    """
    for system in {system.model_name: system for system in systems}.values():
        if system.family == "mole":
            random_table(plan.case(system), plan.work)
        elif system.family == "moe":
            _write_experts(plan, system.num_experts)


def expert_folder(plan: Plan, num_experts: int) -> Path:
    """Where the experts of a MoE are."""
    return plan.work / f"{plan.shape}-moe-{num_experts}e-{plan.case().encoding}"


def _write_experts(plan: Plan, num_experts: int) -> None:
    folder = expert_folder(plan, num_experts)
    if (folder / MANIFEST_NAME).exists():
        return
    model = _moe_without_experts(plan, num_experts)
    layout = expert_layout(model.config, plan.dtype)
    shape = layout.shape
    generator = torch.Generator().manual_seed(0)

    def matrices(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        up = torch.randn(shape.num_experts, shape.row_size, generator=generator)
        down = torch.randn(shape.row_size, shape.num_experts, generator=generator)
        return up * SPREAD, down * SPREAD

    with console.progress_bar("Writing experts") as progress:
        write_expert_records(folder, layout, router_hash(model), matrices, progress)


def build(system: System, plan: Plan) -> Built:
    """The system, ready to run.

    Raises:
        MemoryError, RuntimeError: there isn't enough memory.
        UserError: a library is missing.
    """
    if system.family == "dense":
        return Built(dense_model(plan.case(), plan.device))
    if system.family == "mole":
        return _build_mole(system, plan)
    model = _moe_without_experts(plan, system.num_experts).to(plan.device)
    table = open_table(expert_folder(plan, system.num_experts))
    check_belongs(table, model)
    if system.way in (DISK, RAM):
        return _build_offloaded(model, table, system, plan)
    if system.way == MMAP:
        mapped = map_experts(model, table, plan.expert_budget)
        return Built(model, {"backend": "page cache"}, mapped.take_counts, mapped.limit_memory)
    _load_experts(model, table)
    if system.way == ACCELERATE:
        folder = plan.work / f"{table.folder.name}-accelerate"
        pages = dispatch_by_accelerate(model, folder, plan.expert_budget)
        facts = {"backend": f"accelerate {version('accelerate')}, page cache"}
        return Built(model, facts, pages.take_counts, pages.limit_memory)
    assert system.way == RESIDENT
    return Built(model)


def _moe_without_experts(plan: Plan, num_experts: int) -> Any:
    """The MoE with experts of one number each, in place of which the real ones come."""
    config = plan.moe_config(num_experts)
    real_size, config.intermediate_size = config.intermediate_size, 1
    model = random_model(MoeGatelessLlamaForCausalLM, config, plan.dtype)
    model.config.intermediate_size = real_size
    return model


def _load_experts(model: Any, table: Table) -> None:
    """Put all experts of the table into the model's memory."""
    config = model.config
    sizes = (config.num_experts, config.hidden_size, config.intermediate_size)
    record = np.zeros((1, table.layout.stride), np.uint8)
    source = matrices_of(torch.from_numpy(record[0]), table.layout)
    with open_store(table, "direct", notify=lambda message: None) as store, torch.no_grad():
        for layer, ffn in enumerate(model.moe_layers):
            with torch.device("meta"):
                empty = MoeExperts(*sizes).to(model.dtype)
            ffn.experts = empty.to_empty(device=model.device).eval()
            for expert in range(config.num_experts):
                store.read(np.array([layer * config.num_experts + expert]), record)
                ffn.experts.up_proj[expert] = source[0]
                ffn.experts.down_proj[expert] = source[1]


def _build_offloaded(model: Any, table: Table, system: System, plan: Plan) -> Built:
    store = "direct" if system.way == DISK else "memory"
    cache = offload_experts(model, table, store, plan.expert_budget, lambda message: None)

    def take_counts() -> Counts:
        found = cache.statistics
        cache.reset_statistics()
        return Counts(
            found.bytes_loaded, found.wait_seconds, found.experts_used, found.experts_loaded
        )

    facts = {
        "backend": cache.store.backend,
        "expert_slots": cache.num_bytes // table.layout.stride,
        "in_transit": cache.in_transit,
    }
    if system.way == RAM and model.device.type == "cpu":
        # All experts, which are counted in the process's memory here: they stand for storage.
        facts["host_copy_bytes"] = table.layout.table_bytes
    return Built(model, facts, take_counts)


def _build_mole(system: System, plan: Plan) -> Built:
    case = plan.case(system)
    table = open_table(plan.work / case.name)
    model = table_model(case, table, "direct", plan.cache_bytes, device=plan.device)
    reader = model.expert_source

    def take_counts() -> Counts:
        found = reader.stats()
        reader.reset_stats()
        return Counts(found.bytes_read, found.wait_seconds)

    return Built(model, {"backend": reader.stats().backend}, take_counts)
