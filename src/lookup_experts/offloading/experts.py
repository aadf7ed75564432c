"""The experts of one layer, some of them elsewhere, in place of `MoeExperts`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.model.moe import weighted_sum
from lookup_experts.offloading.cache import Compute, ExpertCache
from lookup_experts.offloading.expert_table import check_belongs
from lookup_experts.table.opening import Table
from lookup_experts.table.store import Notify
from lookup_experts.table.store_choice import open_store

Visit = Callable[[Sequence[int], Compute], None]
"""Calls back with each of the given experts, in any order."""


def mix_visited(
    hidden: Tensor, selected: Tensor, weights: Tensor, num_experts: int, visit: Visit
) -> Tensor:
    """`model.moe.mix_selected` with experts that come in any order.

    On the CPU it gives the same numbers to the last bit: the same products on the same slices, and
    what the experts say is added up in the same order, whichever came first.

    Args:
        hidden: [S, d] floating point.
        selected: [S, k] int64.
        weights: [S, k] floating point.
        num_experts: N.
        visit: gives the experts.

    Returns:
        [S, d] in the dtype of `hidden`.
    """
    if hidden.shape[0] == 1:
        return _mix_single(hidden, selected, weights, visit)
    pairs, order = selected.flatten().sort(stable=True)
    # The host must know what to ask for: on a GPU it waits here, as any such model does.
    counts = torch.bincount(pairs, minlength=num_experts).tolist()
    positions = order // selected.shape[1]
    inputs = hidden.index_select(0, positions).split(counts)
    said = hidden.new_empty(len(order), hidden.shape[1])
    outputs = said.split(counts)

    def compute(expert: int, up: Tensor, down: Tensor) -> None:
        outputs[expert].copy_(F.linear(F.gelu(F.linear(inputs[expert], up)), down))

    visit([expert for expert, count in enumerate(counts) if count], compute)
    return weighted_sum(said, weights, order, positions)


def _mix_single(hidden: Tensor, selected: Tensor, weights: Tensor, visit: Visit) -> Tensor:
    """One position, as in decoding: nothing to sort."""
    experts = selected[0].tolist()
    said = hidden.new_empty(len(experts), hidden.shape[1])

    def compute(expert: int, up: Tensor, down: Tensor) -> None:
        said[experts.index(expert)] = F.linear(F.gelu(F.linear(hidden, up)), down)[0]

    visit(experts, compute)
    return (said * weights.to(said.dtype).t()).sum(dim=0, keepdim=True)


class OffloadedExperts(nn.Module):
    """The N experts of one layer, which a cache has or brings. For inference.

    Args:
        layer: from 0.
        num_experts: N.
        cache: of all layers.
    """

    def __init__(self, layer: int, num_experts: int, cache: ExpertCache) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, num_experts
        self._cache = cache

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """[S, d], [S, k], [S, k] -> [S, d]; see `mix_visited`."""
        return mix_visited(
            hidden,
            selected,
            weights,
            self.num_experts,
            lambda needed, compute: self._cache.visit(self.layer, needed, compute),
        )


def offload_experts(
    model: Any, table: Table, store: str, budget_bytes: int, notify: Notify
) -> ExpertCache:
    """Put experts that are read from a table in place of a model's own, which are let go.

    Args:
        model: a `MoeGatelessLlamaForCausalLM` on the device where it will run.
        table: what `write_experts` wrote of it.
        store: "memory" (RAM) or "direct" (disk, past the page cache); "mmap" reads through it.
        budget_bytes: for experts where the model runs.
        notify: is told how records are read where that isn't as asked.

    Returns:
        The cache, with its statistics; close it when the model is no longer used.

    Raises:
        TableError: the table is another model's.
        UserError: unknown store, too little memory, or a budget too small for one expert.
    """
    check_belongs(table, model)
    with ExitStack() as opening:
        opened = opening.enter_context(open_store(table, store, notify=notify))
        cache = ExpertCache(opened, len(model.moe_layers), budget_bytes, model.device)
        opening.pop_all()  # the cache closes it from here on
    for layer, ffn in enumerate(model.moe_layers):
        ffn.experts = OffloadedExperts(layer, model.config.num_experts, cache)
    return cache
