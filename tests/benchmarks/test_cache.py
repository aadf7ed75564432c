"""Cache policies on streams small enough to follow by hand, and against plain ones."""

import json
import random

import numpy as np
import pytest
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import cache
from lookup_experts.benchmarks.cache import (
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    MostFrequent,
    TinyLeastFrequentlyUsed,
    compare_policies,
    decoding_steps,
    hit_rate,
    hit_rate_at_first,
)
from lookup_experts.table.cache import RowCache

run = CliRunner().invoke

DYNAMIC = [LeastRecentlyUsed, LeastFrequentlyUsed, TinyLeastFrequentlyUsed]


def hits(policy, stream: str) -> str:
    """Which of the letters of a stream are hits: `+` and `-`."""
    return "".join("+" if policy.use([ord(letter)]) else "-" for letter in stream)


def skewed_ids(num_ids: int, seed: int = 0) -> np.ndarray:
    """Ids as often as words of a text, about."""
    return np.random.default_rng(seed).zipf(1.3, num_ids) % 500


def test_least_recently_used_by_hand():
    #     a b c evicts a; a evicts b
    assert hits(LeastRecentlyUsed(2), "aabbcacb") == "-+-+--+-"


def test_least_frequently_used_by_hand():
    #     c replaces b, used once, and stays behind a, used three times; d replaces c
    assert hits(LeastFrequentlyUsed(2), "aaabcadca") == "-++--+--+"


def test_of_those_used_equally_often_the_oldest_goes():
    assert hits(LeastFrequentlyUsed(2), "abcba") == "---+-"


def test_frequencies_are_forgotten(monkeypatch):
    monkeypatch.setattr(cache, "USES_PER_AGEING", 4)
    policy = LeastFrequentlyUsed(2)
    assert hits(policy, "aaaaaaaa") == "-+++++++"  # 8 uses: the count of a is 4 from here on
    assert hits(policy, "bbbb") == "-+++"
    assert hits(policy, "bbbb") == "++++"  # 8 more: 2 and 4
    assert hits(policy, "cccab") == "-++-+"


def test_a_newcomer_must_be_more_frequent():
    policy = TinyLeastFrequentlyUsed(2)
    #     c is turned away until it has been used more often than a, the least recently used
    assert hits(policy, "ababccc") == "--++---"
    assert hits(policy, "cb") == "++"


def test_the_most_frequent_of_another_text_never_change():
    policy = MostFrequent(2, np.bincount([ord(letter) for letter in "abbbcc"]))
    assert hits(policy, "abca") == "-++-"
    assert hits(policy, "aaaa") == "----"


@pytest.mark.parametrize("policy", DYNAMIC)
def test_a_step_is_looked_up_before_anything_is_replaced(policy):
    policy = policy(2)
    assert policy.use([1, 2]) == 0
    assert policy.use([3, 1, 2]) == 2  # 3 doesn't take the place of 1 before its turn


@pytest.mark.parametrize("policy", DYNAMIC)
def test_what_fits_is_missed_once(policy):
    ids = skewed_ids(3000)
    steps = decoding_steps(ids, 1)
    rate = hit_rate(policy(500), steps)
    assert rate == pytest.approx(1 - len(np.unique(ids)) / len(ids))


@pytest.mark.parametrize("streams", [1, 8])
def test_lru_is_what_the_row_cache_of_the_reader_does(streams):
    stride, capacity = 64, 40
    rows = RowCache(stride, capacity * stride, working_slots=64)
    steps = decoding_steps(skewed_ids(2000), streams)
    hits = lookups = 0
    for ids in steps:
        taken = rows.take(ids)
        rows.arrived(taken)
        rows.release(taken)
        hits += len(ids) - len(taken.missing)
        lookups += len(ids)
    assert hit_rate(LeastRecentlyUsed(capacity), steps) == hits / lookups


