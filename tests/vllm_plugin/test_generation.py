"""What vLLM does with a batch is done with experts too: cached prefixes, preemption, samples, log
probabilities, structure; and on two ranks."""

import json
import random

import jsonschema
import pytest
import torch
from tiny_tokenizers import writing_tokenizer
from transformers import AutoTokenizer

import lookup_experts as le

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm_here import (
    engine,
    logprobs_of,
    mixed_prompts,
    model_with_experts,
    our_greedy,
    told,
    vllm_greedy,
)

pytestmark = pytest.mark.timeout(300)

VOCAB = 320
CONTEXT = 256
FROM_DISK = {"lookup_experts": {"store": "direct", "cache": "100KB"}}
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    model_with_experts(**sizes).save_pretrained(root / "trained")
    writing_tokenizer().save_pretrained(root / "trained")
    le.reparameterize(root / "trained", root / "folded", encoding="float32")
    return root / "folded"


@pytest.fixture(scope="module")
def model(folder):
    return le.load(folder)


@pytest.fixture(scope="module")
def llm(folder):
    with engine(
        folder,
        skip_tokenizer_init=False,
        max_model_len=CONTEXT,
        additional_config=FROM_DISK,
    ) as found:
        yield found


def as_prompts(*prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def random_ids(number, seed):
    chosen = random.Random(seed)
    return [chosen.randrange(5, 300) for _ in range(number)]


def count(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_a_cached_prefix_changes_nothing(llm, folder):
    beginning = random_ids(150, seed=1)
    prompts = [beginning + random_ids(number, seed=number) for number in (5, 20, 33)]
    expected = [ids for ids, _ in our_greedy(folder, prompts)]
    assert [ids for ids, _ in vllm_greedy(llm, prompts)] == expected
    before = count(llm, "vllm:prefix_cache_hits")
    assert [ids for ids, _ in vllm_greedy(llm, prompts)] == expected
    assert count(llm, "vllm:prefix_cache_hits") - before >= 3 * 128


def test_several_samples_are_drawn_from_the_model_s_probabilities(llm, model):
    prompt = random_ids(40, seed=2)
    drawn = SamplingParams(n=4, temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=0)
    (answer,) = llm.generate(as_prompts(prompt), drawn, use_tqdm=False)
    found = [told(output) for output in answer.outputs]
    assert len({tuple(ids) for ids, _ in found}) == 4
    for ids, logprobs in found:
        assert len(ids) == 20
        assert logprobs == pytest.approx(logprobs_of(model, prompt, ids), abs=1e-3)


def test_log_probabilities_of_a_prompt_and_of_the_likeliest(llm, model):
    prompt = random_ids(100, seed=3)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=5)
    (answer,) = llm.generate(as_prompts(prompt), asked, use_tqdm=False)
    of_prompt = [
        at[token].logprob for at, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    assert of_prompt == pytest.approx(logprobs_of(model, prompt[:1], prompt[1:]), abs=1e-3)
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    best = logprobs.topk(5)
    found = answer.outputs[0].logprobs[0]
    assert [found[token].logprob for token in best.indices.tolist()] == pytest.approx(
        best.values.tolist(), abs=1e-3
    )


def test_structure_is_kept(llm):
    asked = SamplingParams(
        temperature=0,
        max_tokens=100,
        structured_outputs=StructuredOutputsParams(json=SCHEMA),
    )
    (answer,) = llm.generate(as_prompts(random_ids(30, seed=4)), asked, use_tqdm=False)
    jsonschema.validate(json.loads(answer.outputs[0].text), SCHEMA)


def test_within_a_structure_the_model_chooses(llm, model, folder):
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(letters)
    structure = StructuredOutputsParams(choice=letters)
    asked = SamplingParams(temperature=0, max_tokens=5, structured_outputs=structure)
    prompts = [random_ids(10, seed=seed) for seed in range(8)]
    with torch.inference_mode():
        best = [
            ids[model(torch.tensor([prompt])).logits[0, -1, ids].argmax()] for prompt in prompts
        ]
    answers = llm.generate(as_prompts(*prompts), asked, use_tqdm=False)
    found = [answer.outputs[0].token_ids[0] for answer in answers]
    assert found == best and len(set(found)) > 1


def test_preempted_texts_go_on_as_if_nothing_had_been(folder):
    """Memory for fewer positions than eight texts come to have."""
    prompts = [random_ids(number, seed=number) for number in range(100, 108)]
    with engine(
        folder,
        max_model_len=CONTEXT,
        block_size=32,
        num_gpu_blocks_override=28,
        enable_prefix_caching=False,
        additional_config=FROM_DISK,
    ) as small:
        found = vllm_greedy(small, prompts, new_tokens=40)
        assert count(small, "vllm:num_preemptions") > 0
    assert [ids for ids, _ in found] == [ids for ids, _ in our_greedy(folder, prompts, 40)]


@pytest.mark.parametrize("cut", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_say_the_same(folder, cut):
    prompts = mixed_prompts(16, vocab_size=300)
    ways = {cut: 2, "enforce_eager": False, "additional_config": FROM_DISK}
    with engine(folder, **ways) as ranks:
        found = vllm_greedy(ranks, prompts)
    for (ids, logprobs), (ours, our_logprobs) in zip(
        found, our_greedy(folder, prompts), strict=True
    ):
        assert ids == ours
        assert logprobs == pytest.approx(our_logprobs, abs=1e-3)
