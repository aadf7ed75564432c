"""Timing systems against each other: in turn, step by step, compared by neighbouring pairs.

Whatever else the machine does at a moment meets all systems alike, and cancels out of the ratio
of two steps that were neighbours.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleave(systems: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, when each system is called once in each round.

    Each round begins with another system, so that none always runs behind the same one.

    Args:
        systems: what to time, by name.
        rounds: calls of each.
    """
    names = list(systems)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started_at = time.perf_counter()
            systems[name]()
            seconds[name].append(time.perf_counter() - started_at)
    return seconds


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    return statistics.median(values)


def pair_ratios(times: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """How many times the baseline's time each step took; steps of one round are a pair."""
    return [mine / other for mine, other in zip(times, baseline, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile."""
    ordered = sorted(values)
    return percentile(ordered, 0.1), percentile(ordered, 0.9)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values; between the two nearest, in proportion to how near each is."""
    place = share * (len(ordered) - 1)
    below, above = math.floor(place), math.ceil(place)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
