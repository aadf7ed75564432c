"""Sequences that join and leave a batch get what they would get alone."""

import time

import pytest
import torch
from served_sequences import Bench
from tiny_models import VOCAB, attached_model, greedy_reference, tiny_model, token_ids

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.generation import fixed_cache
from lookup_experts.generation.captured import why_not_fixed
from lookup_experts.generation.fixed_cache import FixedCache
from lookup_experts.serving.forward import Forward
from lookup_experts.serving.sampling import Chooser
from lookup_experts.serving.sequence import Failed, Finished, GenerationRequest
from lookup_experts.serving.waiting import QueueFullError, ShuttingDownError


@pytest.fixture(autouse=True, params=["growing", "fixed"])
def cache(request, monkeypatch):
    """Both caches, whatever the device: a GPU's steps are captured over fixed buffers."""
    if request.param == "fixed":
        monkeypatch.setattr(Forward, "new_cache", lambda self: FixedCache())
        monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 16)
    return request.param


def prompts_of(*lengths: int) -> list[list[int]]:
    return [token_ids(length, seed=seed).tolist() for seed, length in enumerate(lengths)]


def expected_of(model, prompt: list[int], num_tokens: int) -> list[int]:
    return greedy_reference(model, torch.tensor([prompt]), num_tokens)[0].tolist()


