"""Every backbone that is said to be supported, in some form: the tokens of `generate`."""

import pytest
from tiny_models import gateless_model, randomize_experts, tiny_model

import lookup_experts as le

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from vllm_here import engine, mixed_prompts, our_greedy, vllm_greedy

from lookup_experts.vllm_plugin.checks import BACKBONES

pytestmark = pytest.mark.timeout(300)

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
"""vLLM's attention on a processor wants heads of 32 numbers at least."""
HEADS = {"head_dim": 32}
FAMILIES = {
    "GPTNeoXForCausalLM": ("gpt_neox", {}),
    "GatelessLlamaForCausalLM": ("gateless_llama", {}),
    # Its head is its embedding, whose numbers are multiplied by 8: it would always repeat an id.
    "Gemma2ForCausalLM": ("gemma2", HEADS | {"initializer_range": 0.05}),
    "Gemma3ForCausalLM": ("gemma3_text", HEADS | {"initializer_range": 0.05}),
    "LlamaForCausalLM": ("llama", {"num_key_value_heads": 1}),
    "MistralForCausalLM": ("mistral", {"sliding_window": 16}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo3", {"sliding_window": 16}),
    "Phi3ForCausalLM": ("phi3", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", HEADS),
}
FORMS = [
    {"num_experts": 3},
    {"num_experts": 3, "row_size": 24, "layers": (0, 2)},
    {"form": "meki", "row_size": 16},
]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_with_experts(backbone, tmp_path):
    family, more = FAMILIES[backbone]
    number = BACKBONES.index(backbone)
    sizes = SIZES | more
    model = gateless_model(**sizes) if family == "gateless_llama" else tiny_model(family, **sizes)
    le.attach(model, expert_size=16, init="normal", **FORMS[number % len(FORMS)])
    randomize_experts(model, 0.3)
    assert type(model).__name__.endswith(backbone)
    folder = tmp_path / "training"
    model.save_pretrained(folder)
    reader = {}
    if number % 4:
        le.reparameterize(folder, tmp_path / "table", encoding="float32")
        folder, reader = tmp_path / "table", {"store": "direct", "cache": "20KB"}
    prompts = mixed_prompts(12)
    # First, since vLLM changes the classes of transformers that it uses.
    expected = our_greedy(folder, prompts)
    with engine(folder, additional_config={"lookup_experts": reader}) as llm:
        found = vllm_greedy(llm, prompts)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, theirs), (_, ours) in zip(found, expected, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-3)
