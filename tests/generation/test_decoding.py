"""Every way of transformers to decode gives what a loop without a cache gives, in both forms."""

import pytest
import torch
from tiny_models import (
    attached_model,
    greedy,
    greedy_reference,
    left_padded,
    logits_of,
    tiny_model,
    token_ids,
)

import lookup_experts as le
from lookup_experts.model.cache_names import cache_argument, cache_of

NEW = 10
PROMPT = token_ids(1, 12, seed=3)


@pytest.fixture(scope="module", params=["experts", "table"])
def model(request, table_folder, training_folder):
    """The same model in training form and in table form."""
    if request.param == "experts":
        return le.load(training_folder)
    return le.load(table_folder, store="direct")


@pytest.fixture(scope="module")
def expected(training_folder):
    """What the training form says without a cache."""
    return greedy_reference(le.load(training_folder), PROMPT, NEW)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda arguments: ",".join(arguments) or "default",
)
def test_every_way_to_decode_gives_the_same_tokens(model, expected, arguments):
    assert torch.equal(greedy(model, PROMPT, NEW, **arguments), expected)


def test_beams_are_those_of_a_search_without_a_cache(model):
    search = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    found = greedy(model, PROMPT, NEW, **search)
    assert found.shape == (2, NEW)
    assert torch.equal(found, greedy(model, PROMPT, NEW, use_cache=False, **search))


@pytest.mark.parametrize("assistant", ["plain", "attached"])
def test_assisted_decoding_gives_the_same_tokens(model, expected, assistant):
    helper = tiny_model("llama", seed=5)
    if assistant == "attached":
        helper = attached_model("llama", seed=5)
    found = greedy(model, PROMPT, NEW, assistant_model=helper)
    assert torch.equal(found, expected)


def test_a_model_assists_itself(model, expected):
    """Draft and check by one model: its forward passes alternate between two caches."""
    assert torch.equal(greedy(model, PROMPT, NEW, assistant_model=model), expected)


def test_left_padding_changes_nothing(model):
    prompts = [token_ids(length, seed=length).tolist() for length in (3, 12, 1, 7, 5, 9, 2, 4)]
    ids, mask = left_padded(prompts)
    batched = greedy(model, ids, NEW, attention_mask=mask)
    for row, prompt in zip(batched, prompts, strict=True):
        alone = greedy_reference(model, torch.tensor([prompt]), NEW)
        assert torch.equal(row, alone[0])


def test_a_cache_gives_the_logits_of_the_whole(model):
    ids = token_ids(2, 12)
    whole = logits_of(model, ids)
    with torch.no_grad():
        start = model(input_ids=ids[:, :7], use_cache=True)
        steps = [start.logits]
        cache = {cache_argument(model): cache_of(start)}
        for position in range(7, 12):
            step = model(input_ids=ids[:, position : position + 1], **cache)
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_contrasting_batches_one_after_the_other(model):
    """Rows of one batch are never those of another, whatever their sizes."""
    batches = [
        token_ids(*shape, seed=number)
        for number, shape in enumerate([(1, 1), (4, 20), (1, 2), (8, 3), (1, 64), (2, 2)])
    ]
    alone = [logits_of(model, ids) for ids in batches]
    for ids, logits in reversed(list(zip(batches, alone, strict=True))):
        assert torch.equal(logits_of(model, ids), logits)


def test_one_token_is_enough(model):
    assert logits_of(model, torch.ones((1, 1), dtype=torch.int64)).isfinite().all()
