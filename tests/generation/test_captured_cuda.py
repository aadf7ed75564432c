"""Steps captured by a real GPU: decoding, serving, and transformers' own static cache."""

import threading

import pytest
import torch
from served_sequences import Bench
from tiny_models import (
    attached_model,
    gateless_model,
    greedy,
    left_padded,
    logits_of,
    tiny_model,
    token_ids,
)

import lookup_experts as le
from lookup_experts.generation import fixed_cache
from lookup_experts.generation.captured import Decoding, DecodingSteps
from lookup_experts.generation.sampling import Sampling
from lookup_experts.generation.text import generate_ids
from lookup_experts.serving.forward import Forward
from lookup_experts.serving.kv_cache import BatchCache
from lookup_experts.serving.sampling import Chooser
from lookup_experts.serving.sequence import GenerationRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A folder in table form, nf4 and float32, of a tiny Llama."""
    source = tmp_path_factory.mktemp("training-form") / "model"
    attached_model("llama").save_pretrained(source)

    folders = {}
    for encoding in ("float32", "nf4"):
        folders[encoding] = source.parent / encoding
        le.reparameterize(source, folders[encoding], encoding=encoding)
    return folders


@pytest.fixture(scope="module", params=["float32", "nf4"])
def mole(request, folded):
    """Its table in RAM, the rest on the GPU, in float32."""
    model = le.load(folded[request.param], store="memory", device="cuda", dtype="float32")
    yield model
    model.expert_source.close()


def decoded(decoding: Decoding, number: int) -> torch.Tensor:
    return torch.stack(list(decoding.tokens(number)), dim=1)


def check_decoding(model, monkeypatch) -> None:
    """Batches one after the other, over growing buffers, against transformers' `generate`."""
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 16)
    decoding = Decoding(model, 64)
    for batch in (1, 3, 8, 3, 32):
        prompts = [token_ids(3 + row % 5, seed=row).tolist() for row in range(batch)]
        ids, mask = (each.cuda() for each in left_padded(prompts))
        decoding.begin(ids, mask)
        expected = greedy(model, ids, 30, attention_mask=mask)
        assert torch.equal(decoded(decoding, 30), expected.cpu())
        assert decoding._cache.captured, "nothing was captured"


@pytest.mark.parametrize("family", ["gateless_llama", "llama", "qwen3", "gpt2", "bloom"])
def test_dense_tokens_are_those_of_generate(family, monkeypatch):
    model = gateless_model() if family == "gateless_llama" else tiny_model(family)
    check_decoding(model.cuda(), monkeypatch)


def test_mole_tokens_are_those_of_generate(mole, monkeypatch):
    check_decoding(mole, monkeypatch)


def test_a_step_is_captured_once_and_then_replayed(mole):
    calls = []
    hook = mole.register_forward_hook(lambda *_: calls.append(1))
    decoding = Decoding(mole, 128)
    decoding.begin(token_ids(2, 12).cuda())
    decoding.step()
    before = len(calls)
    for _ in range(50):
        decoding.step()
    assert len(calls) == before
    hook.remove()


def test_a_text_is_decoded_by_captured_steps(mole):
    prompt = token_ids(1, 9)
    calls = []
    hook = mole.register_forward_hook(lambda *_: calls.append(1))
    generation = generate_ids(mole, prompt[0].tolist(), Sampling(60))
    hook.remove()
    assert len(calls) < 10
    assert generation.token_ids == greedy(mole, prompt.cuda(), 60)[0].tolist()


def test_sampled_texts_differ_and_are_repeatable(mole):
    prompt = token_ids(1, 9)[0].tolist()

    def drawn(seed):
        sampling = Sampling(40, temperature=3.0, top_k=60, top_p=0.99, seed=seed)
        return generate_ids(mole, prompt, sampling).token_ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 5  # each replay draws anew


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_a_pass_over_the_whole_text(mole, dtype):
    """By what was fed, not by what was chosen, so that rounding doesn't part the texts."""
    model = mole if dtype == torch.float32 else gateless_model().to("cuda", dtype)
    ids = token_ids(4, 40).cuda()
    decoding = Decoding(model, 64)
    decoding.begin(ids[:, :12])
    for place in range(12, 40):
        decoding.feed(ids[:, place])
        decoding.step()
    ((_, step),) = decoding._cache.captured.values()
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    expected = logits_of(model, ids)[:, -1]
    torch.testing.assert_close(step.logits, expected, rtol=tolerance, atol=tolerance)


def test_the_host_may_be_far_ahead(mole):
    ids = token_ids(2, 8).cuda()
    expected = greedy(mole, ids, 60).cpu()
    decoding = Decoding(mole, 128)
    decoding.begin(ids)
    list(decoding.tokens(5))  # captured now
    decoding.begin(ids)
    torch.cuda._sleep(200_000_000)  # about a tenth of a second
    assert torch.equal(decoded(decoding, 60), expected)


