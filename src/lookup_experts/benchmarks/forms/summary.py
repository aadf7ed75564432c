"""Points added up: a line for each system, over its seeds, against dense and against the paper.

A gain is how many nats less the loss is than that of dense with the same seed; a share is a gain's
part of that of the paper's form, MoLE-4E as wide as the model.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = Mapping[str, Any]
"""A result of the study."""
DENSE = "dense"
FORMS = ("dense", "mole", "meki", "parts")
"""In their order."""


@dataclass(frozen=True)
class Mean:
    """Over seeds."""

    mean: float
    std: float | None
    """The sample's standard deviation; None of a single seed."""

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Mean":
        """Of one number or more."""
        std = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.mean(numbers), std)


@dataclass(frozen=True)
class Trained:
    """One system after so many tokens, with the learning rate that it was given."""

    points: tuple[Point, ...]
    """One for each seed."""

    @property
    def first(self) -> Point:
        """Has what is the same in all."""
        return self.points[0]

    def mean(self, value: Callable[[Point], float]) -> Mean:
        """Of something of each seed."""
        return Mean.of([value(point) for point in self.points])

    def gain(self, dense: "Trained", value: Callable[[Point], float], of_dense: str) -> Mean | None:
        """Over dense, of seeds that both have; None without any.

        Args:
            value: a loss of a point.
            of_dense: the name of the loss of dense that it is taken from.
        """
        losses = {point["seed"]: point[of_dense] for point in dense.points}
        gains = [losses[p["seed"]] - value(p) for p in self.points if p["seed"] in losses]
        return Mean.of(gains) if gains else None


def main_tokens(points: Sequence[Point]) -> int:
    """How many tokens the stages before the last trained on."""
    return min((point["tokens"] for point in points), default=0)


def trained(points: Sequence[Point], tokens: int) -> dict[str, Trained]:
    """Each system after so many tokens, by name: dense, the paper's form and MeKi's from wide to
    narrow rows, then parts in the points' order; without what failed.

    Of several learning rates the one with the most seeds counts, or else the best.
    """
    found: dict[str, dict[float, list[Point]]] = {}
    for point in points:
        if point["tokens"] == tokens and "failed" not in point:
            found.setdefault(point["system"], {}).setdefault(point["learning_rate"], []).append(
                point
            )
    systems = {name: Trained(tuple(_of_best_rate(by_rate))) for name, by_rate in found.items()}
    return dict(sorted(systems.items(), key=lambda item: _place(item[1].first)))


def _place(point: Point) -> tuple[int, int, int]:
    form = FORMS.index(point["form"])
    if point["form"] == "parts":
        return form, 0, 0
    return form, point["num_rows"], point["widened_by"] - point["row_size"]


def _of_best_rate(by_rate: Mapping[float, list[Point]]) -> list[Point]:
    return min(
        by_rate.values(),
        key=lambda found: (-len(found), statistics.mean(p["validation_loss"] for p in found)),
    )


def paper_of(systems: Mapping[str, Trained]) -> Trained | None:
    """MoLE-4E as wide as the model."""
    wide = [
        system
        for system in systems.values()
        if system.first["form"] == "mole" and system.first["num_rows"] == 4
    ]
    return max(wide, key=lambda system: system.first["row_size"], default=None)


def tables_of(point: Point) -> dict[str, Mapping[str, Any]]:
    """A point's folded tables by their encoding."""
    return {table["encoding"]: table for table in point.get("tables", ())}
