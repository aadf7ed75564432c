"""Timing systems against each other: in turn, step by step, compared by neighbouring pairs.

Whatever else the machine does at a moment meets all systems alike, and cancels out of the ratio
of two steps that were neighbours.
"""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Advance = Callable[[int, int], None]
"""Told how many of how many are done."""


def rotated(names: Sequence[Name], number: int) -> list[Name]:
    """The order of a round: each begins with another, so that none always follows the same one."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def interleave(
    systems: Mapping[Name, Callable[[], object]],
    rounds: int,
    first: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of every call, when each system is called once in each round.

    Args:
        systems: what to time, by name.
        rounds: calls of each.
        first: the number of the first round, where rounds are taken one by one.
        clock: gives seconds.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in systems}
    for number in range(first, first + rounds):
        for name in rotated(list(systems), number):
            started_at = clock()
            systems[name]()
            seconds[name].append(clock() - started_at)
    return seconds


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """A clock for `interleave`: seconds, once the device has done all that it was asked for."""
    if torch.device(device).type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


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
