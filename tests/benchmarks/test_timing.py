import time

import pytest

from lookup_experts.benchmarks.timing import interleave, median, pair_ratios, spread


def test_every_round_calls_each_system_once_and_begins_with_another():
    calls: list[str] = []
    systems = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(systems, rounds=4)
    assert "".join(calls) == "abcbcacababc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_times_are_those_of_the_system_that_took_them():
    seconds = interleave({"slow": lambda: time.sleep(0.01), "quick": lambda: None}, rounds=3)
    assert min(seconds["slow"]) >= 0.01 > max(seconds["quick"])


def test_no_rounds_take_no_time():
    assert interleave({"a": lambda: None}, rounds=0) == {"a": []}


@pytest.mark.parametrize(("values", "middle"), [([3, 1, 2], 2), ([4, 1, 3, 2], 2.5), ([7], 7)])
def test_median(values, middle):
    assert median(values) == middle


def test_ratios_are_those_of_neighbours():
    # The machine was twice as slow during the second round: the ratio doesn't show it.
    assert pair_ratios([3.0, 6.0, 1.0], [2.0, 4.0, 4.0]) == [1.5, 1.5, 0.25]


def test_ratios_need_pairs():
    with pytest.raises(ValueError, match="longer"):
        pair_ratios([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (list(range(10, -1, -1)), (1, 9)),
        ([0.0, 1.0], (0.1, 0.9)),
        ([5.0], (5.0, 5.0)),
    ],
)
def test_spread_is_from_the_10th_to_the_90th_percentile(values, expected):
    assert spread(values) == pytest.approx(expected)
