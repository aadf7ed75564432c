"""How many reads a row cache of a given size saves, by which records it keeps: a simulation.

Policies are run over the token ids of a text, without records and without a model. The ids come
in decoding steps of several parallel streams, each somewhere else in the text, and a step looks
up its unique ids, as `table/reader.py` does. What is measured is decided by the text and the
tokenizer alone, so it holds for any machine.

| policy | keeps |
|---|---|
| lru | the most recently used |
| lru, filled | the same, from the most frequent of another text on instead of from nothing |
| lfu | the most often used while they were kept; counts are halved as time goes by |
| tinylfu | as lru, but a newcomer must have been used more often than the record that it replaces |
| static | the most frequent of another text, for good |

`lru` is what the row cache does, `lru, filled` what it does in `mole serve` over a table with token
counts (`table/counts.py`). `tinylfu` is TinyLFU (arXiv 1512.00727) with exact counts in place of a
sketch, because a vocabulary is small.
"""

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lookup_experts import console
from lookup_experts.benchmarks.models import Case
from lookup_experts.benchmarks.plots import draw_bars
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import id_stream
from lookup_experts.benchmarks.timing import Advance
from lookup_experts.errors import UserError
from lookup_experts.table.counts import most_frequent

FIRST_TOKENS = 4096
"""What `hit_rate_at_first` is measured over."""
BEGINNINGS = 16
"""Places in the text that it is the mean of."""
USES_PER_AGEING = 10
"""Counts are halved after this many uses for each record of the capacity."""


def bench_cache(
    capacities: Sequence[int],
    num_streams: Sequence[int],
    most_tokens: int,
    ids: Path | None,
    work: Path,
    results: Results,
) -> None:
    """`mole bench cache`: caches of so many records, over so many tokens of the stream."""
    stream = id_stream(ids, Case().layout.shape.vocab_size, work)[:most_tokens]
    if len(stream) < 2 * max(num_streams):
        raise UserError(f"{len(stream)} token ids are too few for {max(num_streams)} streams.")
    with console.progress_bar("Simulating") as progress:
        found = compare_policies(stream, capacities, num_streams, progress)
    results.add(*found)
    results.finish(draw)


class Policy(ABC):
    """A cache of so many records, at least 1, as far as it decides which to keep."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity

    @abstractmethod
    def use(self, ids: Sequence[int]) -> int:
        """Look up the unique ids of one step; how many of them were there."""


class LeastRecentlyUsed(Policy):
    """`lru`, the row cache of `table/cache.py`.

    Args:
        filled_with: ids that are there from the start, those to be kept longest last.
    """

    def __init__(self, capacity: int, filled_with: Iterable[int] = ()) -> None:
        super().__init__(capacity)
        self._kept: OrderedDict[int, None] = OrderedDict.fromkeys(filled_with)

    def use(self, ids: Sequence[int]) -> int:
        kept = self._kept
        hits = sum(id_ in kept for id_ in ids)
        for id_ in ids:
            kept[id_] = None
            kept.move_to_end(id_)
        while len(kept) > self._capacity:
            kept.popitem(last=False)
        return hits


class Ageing(Policy):
    """A policy by how often records were used, which halves its counts as time goes by."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses = 0

    def use(self, ids: Sequence[int]) -> int:
        hits = self._use(ids)
        self._uses += len(ids)
        if self._uses >= USES_PER_AGEING * self._capacity:
            self._uses = 0
            self._age()
        return hits

    @abstractmethod
    def _use(self, ids: Sequence[int]) -> int: ...

    @abstractmethod
    def _age(self) -> None: ...


