"""Rows that join and leave at any step: both caches give what each sequence gives alone."""

import random

import pytest
import torch
from simulated_graphs import simulate
from tiny_models import VOCAB, attached_model, logits_of, tiny_model

import lookup_experts as le
from lookup_experts.generation import fixed_cache
from lookup_experts.generation.fixed_cache import FixedCache
from lookup_experts.serving.forward import Forward, Prompts
from lookup_experts.serving.kv_cache import BatchCache


def prefilled(forward: Forward, prompts: list[list[int]]) -> Prompts:
    group = Prompts(prompts)
    part = group.next_part(group.width)
    forward.prefill(part, group.cache, all_logits=False)
    group.advance(part)
    return group


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon"])
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_random_joins_and_leaves(family, seed, replayed, monkeypatch):
    if replayed:
        simulate(monkeypatch)
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 8)
    model, draw = tiny_model(family), random.Random(seed)
    forward = Forward(model)
    caches = (BatchCache(), FixedCache())
    texts: list[list[int]] = []

    def new_text(length: int) -> list[int]:
        return [draw.randrange(1, VOCAB) for _ in range(length)]

    for _ in range(60):
        if not texts or (len(texts) < 9 and draw.random() < 0.3):
            prompts = [new_text(draw.randrange(1, 20)) for _ in range(draw.randrange(1, 4))]
            for cache in caches:
                group = prefilled(forward, prompts)
                cache.join(group.cache, group.lengths)
            texts += prompts
        elif draw.random() < 0.2 or max(map(len, texts)) > 90:
            row = draw.randrange(len(texts))
            wipe = draw.random() < 0.5
            for cache in caches:
                cache.leave(row, wipe)
            texts[row] = texts[-1]
            texts.pop()
            continue
        ids = [draw.randrange(1, VOCAB) for _ in texts]
        texts = [[*text, one] for text, one in zip(texts, ids, strict=True)]
        by_batch, by_fixed = (forward.decode(ids, cache) for cache in caches)
        torch.testing.assert_close(by_fixed, by_batch, rtol=1e-4, atol=1e-4)
        alone = logits_of(model, torch.tensor([texts[0]]))[:, -1]
        torch.testing.assert_close(by_fixed[:1], alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_rows_that_pad_ask_for_no_other_record(table_folder):
    model = le.load(table_folder, store="direct")
    forward, cache = Forward(model), FixedCache()
    group = prefilled(forward, [[3, 4], [5], [6, 7, 8], [9], [10]])
    cache.join(group.cache, group.lengths)
    model.expert_source.reset_stats()
    logits = forward.decode([11, 12, 13, 14, 15], cache)
    counted = model.expert_source.stats()
    assert logits.shape == (5, VOCAB)
    assert (counted.ids_asked, counted.ids_unique) == (8, 5)
    model.expert_source.close()


@torch.inference_mode()
def test_a_step_that_failed_is_not_counted(monkeypatch):
    forward, cache = Forward(tiny_model("llama")), FixedCache()
    group = prefilled(forward, [[3, 4, 5]])
    cache.join(group.cache, group.lengths)
    with monkeypatch.context() as patched:
        patched.setattr(forward._steps, "_call", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward.decode([6], cache)
    assert cache.lengths == [3]
    found = forward.decode([6], cache)
    expected = logits_of(forward._model, torch.tensor([[3, 4, 5, 6]]))[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_memory_follows_what_was_needed(monkeypatch):
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 8)
    forward, cache = Forward(tiny_model("llama")), FixedCache()
    for prompts in ([[1] * 3], [[2] * 17, [3]], [[4]] * 3):
        group = prefilled(forward, prompts)
        cache.join(group.cache, group.lengths)
        forward.decode([5] * len(cache), cache)
    assert cache.layers[0].keys.shape == (8, 2, 32, 8)  # 6 rows, 18 columns
    while len(cache):
        cache.leave(0)
    group = prefilled(forward, [[1, 2]])
    cache.join(group.cache, group.lengths)
    forward.decode([5], cache)
    assert cache.layers[0].keys.shape == (8, 2, 32, 8)
    assert (cache.window.rows, cache.window.columns) == (1, 8)


# ------------------------------------------------------------------------------------- captured


def test_whether_steps_can_be_captured_is_tried(monkeypatch, table_folder):
    simulate(monkeypatch)
    model = tiny_model("llama")
    assert Forward(model)._try_to_capture() is None

    def look(module, given):
        given[0].nonzero()

    hook = model.lm_head.register_forward_pre_hook(look)
    told = Forward(model)._try_to_capture()
    assert told == "RuntimeError: operation not permitted when stream is capturing"
    hook.remove()
    sliding = Forward(tiny_model("mistral", sliding_window=9))._try_to_capture()
    assert sliding == "The model has attention to windows of past tokens."
    training = Forward(attached_model("llama"))._try_to_capture()
    assert training.startswith("The model has experts in training form")


def test_a_cpu_keeps_the_cache_that_grows():
    forward = Forward(tiny_model("llama"))
    assert isinstance(forward.new_cache(), BatchCache) and forward.why_not_captured is None


@torch.inference_mode()
def test_who_watches_the_experts_sees_every_step(monkeypatch, table_folder):
    """A replay would pass the observer by."""
    simulate(monkeypatch)
    model = le.load(table_folder, store="memory")
    forward, cache = Forward(model), FixedCache()
    group = prefilled(forward, [[3, 4]])
    cache.join(group.cache, group.lengths)
    for _ in range(3):
        seen: list[int] = []
        model.lookup_entrance.observe = lambda layer, weights, seen=seen: seen.append(layer)
        watched = forward.decode([5], cache).clone()
        model.lookup_entrance.observe = None
        assert seen == [0, 1, 2]
    alone = logits_of(model, torch.tensor([[3, 4, 5, 5, 5]]))[:, -1]
    torch.testing.assert_close(watched, alone, rtol=1e-4, atol=1e-4)
    assert not cache.captured
