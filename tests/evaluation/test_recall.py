"""Recall: what the sequences are, and what models of known abilities score on them."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, attached_model, tiny_model
from torch import Tensor

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.evaluation.recall import (
    fitting_distances,
    measure_recall,
    recall_sequences,
    word_ids,
)

WORDS = torch.arange(10, 90)


class Model:
    """Gives the logits [V] that a rule finds in a sequence of ids [T]."""

    device = torch.device("cpu")

    def __init__(self, rule, context: int = 200) -> None:
        self.rule = rule
        config = SimpleNamespace(max_position_embeddings=context)
        config.get_text_config = lambda: config
        self.config = config

    def __call__(self, input_ids, **options):
        return SimpleNamespace(logits=torch.stack([self.rule(ids) for ids in input_ids])[:, None])


def one_hot(token_id: int | Tensor) -> Tensor:
    return 30.0 * torch.nn.functional.one_hot(torch.as_tensor(token_id), VOCAB).float()


def recaller(ids: Tensor) -> Tensor:
    """What followed the last token when it was there before."""
    (before,) = torch.nonzero(ids[:-1] == ids[-1], as_tuple=True)
    return one_hot(ids[before[0] + 1])


def test_what_recalls_perfectly_scores_all():
    found = measure_recall(Model(recaller), WORDS, num_sequences=20)
    assert [each.distance for each in found.distances] == [16, 32, 64, 128]
    for each in found.distances:
        assert each.accuracy == 1 and each.accuracy_error == 0
        assert each.nats == pytest.approx(0, abs=1e-9)


def test_what_makes_no_difference_scores_chance():
    found = measure_recall(Model(lambda ids: torch.zeros(VOCAB)), WORDS, num_sequences=20)
    for each in found.distances:
        assert each.accuracy == found.chance_accuracy == 1 / 8
        assert each.nats == pytest.approx(found.chance_nats) == pytest.approx(-math.log(8))


def newest(ids: Tensor) -> Tensor:
    """The nearer to the end, the likelier."""
    logits = torch.zeros(VOCAB)
    for place, token_id in enumerate(ids):
        logits[token_id] = place / 4
    return logits


LIKINGS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("rule", [newest, lambda ids: LIKINGS], ids=["newest", "likings"])
def test_habits_that_are_no_recall_score_chance(rule):
    found = measure_recall(Model(rule), WORDS, distances=[16, 40], num_sequences=600)
    for each in found.distances:
        assert abs(each.accuracy - 1 / 8) < 4 * each.accuracy_error
        assert each.accuracy_error == pytest.approx(math.sqrt(7 / 64 / 600), rel=0.2)
        assert each.nats < found.chance_nats


@pytest.mark.parametrize("distance", [6, 7, 30])
def test_sequences(distance):
    sequences, values = recall_sequences(WORDS, distance, 3, 200, seed=1)
    assert sequences.shape == (200, 2 * 3 - 1 + distance)
    asked = set()
    for ids, choices in zip(sequences.tolist(), values.tolist(), strict=True):
        key = ids[-1]
        assert ids.count(key) == 2 and ids.index(key) == len(ids) - 1 - distance
        assert ids[ids.index(key) + 1] == choices[0]
        places = [ids.index(value) for value in choices]
        assert all(ids.count(value) == 1 for value in choices)
        assert sorted(places) == list(range(min(places), min(places) + 6, 2))
        asked.add((places[0] - min(places)) // 2)
        assert set(ids) <= set(WORDS.tolist())
    assert asked == {0, 1, 2}


def test_sequences_depend_on_the_seed_and_the_distance_alone():
    first = recall_sequences(WORDS, 20, 4, 10, seed=0)
    again = recall_sequences(WORDS, 20, 4, 10, seed=0)
    other = recall_sequences(WORDS, 20, 4, 10, seed=1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    more, _ = recall_sequences(WORDS, 20, 4, 30, seed=0)
    assert torch.equal(more[:10], first[0])


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_and_progress_change_nothing(batch_size):
    model = attached_model("llama")
    told = []
    found = measure_recall(
        model,
        WORDS,
        distances=[16, 30],
        num_sequences=20,
        batch_size=batch_size,
        progress=lambda done, total: told.append((done, total)),
    )
    expected = measure_recall(model, WORDS, distances=[16, 30], num_sequences=20)
    assert told[-1] == (40, 40) and [done for done, _ in told] == sorted({d for d, _ in told})
    for one, other in zip(found.distances, expected.distances, strict=True):
        assert one.accuracy == other.accuracy
        assert one.nats == pytest.approx(other.nats, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bloom", "mixtral"])
def test_all_kinds_of_models(family):
    assert family in FAMILIES
    found = measure_recall(tiny_model(family), WORDS, distances=[16], num_sequences=4)
    assert found.distances[0].nats < 0


def test_a_table_on_disk_recalls_what_its_experts_do(training_folder, table_folder):
    found = [
        measure_recall(model, WORDS, num_sequences=10, prefix=[1])
        for model in (le.load(training_folder), le.load(table_folder, store="direct"))
    ]
    experts, table = (each.distances for each in found)
    assert [each.accuracy for each in table] == [each.accuracy for each in experts]
    for one, other in zip(table, experts, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-5)


def test_distances_fit_into_the_context():
    assert fitting_distances(Model(recaller, 47), 8, prefix_tokens=0) == [16, 32]
    assert fitting_distances(Model(recaller, 47), 8, prefix_tokens=1) == [16]
    assert fitting_distances(Model(recaller, 10**6), 8, 0)[-1] == 1024
    with pytest.raises(UserError, match=r"context of 30 tokens is too short.* need 31"):
        fitting_distances(Model(recaller, 30), 8, 0)


@pytest.mark.parametrize(
    ("words", "distance", "message"),
    [(WORDS[:31], 16, "needs 32 words.* there are 31"), (WORDS, 15, "at least 16")],
)
def test_too_little_is_refused(words, distance, message):
    with pytest.raises(UserError, match=message):
        recall_sequences(words, distance, 8, 4, seed=0)


def word_tokenizer(entries: list[str]):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {entry: number for number, entry in enumerate(["<s>", *entries])}
    model = models.WordLevel(vocabulary, unk_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>")


def test_words_of_a_tokenizer():
    words = [f"Ġword{chr(97 + number)}" for number in range(20)]
    pieces = ["Ġan", "ing", "Ġ1234", "ĠNames", "Ġcaf\N{LATIN SMALL LETTER E WITH ACUTE}", "Ġ"]
    others = [f"▁other{chr(97 + number)}" for number in range(12)]
    tokenizer = word_tokenizer(words + pieces + others)
    found = tokenizer.convert_ids_to_tokens(word_ids(tokenizer).tolist())
    assert found == words + others
    with pytest.raises(UserError, match="has 20 of them, and 32 are needed"):
        word_ids(word_tokenizer(words))
