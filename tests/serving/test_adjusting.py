"""Penalties, biases and bans: by the book, and only for those who ask."""

import random

import pytest
import torch
from served_sequences import Bench
from tiny_models import greedy_reference, tiny_model, token_ids

from lookup_experts.serving.adjusting import NEVER, Adjustment, Penalties
from lookup_experts.serving.sampling import Chooser, choose, choose_reference
from lookup_experts.serving.sequence import GenerationRequest

WAYS = (
    {"bias": {3: 5.0, 7: -100.0}},
    {"penalties": Penalties(presence=1.5)},
    {"penalties": Penalties(frequency=-0.7)},
    {"penalties": Penalties(repetition=1.3), "prompt_ids": [1, 2, 2, 9]},
    {"penalties": Penalties(0.5, 0.25, 0.8), "prompt_ids": [0], "bias": {4: 2.0}},
    {"end_ids": frozenset({5, 6, 5000}), "min_tokens": 3},
    {"end_ids": frozenset({5000}), "min_tokens": 3},
    {"end_ids": frozenset(range(20)), "min_tokens": 3},  # nothing else may come: they may
)
DRAWS = ({"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 5}, {"min_p": 0.2, "top_p": 0.9})


def filled(way, seed=0) -> Adjustment:
    """After some tokens."""
    adjustment = Adjustment(**way)
    for token_id in random.Random(seed).choices(range(20), k=seed % 5):
        adjustment.take(token_id)
    return adjustment


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjusting_is_as_by_the_book(way, dtype):
    for seed in range(15):
        logits = torch.randn(20, generator=torch.Generator().manual_seed(seed)).to(dtype)
        before = logits.clone()
        adjustment = filled(way, seed)
        adjusted = adjustment.apply(logits)
        assert torch.equal(logits, before)
        torch.testing.assert_close(adjusted, adjustment.apply_reference(logits))
        assert adjusted.max() > NEVER


@pytest.mark.parametrize("draw", DRAWS)
def test_choosing_with_adjustments_is_as_by_the_book(draw):
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        logits = torch.randperm(200, generator=generator)[: len(WAYS) * 20].view(-1, 20) / 16
        fast, slow = (
            [Chooser(**draw, seed=seed, adjustment=filled(way, seed)) for way in WAYS]
            for _ in range(2)
        )
        assert choose(logits, fast).tolist() == choose_reference(logits, slow)
        assert [one.random.random() for one in fast] == [one.random.random() for one in slow]


def test_nobody_else_s_row_is_touched(monkeypatch):
    logits = torch.randn(3, 20)
    seen = []
    apply = Adjustment.apply
    monkeypatch.setattr(Adjustment, "apply", lambda self, row: seen.append(row) or apply(self, row))
    asks = Chooser(temperature=0, adjustment=Adjustment(bias={4: 100.0}))
    plain = [Chooser(temperature=0), Chooser(seed=1)]
    alone = choose(logits[[0, 2]], [Chooser(temperature=0), Chooser(seed=1)]).tolist()
    chosen = choose(logits, [plain[0], asks, plain[1]]).tolist()
    assert (chosen[0], chosen[2]) == tuple(alone) and chosen[1] == 4
    assert len(seen) == 1 and torch.equal(seen[0], logits[1])


def test_an_adjustment_that_changes_nothing_is_none():
    assert not Adjustment(prompt_ids=[1, 2], end_ids=frozenset({3}))
    assert all(Adjustment(**way) for way in WAYS)


def test_a_repeating_model_is_kept_from_it():
    model = tiny_model("llama")
    prompt = token_ids(6).tolist()
    plain = greedy_reference(model, torch.tensor([prompt]), 40)[0].tolist()
    assert len(set(plain)) < 40  # it repeats itself

    def request(**way):
        return GenerationRequest(prompt, 40, Chooser(temperature=0, adjustment=Adjustment(**way)))

    with Bench(model) as bench:
        penalised, banned, alone = bench.run(
            request(penalties=Penalties(presence=1000.0)),
            request(bias={plain[0]: -1000.0}),
            GenerationRequest(prompt, 40),
        )
    assert len(set(penalised.ids)) == 40
    assert plain[0] not in banned.ids
    assert alone.ids == plain


def test_repetition_penalty_is_that_of_transformers():
    model = tiny_model("llama")
    prompt = torch.tensor([token_ids(6).tolist()])
    with torch.no_grad():
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=1.4,
            pad_token_id=0,
        )[0, 6:].tolist()
    adjustment = Adjustment(Penalties(repetition=1.4), prompt_ids=prompt[0].tolist())
    with Bench(model) as bench:
        chooser = Chooser(temperature=0, adjustment=adjustment)
        assert bench.run(GenerationRequest(prompt[0].tolist(), 30, chooser))[0].ids == expected
