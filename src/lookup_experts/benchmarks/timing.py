"""Timing systems against each other: in turn, step by step, compared by neighbouring pairs.

Whatever else the machine does at a moment meets all systems alike, and cancels out of the ratio
of two steps that were neighbours.
"""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

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


def interleave_queued(
    systems: Mapping[Name, Callable[[], object]],
    before: Mapping[Name, Callable[[Any], object]],
    items: Sequence[Any],
    device: torch.device,
) -> dict[Name, list[float]]:
    """The same by the device's own clock, where calls only ask for work: all is asked for before
    any of it is waited for, so the device is never idle between calls.

    Args:
        systems: what to time, by name; called once for each item.
        before: by the same names, what to do with an item before its call, which isn't timed.
        items: of each round.
        device: that does the work.
    """
    stamps: dict[Name, list[tuple[Any, Any]]] = {name: [] for name in systems}
    for number, item in enumerate(items):
        for name in rotated(list(systems), number):
            before[name](item)
            begin = _stamp(device)
            systems[name]()
            stamps[name].append((begin, _stamp(device)))
    if device.type == "cpu":
        return {name: [end - begin for begin, end in pairs] for name, pairs in stamps.items()}
    torch.accelerator.synchronize(device)
    return {
        name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        for name, pairs in stamps.items()
    }


def _stamp(device: torch.device) -> Any:
    """The time, or on a GPU what will know when it was reached."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