class LeastFrequentlyUsed(Ageing):
    """`lfu`: of those used least often, the least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._counts: dict[int, int] = {}
        self._by_count: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)

    def _use(self, ids: Sequence[int]) -> int:
        found = [id_ for id_ in ids if id_ in self._counts]
        missing = [id_ for id_ in ids if id_ not in self._counts]
        for id_ in found + missing:  # in this order, so that none is replaced before its use
            count = self._counts.pop(id_, 0)
            if count:
                self._take_from(count, id_)
            elif len(self._counts) == self._capacity:
                least = min(self._by_count)
                evicted = next(iter(self._by_count[least]))
                self._take_from(least, evicted)
                del self._counts[evicted]
            self._counts[id_] = count + 1
            self._by_count[count + 1][id_] = None
        return len(found)

    def _take_from(self, count: int, id_: int) -> None:
        del self._by_count[count][id_]
        if not self._by_count[count]:
            del self._by_count[count]

    def _age(self) -> None:
        older = sorted(self._by_count.items())
        self._by_count.clear()
        for count, ids in older:
            for id_ in ids:
                self._counts[id_] = max(1, count // 2)
                self._by_count[self._counts[id_]][id_] = None


class TinyLeastFrequentlyUsed(Ageing):
    """`tinylfu`: least recently used, behind a filter by frequency."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._counts: Counter[int] = Counter()

    def _use(self, ids: Sequence[int]) -> int:
        self._counts.update(ids)
        found = [id_ for id_ in ids if id_ in self._kept]
        for id_ in found:
            self._kept.move_to_end(id_)
        for id_ in ids:
            if id_ not in self._kept:
                self._admit(id_)
        return len(found)

    def _admit(self, id_: int) -> None:
        if len(self._kept) == self._capacity:
            victim = next(iter(self._kept))
            if self._counts[id_] <= self._counts[victim]:
                return
            del self._kept[victim]
        self._kept[id_] = None

    def _age(self) -> None:
        halves = {id_: count // 2 for id_, count in self._counts.items() if count > 1}
        self._counts = Counter(halves)


class MostFrequent(Policy):
    """`static`: fixed from the start.

    Args:
        counts: int [V], how often each id occurs in another text.
    """

    def __init__(self, capacity: int, counts: np.ndarray) -> None:
        super().__init__(capacity)
        self._kept = frozenset(most_frequent(counts, capacity).tolist())

    def use(self, ids: Sequence[int]) -> int:
        return sum(id_ in self._kept for id_ in ids)


def decoding_steps(token_ids: np.ndarray, num_streams: int) -> list[list[int]]:
    """The unique ids of each step, in the order of their first stream.

    Args:
        token_ids: int [n], cut into `num_streams` runs of equal length; what is left is dropped.
    """
    length = len(token_ids) // num_streams
    streams = token_ids[: length * num_streams].reshape(num_streams, length)
    return [list(dict.fromkeys(ids)) for ids in streams.T.tolist()]


def hit_rate(policy: Policy, steps: Iterable[Sequence[int]]) -> float:
    """The share of look-ups that the cache answers, from an empty cache on."""
    hits = lookups = 0
    for ids in steps:
        hits += policy.use(ids)
        lookups += len(ids)
    return hits / lookups


def hit_rate_at_first(
    new_policy: Callable[[], Policy], steps: Sequence[Sequence[int]], num_steps: int
) -> float:
    """The mean share of look-ups that a new cache answers in its first steps, begun at places
    spread over the text."""
    last_start = max(0, len(steps) - num_steps)
    starts = np.linspace(0, last_start, BEGINNINGS).astype(int).tolist()
    rates = [hit_rate(new_policy(), steps[start : start + num_steps]) for start in starts]
    return sum(rates) / len(rates)


def compare_policies(
    token_ids: np.ndarray,
    capacities: Sequence[int],
    num_streams: Sequence[int] = (1, 8, 32),
    progress: Advance = lambda done, total: None,
) -> list[Result]:
    """What each policy saves on the second half of a text; the first half is counted, as
    `mole reparameterize --counts` counts one.

    Args:
        token_ids: int [n].
        capacities: records that the cache holds.
        num_streams: sequences that are decoded at once.
        progress: told how many simulations of how many are done.

    Returns:
        For each policy, capacity and number of streams: `policy`, `capacity`, `streams`,
        `hit_rate` (of the unique ids of a step), `hit_rate_at_first` (over the first 4,096 tokens
        of a new cache), `reads_per_token`.
    """
    seen, measured = np.array_split(token_ids, 2)
    counts = np.bincount(seen)
    results: list[Result] = []
    num_runs = len(num_streams) * len(capacities) * len(_policies(1, counts))
    for streams in num_streams:
        steps = decoding_steps(measured, streams)
        unique_per_token = sum(map(len, steps)) / (len(steps) * streams)
        for capacity in capacities:
            for name, new_policy in _policies(capacity, counts).items():
                rate = hit_rate(new_policy(), steps)
                at_first = hit_rate_at_first(new_policy, steps, max(1, FIRST_TOKENS // streams))
                results.append(
                    {
                        "policy": name,
                        "capacity": capacity,
                        "streams": streams,
                        "hit_rate": rate,
                        "hit_rate_at_first": at_first,
                        "reads_per_token": (1 - rate) * unique_per_token,
                    }
                )
                progress(len(results), num_runs)
    return results


def _policies(capacity: int, counts: np.ndarray) -> dict[str, Callable[[], Policy]]:
    """What makes a new cache of each kind."""
    hot = most_frequent(counts, capacity).tolist()
    return {
        "lru": partial(LeastRecentlyUsed, capacity),
        "lru, filled": partial(LeastRecentlyUsed, capacity, hot[::-1]),
        "lfu": partial(LeastFrequentlyUsed, capacity),
        "tinylfu": partial(TinyLeastFrequentlyUsed, capacity),
        "static": partial(MostFrequent, capacity, counts),
    }


def draw(results: list[Result], path: Path) -> None:
    """The hit rate of each policy at the middle capacity and the fewest streams."""
    capacities = sorted({result["capacity"] for result in results})
    capacity = capacities[len(capacities) // 2]
    streams = min(result["streams"] for result in results)
    found = [
        result
        for result in results
        if result["capacity"] == capacity and result["streams"] == streams
    ]
    draw_bars(
        path,
        f"{capacity} records cached, {streams} stream{'s' if streams > 1 else ''}",
        "hit rate",
        [result["policy"] for result in found],
        [result["hit_rate"] for result in found],
    )