@pytest.mark.parametrize("seed", range(3))
def test_lfu_is_what_a_plain_search_gives(seed, monkeypatch):
    """Without ageing: the fewest uses go first, of these the longest unused."""
    monkeypatch.setattr(cache, "USES_PER_AGEING", 10**9)
    policy, capacity, kept = LeastFrequentlyUsed(7), 7, {}
    chosen = random.Random(seed)
    for clock in range(600):
        id_ = min(chosen.randrange(20), chosen.randrange(20))
        assert policy.use([id_]) == (id_ in kept)
        if id_ not in kept and len(kept) == capacity:
            del kept[min(kept, key=kept.get)]
        kept[id_] = (kept.get(id_, (0, 0))[0] + 1, clock)


def test_a_new_cache_is_measured_at_several_places(monkeypatch):
    monkeypatch.setattr(cache, "BEGINNINGS", 2)
    steps = [[1], [1], [1], [2], [3], [3]]
    rate = hit_rate_at_first(lambda: LeastRecentlyUsed(2), steps, 3)
    assert rate == pytest.approx((2 / 3 + 1 / 3) / 2)  # 1 1 1, then 2 3 3, each from nothing
    filled = hit_rate_at_first(lambda: LeastRecentlyUsed(2, [2, 3]), steps, 3)
    assert filled == pytest.approx((2 / 3 + 3 / 3) / 2)


def test_steps_are_of_parallel_streams_and_unique():
    ids = np.array([1, 2, 3, 4, 1, 5, 3, 6, 9])  # the 9 is left over
    assert decoding_steps(ids, 1) == [[1], [2], [3], [4], [1], [5], [3], [6], [9]]
    assert decoding_steps(ids, 2) == [[1], [2, 5], [3], [4, 6]]
    assert decoding_steps(ids, 4) == [[1, 3], [2, 4, 5, 6]]


def test_the_comparison_measures_the_second_half():
    ids = np.array([1, 1, 1, 2, 2, 3, 2, 2, 2, 2, 1, 3])
    results = compare_policies(ids, [1, 3], [1, 2])
    assert len(results) == 5 * 2 * 2
    found = {
        (result["policy"], result["capacity"], result["streams"]): result for result in results
    }
    assert found["static", 1, 1]["hit_rate"] == pytest.approx(1 / 6)  # keeps 1
    assert found["static", 3, 1]["hit_rate"] == 1
    assert found["lru", 1, 1]["hit_rate"] == pytest.approx(3 / 6)
    assert found["lru", 1, 1]["reads_per_token"] == pytest.approx(3 / 6)
    # Filled with all ids of the first half, 1, 2 and 3, it misses nothing; with 1 alone, as lru.
    assert found["lru, filled", 3, 1]["hit_rate"] == 1
    assert found["lru, filled", 1, 1]["hit_rate"] == pytest.approx(3 / 6)
    assert found["lru, filled", 3, 1]["hit_rate_at_first"] == 1
    assert found["lru", 3, 1]["hit_rate_at_first"] == found["lru", 3, 1]["hit_rate"]  # all is first
    # Two streams, 2 2 2 and 2 1 3: steps (2), (2, 1), (2, 3), five look-ups for six tokens.
    assert found["lru", 3, 2]["hit_rate"] == pytest.approx(2 / 5)
    assert found["lru", 3, 2]["reads_per_token"] == pytest.approx(3 / 6)


def test_cache_policies(tmp_path, ids):
    out = tmp_path / "cache.json"
    sizes = ["--capacity", "16,64", "--streams", "1,4", "--tokens", "4000", "--ids", str(ids)]
    plot = tmp_path / "cache.png"
    done = run(cli.app, ["bench", "cache", *sizes, "--json", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())["results"]
    assert len(results) == 2 * 2 * 5
    expected = {
        "policy",
        "capacity",
        "streams",
        "hit_rate",
        "hit_rate_at_first",
        "reads_per_token",
    }
    assert all(set(result) == expected for result in results)
    rows = result_rows("cache-policies", results)
    assert len(rows) == 2 * 5 and rows[0]["64 records"].endswith("%")
    assert plot.read_bytes().startswith(b"\x89PNG")
    few = run(cli.app, ["bench", "cache", *sizes[:-3], "2", "--ids", str(ids)])
    assert "too few for 4 streams" in str(few.exception)
