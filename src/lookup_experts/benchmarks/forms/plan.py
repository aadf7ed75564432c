"""What is to be trained, in the order of its weight: a study that is broken off compares.

1. learning rates: each family's own, at one of its systems, on as many tokens as the rest;
2. loss against bytes, every seed;
3. the parts of MeKi's form, every seed;
4. dense, the paper's form and what did best at each budget of bytes, five times as long.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lookup_experts.benchmarks.forms.systems import (
    System,
    main_systems,
    meki,
    paper,
    taken_apart,
)
from lookup_experts.training.recipe import Recipe

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LONGER = 5
"""How many times as long the last stage trains."""
BUDGETS = (16, 32)
"""Parts of the bytes of the paper's table in bfloat16."""


@dataclass(frozen=True)
class Point:
    """One model to train."""

    system: System
    tokens: int
    seed: int
    learning_rate: float

    @property
    def file_name(self) -> str:
        """Tells it from all others."""
        words = "".join(c if c.isalnum() else "-" for c in self.system.name)
        return f"{words}-{self.tokens}-seed{self.seed}-rate{self.learning_rate:g}.json"


Found = Mapping[Point, Mapping[str, Any]]
"""The results of points that are done."""
Group = list[Point]
"""Points of as many tokens, to be trained side by side."""


@dataclass(frozen=True)
class Study:
    """All of it.

    Args:
        base: a dense recipe: sizes and schedule of all.
        tokens: of all stages but the last.
        seeds: the first one is that of the learning rates and of the last stage.
    """

    base: Recipe
    tokens: int
    seeds: tuple[int, ...]

    def groups(
        self, found: Found, under_way: Collection[Point] = (), side_by_side: int = 1
    ) -> tuple[list[Group], int]:
        """What is left to begin as far as results tell, and how many tokens are left that wait
        for results.

        Args:
            found: results.
            under_way: points that are being trained.
            side_by_side: points of a group; those of one system stay together, however many.
        """
        width, ffn_size = self.base.model.hidden_size, self.base.model.ffn_size
        rates = [
            [Point(system, self.tokens, self.seeds[0], rate) for rate in RATES]
            for system in (System("dense"), paper(width), meki(max(1, width // 4)))
        ]
        best = {group[0].system.family: best_rate(group, found) for group in rates}
        groups, waiting = [list(group) for group in rates], 0
        systems = [*main_systems(width), *taken_apart(width, ffn_size)]
        for system in systems:
            rate = best[system.family]
            if rate is None:
                waiting += self.tokens * len(self.seeds)
            else:
                groups.append([Point(system, self.tokens, seed, rate) for seed in self.seeds])
        whole = not waiting and all(point in found for group in groups for point in group)
        if whole:
            rates_of = {family: rate for family, rate in best.items() if rate is not None}
            groups += [
                [Point(system, LONGER * self.tokens, self.seeds[0], rates_of[system.family])]
                for system in self.longer(groups[len(rates) :], found)
            ]
        else:
            waiting += LONGER * self.tokens * (2 + len(BUDGETS))
        begun = {*found, *under_way}
        left = [[point for point in group if point not in begun] for group in groups]
        return _together(left, side_by_side), waiting

    def longer(self, groups: Sequence[Group], found: Found) -> list[System]:
        """Dense, the paper's form, and the best within each budget of bytes."""
        width = self.base.model.hidden_size
        chosen = [System("dense"), paper(width)]
        for divisor in BUDGETS:
            losses: dict[System, float] = {}
            for group in groups:
                loss = least_loss([found[point] for point in group], 1 / divisor)
                if loss is not None:
                    losses[group[0].system] = min(loss, losses.get(group[0].system, loss))
            if losses:
                chosen.append(min(losses, key=lambda system: losses[system]))
        return list(dict.fromkeys(chosen))


def _together(groups: Sequence[Group], most: int) -> list[Group]:
    """Neighbours in one, as long as there are no more than so many points."""
    found: list[Group] = []
    for group in filter(None, groups):
        last = found[-1] if found else []
        if last and last[0].tokens == group[0].tokens and len(last) + len(group) <= most:
            last += [point for point in group if point not in last]
        else:
            found.append(list(group))
    return found


def best_rate(group: Sequence[Point], found: Found) -> float | None:
    """The learning rate with the least loss; None while some are missing, or where all failed."""
    if any(point not in found for point in group):
        return None
    losses = {
        point.learning_rate: found[point]["validation_loss"]
        for point in group
        if "validation_loss" in found[point]
    }
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def least_loss(results: Sequence[Mapping[str, Any]], most_bytes: float) -> float | None:
    """The least mean loss of one system's points among its encodings that take no more than that
    part of the paper's bytes; None where none does."""
    by_encoding: dict[str, list[float]] = {}
    for result in results:
        for table in result.get("tables", ()):
            if table["share_of_bytes"] <= most_bytes:
                by_encoding.setdefault(table["encoding"], []).append(table["validation_loss"])
    return min((statistics.mean(losses) for losses in by_encoding.values()), default=None)