def test_others_may_use_the_gpu_while_a_step_is_captured():
    """Only the capturing thread is bound by the capture."""
    over, failed = threading.Event(), []

    def busy():
        try:
            while not over.is_set():
                torch.empty(2**20, device="cuda").fill_(1).sum().item()
                torch.empty(2**10, pin_memory=True)
        except Exception as error:
            failed.append(error)

    other = threading.Thread(target=busy)
    other.start()
    try:
        model = gateless_model().cuda()
        for batch in (1, 2, 4, 8):
            decoding = Decoding(model, 64)
            ids = token_ids(batch, 5).cuda()
            decoding.begin(ids)
            assert torch.equal(decoded(decoding, 20), greedy(model, ids, 20).cpu())
    finally:
        over.set()
        other.join()
    assert not failed


# ------------------------------------------------------------------------------------- serving


def served_alone(model, prompt: list[int], number: int) -> list[int]:
    return greedy(model, torch.tensor([prompt]).cuda(), number)[0].tolist()


@pytest.mark.parametrize("kind", ["dense", "mole"])
def test_what_is_served_is_what_each_gets_alone(kind, mole, monkeypatch):
    """Joins and leaves at any step; sampling, log probabilities and details beside."""
    monkeypatch.setattr(fixed_cache, "LEAST_COLUMNS", 16)
    model = mole if kind == "mole" else gateless_model().cuda()
    assert Forward(model).why_not_captured is None
    prompts = [token_ids(length, seed=length).tolist() for length in (5, 30, 2, 11, 64, 7, 3, 9)]
    taken = []
    take = DecodingSteps.take

    def note(self, cache, eagerly=False):
        taken.append(eagerly)
        return take(self, cache, eagerly)

    monkeypatch.setattr(DecodingSteps, "take", note)
    with Bench(model, max_batch=5) as bench:
        collected = []
        for prompt in prompts:
            collected += bench.submit(GenerationRequest(prompt, 24))
            collected[-1].first.wait(10) if len(collected) < 4 else None
        for one, prompt in zip(collected, prompts, strict=True):
            assert one.wait().ids == served_alone(model, prompt, 24)
        assert not any(taken)  # none was eager
        plain, asked, scored = bench.run(
            GenerationRequest(prompts[0], 9),
            GenerationRequest(prompts[0], 9, lookup_details=True),
            GenerationRequest(prompts[0], 9, top_log_probabilities=2),
        )
        assert any(taken) == (kind == "mole")  # while somebody looked at the router
        assert plain.ids == asked.ids == scored.ids == served_alone(model, prompts[0], 9)
        assert all(token.lookup is not None for token in asked.tokens)
        assert all(token.scored[0].score.value <= 0 for token in scored.tokens)
        chooser = {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 5}
        alone = bench.run(GenerationRequest(prompts[1], 20, Chooser(**chooser)))[0].ids
        crowd = [GenerationRequest(prompt, 20) for prompt in prompts[2:6]]
        again = bench.run(GenerationRequest(prompts[1], 20, Chooser(**chooser)), *crowd)[0].ids
        assert again == alone


def test_a_model_that_no_graph_can_hold_is_served_all_the_same(monkeypatch):
    """And what comes after it is captured as ever."""
    model = gateless_model().cuda()

    def look(module, given):
        given[0].nonzero()

    hook = model.lm_head.register_forward_pre_hook(look)
    reason = Forward(model).why_not_captured
    assert reason is not None and "Error" in reason
    prompt = token_ids(6).tolist()
    with Bench(model) as bench:
        assert bench.engine.why_not_captured == reason
        assert bench.run(GenerationRequest(prompt, 12))[0].ids == served_alone(model, prompt, 12)
    hook.remove()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert Forward(model).why_not_captured is None
    check_decoding(model, monkeypatch)


def test_without_graphs_all_is_as_with_them(mole):
    model, prompt = mole, token_ids(6).tolist()
    forward = Forward(model, captures=False)
    assert forward.why_not_captured is None and isinstance(forward.new_cache(), BatchCache)
    with Bench(model, captures=False) as bench:
        assert bench.run(GenerationRequest(prompt, 12))[0].ids == served_alone(model, prompt, 12)


def test_numbers_that_are_none_fail_their_own_sequence_only():
    model = gateless_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    model.cuda()
    prompt = [1 if one == 50 else one for one in token_ids(6).tolist()]
    expected = served_alone(model, prompt, 30)
    if 50 in expected:
        pytest.skip("the model itself says token 50")
    with Bench(model) as bench:
        good = bench.submit(GenerationRequest(prompt, 30))[0]
        bad = bench.run(GenerationRequest([50, 3], 5))[0]
        assert bad.end.code == "internal_error"
        assert good.wait().ids == expected
        assert bench.run(GenerationRequest(prompt, 30))[0].ids == expected


# ------------------------------------------------------------------------------------- generate


def test_generate_and_its_static_cache_stay_right(mole, folded):
    """Against the same model on the CPU."""
    name = "float32" if mole.expert_source.table.layout.encoding.name == "float32" else "nf4"
    on_cpu = le.load(folded[name], store="memory", dtype="float32")
    torch._dynamo.reset()
    for batch in (1, 3):
        ids = token_ids(batch, 12, seed=batch)
        expected = greedy(on_cpu, ids, 16)
        assert torch.equal(greedy(mole, ids.cuda(), 16).cpu(), expected)
        static = greedy(mole, ids.cuda(), 16, cache_implementation="static")
        assert torch.equal(static.cpu(), expected)
    torch._dynamo.reset()
    on_cpu.expert_source.close()