# Full attention, sliding windows, ALiBi, learnt positions, grouped and single heads, and experts.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "gemma3_text": {"sliding_window": 7},
    "gpt2": {},
    "bloom": {},
    "gpt_neox": {},
    "falcon": {},
    "mixtral": {},
    "gpt_oss": {"sliding_window": 6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_lengths_equal_each_alone(family, cache):
    model = tiny_model(family, **FAMILIES[family])
    if cache == "fixed" and why_not_fixed(model) is not None:
        pytest.skip("its steps are not captured")
    prompts = prompts_of(3, 21, 1, 14, 8)
    lengths = [17, 5, 12, 9, 1]
    with Bench(model, max_batch=3) as bench:
        requests = [
            GenerationRequest(prompt, length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        done = bench.run(*requests)
    for one, prompt, length in zip(done, prompts, lengths, strict=True):
        assert one.ids == expected_of(model, prompt, length)
        assert one.end.reason == "length"


@pytest.fixture(scope="module")
def model(table_folder):
    loaded = le.load(table_folder, store="direct", cache="8kB")
    yield loaded
    loaded.expert_source.close()


def test_sequences_that_come_while_others_run_change_nothing(model):
    prompts = prompts_of(5, 30, 2, 11, 64, 7)
    with Bench(model, max_batch=4) as bench:
        collected = []
        for prompt in prompts:
            collected += bench.submit(GenerationRequest(prompt, 24))
            collected[-1].first.wait(10) if len(collected) < 4 else time.sleep(0.01)
        for one, prompt in zip(collected, prompts, strict=True):
            assert one.wait().ids == expected_of(model, prompt, 24)
        assert bench.engine.num_running == 0


def test_a_long_prompt_goes_through_in_parts(model, monkeypatch):
    from lookup_experts.serving import engine

    monkeypatch.setattr(engine, "PART_BESIDE_RUNNING", 7)
    monkeypatch.setattr(engine, "PART_ALONE", 16)
    prompts = prompts_of(4, 90, 33)
    with Bench(model, max_batch=4) as bench:
        first = bench.submit(GenerationRequest(prompts[0], 30))[0]
        first.first.wait(10)
        others = bench.run(*(GenerationRequest(prompt, 12) for prompt in prompts[1:]))
        assert first.wait().ids == expected_of(model, prompts[0], 30)
    for one, prompt in zip(others, prompts[1:], strict=True):
        assert one.ids == expected_of(model, prompt, 12)


def test_a_batch_that_moves_back_to_the_left_edge_goes_on_as_before(model, monkeypatch):
    from lookup_experts.serving import kv_cache

    monkeypatch.setattr(kv_cache, "LEAST_SLACK", 4)
    monkeypatch.setattr(kv_cache, "MOST_SLACK", 4)
    prompts = prompts_of(9, 3, 16)
    with Bench(model, max_batch=4) as bench:
        done = bench.run(*(GenerationRequest(prompt, 30) for prompt in prompts))
    for one, prompt in zip(done, prompts, strict=True):
        assert one.ids == expected_of(model, prompt, 30)


def test_log_probabilities_are_those_of_generate(model):
    prompt = prompts_of(12)[0]
    with torch.no_grad():
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        scores = torch.cat(generated.logits).float().log_softmax(-1)
        of_prompt = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    with Bench(model) as bench:
        others = bench.submit(*(GenerationRequest(one, 20) for one in prompts_of(6, 19)))
        request = GenerationRequest(prompt, 8, top_log_probabilities=3, score_prompt=True)
        done = bench.run(request)[0]
        for other in others:
            other.wait()
    for token, score in zip(done.tokens, scores, strict=True):
        told = token.scored[0].score
        assert told.value == pytest.approx(float(score[token.token_id]), abs=1e-4)
        top = score.topk(3)
        assert told.top_ids == top.indices.tolist()
        assert told.top_values == pytest.approx(top.values.tolist(), abs=1e-4)
    for told, token_id, score in zip(done.prompt_scores, prompt[1:], of_prompt, strict=False):
        assert told.token_id == token_id
        assert told.value == pytest.approx(float(score[token_id]), abs=1e-4)
    assert len(done.prompt_scores) == len(prompt) - 1


def test_a_prompt_can_be_scored_without_a_token_after_it(model):
    with Bench(model) as bench:
        done = bench.run(
            GenerationRequest(prompts_of(12)[0], 0, top_log_probabilities=0, score_prompt=True)
        )[0]
    assert len(done.prompt_scores) == 11
    assert done.tokens == []
    assert done.end.reason == "length"


def test_a_seed_gives_the_same_tokens_in_any_company(model):
    prompt = prompts_of(8)[0]

    def request(seed):
        chooser = Chooser(temperature=1.3, top_p=0.9, top_k=40, seed=seed)
        return GenerationRequest(prompt, 25, chooser)

    with Bench(model) as bench:
        alone = bench.run(request(5))[0].ids
        crowd = [GenerationRequest(one, 20) for one in prompts_of(3, 17, 40)]
        together = bench.run(request(4), request(5), *crowd)
    assert together[1].ids == alone
    assert together[0].ids != alone


def test_end_tokens_end_a_text(model):
    prompt = prompts_of(10)[0]
    expected = expected_of(model, prompt, 20)
    end = expected[6]
    with Bench(model, end_ids=(end,)) as bench:
        done = bench.run(GenerationRequest(prompt, 20))[0]
    assert done.ids == expected[: expected.index(end) + 1]
    assert done.end.reason == "stop"


def test_the_model_is_told_of_only_when_somebody_asks(model):
    context = model.lookup_entrance
    prompt = prompts_of(5)[0]
    with Bench(model) as bench:
        plain, asked = bench.run(
            GenerationRequest(prompt, 6), GenerationRequest(prompt, 6, lookup_details=True)
        )
        assert context.observe is None
    assert plain.ids == asked.ids
    assert all(token.lookup is None for token in plain.tokens)
    for token in asked.tokens:
        weights = torch.tensor(token.lookup.weights)
        assert weights.shape == (3, 4)
        assert torch.allclose(weights.sum(-1), torch.ones(3), atol=1e-3)
        assert token.lookup.bytes_read == (0 if token.lookup.cache_hit else 1536)
        assert token.lookup.milliseconds > 0


def test_router_weights_are_those_of_the_forward_that_gave_the_token(model):
    prompt = prompts_of(9)[0]
    with Bench(model) as bench:
        others = bench.submit(*[GenerationRequest(one, 90) for one in prompts_of(7, 30)])
        asked = bench.run(GenerationRequest(prompt, 4, lookup_details=True))[0]
        for other in others:
            other.wait()
    assert len(asked.ids) == 4
    seen = []
    model.lookup_entrance.observe = lambda layer, weights: seen.append(weights)
    with torch.no_grad():
        model(torch.tensor([prompt + asked.ids[:-1]]))
    model.lookup_entrance.observe = None
    expected = torch.stack(seen)[:, len(prompt) - 1 :]  # [L, tokens, N]
    told = torch.tensor([token.lookup.weights for token in asked.tokens]).transpose(0, 1)
    assert torch.allclose(told, expected, atol=2e-4)


def test_what_was_read_is_told_of_each_token(table_folder):
    loaded = le.load(table_folder, store="direct", cache="1MB")
    loop = [5, 5, 5, 5]
    with Bench(loaded) as bench:
        first = bench.run(GenerationRequest(loop, 1, lookup_details=True))[0].tokens[0].lookup
        again = bench.run(GenerationRequest(loop, 1, lookup_details=True))[0].tokens[0].lookup
        many = list(range(1, 90))
        prompt = bench.run(GenerationRequest(many, 1, lookup_details=True))[0].tokens[0].lookup
    assert (first.cache_hit, first.bytes_read) == (False, 1536)
    assert (again.cache_hit, again.bytes_read) == (True, 0)
    assert (prompt.cache_hit, prompt.bytes_read) == (False, 1536)  # past the cache
    in_memory = le.load(table_folder, store="memory")
    with Bench(in_memory) as bench:
        detail = bench.run(GenerationRequest(loop, 1, lookup_details=True))[0].tokens[0].lookup
    assert (detail.cache_hit, detail.bytes_read) == (None, 0)


def test_a_batch_reads_each_distinct_record_once(table_folder):
    loaded = le.load(table_folder, store="direct")
    request = GenerationRequest(prompts_of(9)[0], 12)

    def reads(bench, number):
        before = loaded.expert_source.stats()
        bench.run(*[request] * number)
        after = loaded.expert_source.stats()
        names = ("batches", "ids_asked", "ids_unique", "bytes_read")
        return [getattr(after, name) - getattr(before, name) for name in names]

    with Bench(loaded) as bench:
        alone, together = reads(bench, 1), reads(bench, 8)  # no row that only pads
    batches, asked, unique, num_bytes = alone
    assert num_bytes > 0
    assert together == [batches, 8 * asked, unique, num_bytes]


def test_details_of_a_dense_model_have_no_weights():
    with Bench(tiny_model("llama")) as bench:
        detail = bench.run(GenerationRequest([3, 4], 1, lookup_details=True))[0].tokens[0].lookup
    assert (detail.weights, detail.cache_hit, detail.bytes_read) == (None, None, 0)


def test_the_training_form_is_served_too():
    attached = attached_model("llama")
    prompts = prompts_of(6, 15)
    with Bench(attached) as bench:
        done = bench.run(*(GenerationRequest(prompt, 10) for prompt in prompts))
    for one, prompt in zip(done, prompts, strict=True):
        assert one.ids == expected_of(attached, prompt, 10)


# ------------------------------------------------------------------------------ ends and errors


def test_what_is_cancelled_leaves_within_a_step(model):
    prompts = prompts_of(5, 9)
    with Bench(model) as bench:
        gone, stays = bench.submit(
            GenerationRequest(prompts[0], 100), GenerationRequest(prompts[1], 40)
        )
        gone.first.wait(10)
        bench.engine.cancel(gone.sequence)
        heard = len(gone.events)
        assert stays.wait().ids == expected_of(model, prompts[1], 40)
        assert len(gone.events) <= heard + 2
        assert bench.engine.num_running == 0
        assert b'mole_sequences_total{end="cancelled"} 1.0' in bench.metrics.exposition()


def test_a_full_queue_takes_all_of_a_request_or_nothing(model):
    request = GenerationRequest(prompts_of(5)[0], 3)
    bench = Bench(model, max_batch=2, max_queue=3)  # not started: nothing leaves the queue
    bench.submit(request, request)
    with pytest.raises(QueueFullError):
        bench.submit(*[request] * 4)
    waiting = bench.submit(*[request] * 3)
    with pytest.raises(QueueFullError):
        bench.submit(request)
    with bench:
        assert all(one.wait().end.reason == "length" for one in waiting)


def test_a_request_that_takes_too_long_is_given_up(model):
    with Bench(model, max_batch=1) as bench:
        now = time.monotonic()
        running = GenerationRequest([4, 5], 10**6, deadline=now + 0.3)
        waiting = GenerationRequest([4, 5], 5, deadline=now + 0.1)
        done = bench.run(running, waiting, GenerationRequest([4, 5], 5))
    assert [getattr(one.end, "code", None) for one in done] == ["timeout", "timeout", None]


def test_the_end_of_the_server_fails_what_waits_and_finishes_what_runs(model):
    with Bench(model, max_batch=1) as bench:
        running, waiting = bench.submit(
            GenerationRequest([4, 5], 40), GenerationRequest([6, 7], 40)
        )
        running.first.wait(10)
        bench.engine.drain()
        assert running.wait().end.reason == "length"
        assert waiting.wait().end.code == "shutting_down"
        with pytest.raises(ShuttingDownError):
            bench.submit(GenerationRequest([4], 1))
        assert not bench.engine.is_alive


def test_what_still_runs_when_the_engine_closes_is_told(model):
    bench = Bench(model)
    with bench:
        running = bench.submit(GenerationRequest([4, 5], 10**6))[0]
        running.first.wait(10)
    assert running.wait().end.code == "shutting_down"


class Unreadable:
    """A table some of whose records can't be read."""

    def __init__(self, table, *ids: int) -> None:
        self._table, self._ids = table, ids

    def rows(self, ids, ready=False, base_model=None):
        rows = self._table.rows(ids, ready, base_model)
        return _Rows(rows, [one for one in self._ids if (ids == one).any()])


class _Rows:
    def __init__(self, rows, unreadable) -> None:
        self._rows, self._unreadable = rows, unreadable
        self.index, self.num_positions = rows.index, rows.num_positions

    def _check(self) -> None:
        if self._unreadable:
            raise TableError(f"shard: record {self._unreadable[0]} can't be read.")

    def layer(self, layer, experts=None):
        self._check()
        return self._rows.layer(layer, experts)

    def mix(self, layer, weights, experts=None):
        if layer == 1:  # some layers have been through already
            self._check()
        return self._rows.mix(layer, weights, experts)


@pytest.mark.parametrize("place", ["prompt", "step"])
def test_only_the_sequences_whose_records_fail_end(model, monkeypatch, place):
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    expected = [expected_of(model, prompt, 20) for prompt in prompts]
    if place == "prompt":
        bad = 9
    else:  # a token that only one of them generates, and feeds
        others = {*prompts[0], *prompts[1], *prompts[2], *expected[0], *expected[2]}
        bad = next(one for one in expected[1][:-1] if one not in others)
    context = model.lookup_entrance
    monkeypatch.setattr(context, "source", Unreadable(context.source, bad))
    with Bench(model) as bench:
        done = bench.run(*(GenerationRequest(prompt, 20) for prompt in prompts))
        for place_of_prompt in (0, 2):
            if bad not in [*prompts[place_of_prompt], *expected[place_of_prompt]]:
                assert done[place_of_prompt].ids == expected[place_of_prompt]
        assert isinstance(done[1].end, Failed)
        assert done[1].end.code == "table_error"
        assert f"record {bad}" in done[1].end.message
        assert b"mole_table_errors_total 1.0" in bench.metrics.exposition()
        assert isinstance(bench.run(GenerationRequest([3, 4], 2))[0].end, Failed | Finished)


class UnreadableLate:
    """As a GPU does: a record that can't be read becomes numbers that are none, and the next time
    that something is asked for tells why."""

    def __init__(self, table, bad: int) -> None:
        self._table, self._bad = table, bad
        self._error = None

    def rows(self, ids, ready=False, base_model=None):
        error, self._error = self._error, None
        if error is not None:
            raise error
        if (ids == self._bad).any():
            self._error = TableError(f"shard: record {self._bad} can't be read.")
        return _NoNumbers(self._table.rows(ids, ready, base_model), ids == self._bad)


class _NoNumbers:
    def __init__(self, rows, is_bad) -> None:
        self._rows, self._is_bad = rows, is_bad.view(-1, 1)
        self.index, self.num_positions = rows.index, rows.num_positions

    def mix(self, layer, weights, experts=None):
        mixed = self._rows.mix(layer, weights, experts)
        return mixed.masked_fill(self._is_bad, float("nan"))


@pytest.mark.parametrize("place", ["prompt", "step"])
def test_errors_that_are_told_late_end_their_own_sequences(model, monkeypatch, place):
    prompts = [[5, 6, 7], [8, 9, 10], [12, 13, 14]]
    expected = [expected_of(model, prompt, 20) for prompt in prompts]
    others = {*prompts[0], *prompts[2], *expected[0], *expected[2]}
    fed = [10] if place == "prompt" else expected[1][:-1]
    bad = next(one for one in fed if one not in others)
    context = model.lookup_entrance
    monkeypatch.setattr(context, "source", UnreadableLate(context.source, bad))
    with Bench(model) as bench:
        done = bench.run(*(GenerationRequest(prompt, 20) for prompt in prompts))
        assert [done[0].ids, done[2].ids] == [expected[0], expected[2]]
        assert done[1].end == Failed("table_error", f"shard: record {bad} can't be read.")
        assert b"mole_table_errors_total 1.0" in bench.metrics.exposition()
        assert bench.run(GenerationRequest(prompts[0], 20))[0].ids == expected[0]


def test_a_defect_fails_what_runs_and_the_engine_goes_on(model, monkeypatch, capsys):
    with Bench(model) as bench:
        with monkeypatch.context() as patched:
            patched.setattr(bench.engine._forward, "decode", lambda *inputs: 1 / 0)
            failed = bench.run(GenerationRequest([4, 5], 5))[0]
        assert failed.end == Failed("internal_error", "Internal error: ZeroDivisionError.")
        again = bench.run(GenerationRequest([4, 5], 5))[0]
    assert again.ids == expected_of(model, [4, 5], 5)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_numbers_that_are_none_fail_their_own_sequence_only():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    prompt = prompts_of(6)[0]
    prompt = [1 if one == 50 else one for one in prompt]
    expected = expected_of(model, prompt, 30)
    if 50 in expected:
        pytest.skip("the model itself says token 50")
    with Bench(model) as bench:
        good = bench.submit(GenerationRequest(prompt, 30))[0]
        good.first.wait(10)
        bad = bench.run(GenerationRequest([50, 3], 5))[0]
        assert bad.end.code == "internal_error"
        assert "no numbers" in bad.end.message
        assert good.wait().ids == expected
        assert bench.run(GenerationRequest(prompt, 30))[0].ids == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_that_is_no_number_is_enough(temperature):
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[60] = float("nan")
    with Bench(model) as bench:
        request = GenerationRequest([4, 5], 5, Chooser(temperature=temperature, seed=0))
        assert bench.run(request)[0].end.code == "internal_error"


def test_models_that_remember_otherwise_are_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(UserError, match="'mamba' can't be served"):
        Bench(AutoModelForCausalLM.from_config(config))
