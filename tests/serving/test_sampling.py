"""Tokens chosen as each request asks: by the book, and whatever the batch."""

from collections import Counter

import pytest
import torch

from lookup_experts.serving import sampling
from lookup_experts.serving.sampling import (
    Chooser,
    choose,
    choose_reference,
    log_probabilities,
)

WAYS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 7},
    {"temperature": 2.0, "top_k": 30, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 0.99},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "min_p": 0.001, "top_p": 0.95},
    {"temperature": 0.8, "min_p": 1.0, "top_k": 5},
)


@pytest.mark.parametrize("nucleus", [4, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choosing_is_as_by_the_book(monkeypatch, nucleus, dtype):
    monkeypatch.setattr(sampling, "NUCLEUS", nucleus)
    generator = torch.Generator().manual_seed(0)
    for seed in range(30):
        # All different, since among equals sorting may choose either.
        logits = (torch.randperm(200, generator=generator)[: 12 * 16].view(12, 16) / 16).to(dtype)
        fast = [Chooser(**way, seed=seed) for way in WAYS]
        slow = [Chooser(**way, seed=seed) for way in WAYS]
        assert choose(logits, fast).tolist() == choose_reference(logits, slow)
        assert [one.random.random() for one in fast] == [one.random.random() for one in slow]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 3000])
def test_a_draw_in_blocks_is_as_entry_by_entry(size):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(12, size, generator=generator)
    probabilities[:, size // 2 + 1 :] = 0
    numbers = [*torch.rand(10, generator=generator).tolist(), 0.0, 1 - 2**-53]
    drawn = sampling._draw(probabilities, numbers)
    assert drawn.tolist() == sampling.draw_reference(probabilities, numbers).tolist()
    assert (probabilities.gather(1, drawn.unsqueeze(1)) > 0).all()


def test_the_batch_changes_nothing():
    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(1))
    together = choose(logits, [Chooser(**way, seed=3) for way in WAYS]).tolist()
    alone = [
        int(choose(row[None], [Chooser(**way, seed=3)]))
        for row, way in zip(logits, WAYS, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("way", [{}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.3}])
def test_tokens_are_as_frequent_as_they_are_probable(way):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    chooser = Chooser(temperature=1.0, seed=0, **way)
    counts = Counter(int(choose(logits, [chooser])) for _ in range(3000))
    expected = logits[0].softmax(-1)
    keep = {"top_p": 2, "top_k": 3, "min_p": 2}.get(next(iter(way), ""), 5)
    expected = expected[:keep] / expected[:keep].sum()
    for token_id, probability in enumerate(expected.tolist()):
        assert counts[token_id] / 3000 == pytest.approx(probability, abs=0.03)
    assert set(counts) <= set(range(keep))


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 6), float("-inf"))
    logits[0, 3] = 0.0
    for way in WAYS:
        assert choose(logits, [Chooser(**way, seed=0)]).tolist() == [3]


def test_no_temperature_is_too_low_or_too_high():
    logits = torch.tensor([[1.0, 3.0, 2.0]]) * 50
    for temperature in (5e-324, 1e-45, 1e-30, 1e-6, 1e-4):
        assert choose(logits, [Chooser(temperature=temperature)]).tolist() == [1]
    assert choose(logits, [Chooser(temperature=100.0, top_p=1e-300)]).tolist() == [1]


def test_log_probabilities_of_any_dtype():
    logits = torch.randn(3, 40).bfloat16()
    told = log_probabilities(logits, torch.tensor([4, 5, 6]), top=50)
    expected = logits.float().log_softmax(-1)
    for row, one in enumerate(told):
        assert one.value == pytest.approx(float(expected[row, row + 4]), abs=1e-5)
        assert len(one.top_ids) == 40
        assert one.top_values == sorted(one.top_values, reverse=True)
    assert log_probabilities(logits, torch.tensor([1, 2, 3]), top=0)[0].top_ids == []
