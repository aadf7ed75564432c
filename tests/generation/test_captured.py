"""Decoding over buffers that stay in their places gives what `generate` gives; here without CUDA,
where the same operations run one by one."""

import pytest
import torch
from simulated_graphs import simulate
from tiny_models import attached_model, gateless_model, greedy, left_padded, tiny_model, token_ids

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.generation import fixed_cache
from lookup_experts.generation.captured import Decoding
from lookup_experts.generation.fixed_cache import FixedCache, power_of_two

# Rotary and learnt positions, ALiBi, grouped and single heads.
FAMILIES = ["llama", "qwen3", "gpt2", "bloom", "gpt_neox", "falcon", "opt", "mpt"]


def decoded(decoding, number: int) -> torch.Tensor:
    return torch.stack(list(decoding.tokens(number)), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_tokens_are_those_of_generate(family, batch, monkeypatch):
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 16)  # the buffers grow on the way
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2} if family == "mpt" else {}
    model = tiny_model(family, **sizes)
    prompts = [token_ids(length, seed=length).tolist() for length in range(3, 3 + 2 * batch, 2)]
    ids, mask = left_padded(prompts)
    decoding = Decoding(model, 64)
    decoding.begin(ids, mask)
    expected = greedy(model, ids, 30, attention_mask=mask)
    assert torch.equal(decoded(decoding, 30), expected)


@pytest.fixture
def table_model(table_folder):
    model = le.load(table_folder, store="direct", cache="8kB")
    yield model
    model.expert_source.close()


def test_batches_one_after_the_other_in_the_same_buffers(table_model):
    model = table_model
    decoding = Decoding(model, 128)
    for batch, length, number in ((2, 60, 9), (8, 5, 40), (1, 30, 2)):
        ids = token_ids(batch, length, seed=batch)
        decoding.begin(ids)
        assert torch.equal(decoded(decoding, number), greedy(model, ids, number))


def test_ids_that_are_written_are_taken_instead():
    model = gateless_model()
    ids = token_ids(2, 20)
    decoding = Decoding(model, 64)
    decoding.begin(ids[:, :12])
    for place in range(12, 20):
        decoding.feed(ids[:, place])
        decoding.step()
    assert torch.equal(decoded(decoding, 10), greedy(model, ids, 10))


def test_a_sequence_that_reaches_its_end_is_told():
    model = gateless_model()
    decoding = Decoding(model, 10)
    decoding.begin(token_ids(1, 7))
    assert len(list(decoding.tokens(4))) == 4  # the last one needs no place
    with pytest.raises(UserError, match="room for 10 tokens of each sequence, and one has 11"):
        decoding.step()
    with pytest.raises(UserError, match="room for 10 tokens of each sequence, and one has 12"):
        decoding.begin(token_ids(2, 12))


WINDOWS = "attention to windows of past tokens"
AGAINST = {
    "mistral": (lambda: tiny_model("mistral", sliding_window=8), WINDOWS),
    "gemma3": (lambda: tiny_model("gemma3_text", sliding_window=8), WINDOWS),
    "gpt_neo": (
        lambda: tiny_model(
            "gpt_neo",
            num_layers=2,
            num_hidden_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        WINDOWS,
    ),
    "training form": (lambda: attached_model("llama"), "experts in training form"),
}


@pytest.mark.parametrize("kind", AGAINST)
def test_what_a_model_has_against_it(kind):
    model, what = AGAINST[kind]
    with pytest.raises(UserError, match=what):
        Decoding(model(), 16)


def test_columns_that_were_never_written_say_nothing():
    """Whatever the buffers hold: a row sees its own tokens only."""
    model, ids = gateless_model(), token_ids(2, 9)
    found = []
    for fill in (0.0, 1e4):
        decoding = Decoding(model, 64)
        decoding.begin(ids)
        for layer in decoding._cache.layers:
            with torch.inference_mode():
                layer.keys[:, :, 9:] = layer.values[:, :, 9:] = fill
        found.append(decoded(decoding, 20))
    assert torch.equal(*found)


def test_buffers_grow_by_doubling_and_what_was_captured_goes(monkeypatch):
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 8)
    decoding = Decoding(gateless_model(), 64)
    decoding.begin(token_ids(3, 5))
    cache: FixedCache = decoding._cache
    cache.captured[4, 8] = "a graph"
    shapes = {tuple(cache.layers[0].keys.shape[::2])}
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)  # there is no device
    for _ in range(20):
        decoding.step()
        shapes.add(tuple(cache.layers[0].keys.shape[::2]))
    assert shapes == {(4, 8), (4, 16), (4, 32)}
    assert not cache.captured


@pytest.mark.parametrize("number, least, power", [(1, 1, 1), (3, 1, 4), (8, 1, 8), (5, 256, 256)])
def test_powers_of_two(number, least, power):
    assert power_of_two(number, least) == power


# ------------------------------------------------------------------------------------- replayed


@pytest.fixture
def simulated(monkeypatch):
    """Steps are captured and replayed, by what stands for CUDA's graphs."""
    simulate(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_replayed_steps_give_the_same_tokens(family, simulated, monkeypatch):
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 16)
    model = tiny_model(family)
    decoding = Decoding(model, 64)
    for batch in (3, 1, 4):
        prompts = [token_ids(length, seed=length).tolist() for length in range(3, 3 + batch)]
        ids, mask = left_padded(prompts)
        decoding.begin(ids, mask)
        expected = greedy(model, ids, 30, attention_mask=mask)
        assert torch.equal(decoded(decoding, 30), expected)


def test_a_step_is_captured_once_and_then_replayed(simulated):
    model = gateless_model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    decoding = Decoding(model, 128)
    for seed in range(3):
        ids = token_ids(2, 12, seed=seed)
        decoding.begin(ids)
        tokens = decoded(decoding, 20)
        assert len(calls) == 1 + (3 + 1 if seed == 0 else 0)  # prompt, warming up, capture
        assert torch.equal(tokens, greedy(model, ids, 20))
        calls.clear()
    ((graph, _),) = decoding._cache.captured.values()
    assert graph.replays == 3 * 19


def test_what_waits_for_the_device_cannot_be_captured(simulated):
    def look(hidden_states):
        hidden_states.nonzero()

    model = gateless_model()
    decoding = Decoding(model, 64)
    decoding.begin(token_ids(1, 5))
    before = decoding._cache.window.numbers.clone()
    hook = model.lm_head.register_forward_pre_hook(lambda module, given: look(given[0]))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        decoding.step()
    hook.remove()
    assert torch.equal(decoding._cache.window.numbers, before)
    assert torch.equal(decoded(decoding, 9), greedy(model, token_ids(1, 5), 9))
