"""Tokens are chosen as transformers' `generate` chooses them, by operations of the device alone."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lookup_experts.generation.sampling import Sampling

DRAWS = 20_000
LOGITS = torch.linspace(-3, 3, 24)[torch.arange(24) * 7 % 24].to(torch.bfloat16)


def probabilities_of_transformers(sampling: Sampling) -> torch.Tensor:
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, LOGITS[None].float())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1),
        Sampling(temperature=0.5),
        Sampling(temperature=2, top_k=5),
        Sampling(temperature=1, top_p=0.7),
        Sampling(temperature=1.5, top_k=9, top_p=0.8),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_transformers_says(sampling):
    torch.manual_seed(0)
    chosen = sampling.choose(LOGITS.expand(DRAWS, -1))
    assert chosen.dtype == torch.int64
    expected = probabilities_of_transformers(sampling)
    shares = chosen.bincount(minlength=24) / DRAWS
    assert not shares[expected == 0].any()
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((shares - expected).abs() <= 4.5 * deviation).all()


def test_rows_are_drawn_each_for_itself():
    torch.manual_seed(0)
    logits = torch.full((3, 10), -30.0)
    logits[torch.arange(3), torch.tensor([4, 0, 9])] = 30
    assert Sampling(temperature=1).choose(logits).tolist() == [4, 0, 9]


def test_without_temperature_the_likeliest_is_taken():
    chosen = Sampling(top_k=5, top_p=0.5).choose(LOGITS.expand(4, -1))
    assert chosen.tolist() == [int(LOGITS.argmax())] * 4


def test_a_seed_repeats_what_is_drawn():
    def drawn(seed):
        torch.manual_seed(seed)
        return Sampling(temperature=1).choose(LOGITS.expand(50, -1)).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
