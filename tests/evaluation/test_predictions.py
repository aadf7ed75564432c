"""How far one model's predictions are from another's: by hand, by a plain computation, refused."""

import math

import pytest
import torch
from tiny_models import gateless_model, logits_of, token_ids

from lookup_experts.errors import UserError
from lookup_experts.evaluation.perplexity import perplexity
from lookup_experts.evaluation.predictions import compare_logits, compare_models

TEXT = token_ids(1, 51, seed=5)[0]


def test_compared_logits_by_hand():
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]).log()
    found = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log()
    sums = compare_logits(reference, found + 3, torch.tensor([0, 0]))  # logits up to a constant
    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)
    divergence += 2 * 0.125 * math.log(0.5) + 0.75 * math.log(1.5)
    expected = [math.log(2) + math.log(8), 2 * math.log(4), divergence, 1]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)


def test_two_models_by_a_plain_computation():
    model, reference = gateless_model(), gateless_model(num_hidden_layers=1)
    found = compare_models(model, reference, TEXT)
    inputs = TEXT[None, :-1]
    logits = [logits_of(each, inputs)[0].double() for each in (reference, model)]
    expected, other = (each.log_softmax(-1) for each in logits)
    divergence = float((expected.exp() * (expected - other)).sum(-1).mean())
    assert divergence > 1e-4
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-3)
    agreement = (expected.argmax(-1) == other.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(agreement))
    assert found.largest_logit_difference == pytest.approx(
        float((logits[0] - logits[1]).abs().max()), rel=1e-4
    )
    alone = perplexity(model, TEXT, 50)
    assert found.of_model.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-5)
    assert found.of_model.predicted_tokens == 50
    of_reference = perplexity(reference, TEXT, 50).perplexity
    assert found.reference_perplexity == pytest.approx(of_reference, rel=1e-5)


def test_windows_are_as_long_as_both_models_take():
    short, long = (gateless_model(max_position_embeddings=length) for length in (16, 40))
    for pair in ((short, long), (long, short)):
        found = compare_models(*pair, TEXT)
        assert found.context == 16
        assert (found.top1_agreement, found.largest_logit_difference) == (1, 0)


def test_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="predicts 97 token ids and the reference 120"):
        compare_models(gateless_model(), gateless_model(vocab_size=120), TEXT)


def test_a_text_beyond_either_model_is_refused():
    small, large = gateless_model(vocab_size=20), gateless_model()
    for pair in ((small, large), (large, small)):
        with pytest.raises(UserError, match="ids 0 to 19 only"):
            compare_models(*pair, TEXT)
