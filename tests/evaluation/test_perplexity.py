"""Perplexity: by hand, by a plain loop, and by transformers' own loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB, attached_model, tiny_model, token_ids
from torch import nn

from lookup_experts.errors import UserError
from lookup_experts.evaluation.perplexity import perplexity, window_size, windows


class Bigrams:
    """Predicts the next token from the last one alone, with the given probabilities [V, V]."""

    device = torch.device("cpu")

    def __init__(self, probabilities: list[list[float]], context: int | None = None) -> None:
        self.logits = torch.tensor(probabilities).log()
        self.calls: list[tuple[int, ...]] = []
        config = SimpleNamespace(max_position_embeddings=context)
        config.get_text_config = lambda: config
        self.config = config

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(len(self.logits), 1)

    def __call__(self, input_ids, use_cache):
        assert not use_cache
        self.calls.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.logits[input_ids])


HALVES = Bigrams([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5]])
TEXT = torch.tensor([0, 0, 1, 0, 2, 2, 1])
# P(0|0) P(1|0) P(0|1) P(2|0) P(2|2) P(1|2)
BY_HAND = [0.5, 0.25, 0.125, 0.25, 0.5, 0.25]


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 6, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_by_hand(context, batch_size):
    """With bigrams the windows change nothing: every token but the first counts once."""
    found = perplexity(HALVES, TEXT, context, batch_size)
    assert found.predicted_tokens == 6
    assert found.context == context
    assert found.nats_per_token == pytest.approx(-sum(map(math.log, BY_HAND)) / 6)
    # 1/2 · 1/4 · 1/8 · 1/4 · 1/2 · 1/4 = 2^-11
    assert found.perplexity == pytest.approx(2 ** (11 / 6))


def test_windows_are_the_context_long_and_the_last_one_is_alone():
    text = torch.arange(11)
    batches = [(x.tolist(), y.tolist()) for x, y in windows(text, 4, 8)]
    assert batches == [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([[8, 9]], [[9, 10]]),
    ]
    assert [tuple(x.shape) for x, _ in windows(torch.arange(9), 4, 1)] == [(1, 4), (1, 4)]
    assert [tuple(x.shape) for x, _ in windows(torch.arange(4), 4, 1)] == [(1, 3)]


@pytest.fixture(scope="module")
def model():
    return attached_model("llama")


def test_as_transformers_computes_it(model):
    text = token_ids(1, 50)[0]
    with torch.no_grad():
        loss = model(input_ids=text[None], labels=text[None]).loss
    found = perplexity(model, text, 128)
    assert found.nats_per_token == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_as_a_plain_loop_computes_it(model, batch_size):
    """Each token from the tokens before it in its window, one forward pass for each."""
    text, context = token_ids(1, 41, seed=3)[0], 8
    nats = []
    for place in range(1, len(text)):
        start = (place - 1) // context * context
        with torch.no_grad():
            logits = model(input_ids=text[None, start:place], use_cache=False).logits[0, -1]
        nats.append(-float(logits.double().log_softmax(-1)[text[place]]))
    found = perplexity(model, text, context, batch_size)
    assert found.nats_per_token == pytest.approx(sum(nats) / 40, rel=1e-5)


def test_many_positions_are_taken_in_pieces(model):
    text = token_ids(1, 1000, seed=4)[0]
    pieces = perplexity(model, text, 100, batch_size=4)
    assert pieces.nats_per_token == pytest.approx(perplexity(model, text, 100).nats_per_token)


def test_a_half_precision_model_is_summed_in_full_precision():
    model = tiny_model("llama").to(torch.bfloat16)
    text = token_ids(1, 120)[0]
    found = perplexity(model, text, 60)
    assert found.nats_per_token == pytest.approx(
        perplexity(model.float(), text, 60).nats_per_token, rel=0.02
    )


def test_progress_counts_tokens():
    seen = []
    perplexity(HALVES, TEXT, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_the_window_is_the_context_of_the_model_within_reason(model):
    assert window_size(model) == 128
    assert window_size(Bigrams([[1.0]], context=131_072)) == 2048
    assert window_size(Bigrams([[1.0]])) == 2048


@pytest.mark.parametrize(
    ("text", "context", "words"),
    [
        ([], 4, "has 0 tokens"),
        ([5], 4, "has 1 tokens; at least 2"),
        ([1, 2], 0, "context of 0 tokens"),
        ([1, 2], 129, r"context of 129 tokens is none that the model has \(1 to 128\)"),
        ([1, VOCAB], 4, f"token id {VOCAB}, and the model"),
        ([1, -1], 4, "token id -1, and the model"),
    ],
)
def test_what_can_not_be_evaluated_is_refused(text, context, words, model):
    with pytest.raises(UserError, match=words):
        perplexity(model, torch.tensor(text, dtype=torch.int64), context)
