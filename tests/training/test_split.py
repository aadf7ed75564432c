"""What is held out: about the fraction, never all, never a copy of what is trained on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookup_experts.errors import UserError
from lookup_experts.training.split import hold_out

RANDOM = np.random.default_rng(0)


def keys(count: int) -> np.ndarray:
    return RANDOM.integers(0, 2**64, count, dtype=np.uint64)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1000)), min_size=2, max_size=50),
    st.floats(0.001, 0.999),
)
def test_something_is_held_out_and_something_is_left(documents, fraction):
    lengths = dict(documents)  # Equal keys are equal documents, so they are equally long.
    document_keys = np.array([key for key, _ in documents], dtype=np.uint64)
    num_tokens = np.array([lengths[key] + 1 for key, _ in documents])
    held_out = hold_out(document_keys, num_tokens, fraction)
    if len(lengths) == 1:
        assert 0 < held_out.tail_start < num_tokens.sum()
    else:
        assert held_out.tail_start is None
        assert 0 < held_out.documents.sum() < len(documents)
        held = set(document_keys[held_out.documents])
        assert held.isdisjoint(document_keys[~held_out.documents])


def test_the_order_of_documents_makes_no_difference():
    document_keys, num_tokens = keys(1000), RANDOM.integers(1, 500, 1000)
    order = RANDOM.permutation(1000)
    held_out = hold_out(document_keys, num_tokens, 0.05).documents
    assert np.array_equal(
        held_out[order], hold_out(document_keys[order], num_tokens[order], 0.05).documents
    )


def test_a_million_short_rows_hit_the_fraction():
    num_tokens = RANDOM.integers(5, 300, 10**6)
    held_out = hold_out(keys(10**6), num_tokens, 0.01).documents
    assert num_tokens[held_out].sum() / num_tokens.sum() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1])
def test_ninety_seven_novels_come_near_the_fraction(fraction):
    for _ in range(20):
        num_tokens = RANDOM.integers(100_000, 400_000, 97)
        held_out = hold_out(keys(97), num_tokens, fraction).documents
        share = num_tokens[held_out].sum() / num_tokens.sum()
        assert 0 < share <= max(2 * fraction, 0.01)


def test_a_long_document_among_short_ones_is_not_held_out():
    num_tokens = np.full(1001, 10)
    num_tokens[500] = 10**6
    for _ in range(50):
        held_out = hold_out(keys(1001), num_tokens, 0.01).documents
        assert held_out.any()
        assert not held_out[500]


def test_of_two_documents_the_shorter_is_held_out():
    assert hold_out(keys(2), np.array([900, 100]), 0.01).documents.tolist() == [False, True]


def test_empty_documents_do_not_count():
    held_out = hold_out(keys(3), np.array([0, 500, 0]), 0.01)
    assert held_out.tail_start == 495
    assert held_out.for_manifest() == {"fraction": 0.01, "by": "tail"}


def test_fraction_zero_holds_out_nothing():
    held_out = hold_out(keys(3), np.array([5, 500, 5]), 0)
    assert not held_out.documents.any()
    assert held_out.for_manifest() == {"fraction": 0, "by": "nothing"}


def test_one_token_cannot_be_split():
    with pytest.raises(UserError, match="1 token: too short"):
        hold_out(keys(1), np.array([1]), 0.01)
