"""A model never runs with experts whose weights it hasn't got."""

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import randomize_experts, tiny_model, token_ids

import lookup_experts as le

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from transformers import AutoModelForCausalLM
from vllm_here import engine, our_greedy, vllm_greedy

pytestmark = pytest.mark.timeout(300)
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}
"""As vLLM's attention wants it on a processor, of 32 numbers."""
ROUTER = "model.layers.1.mlp.lookup_experts.router.weight"


def attached(model, **settings):
    le.attach(model, num_experts=4, expert_size=16, **settings)
    randomize_experts(model)
    return model


@pytest.fixture
def folder(tmp_path):
    attached(tiny_model("llama", **ONE_HEAD)).save_pretrained(tmp_path / "training")
    le.reparameterize(tmp_path / "training", tmp_path / "table")
    return tmp_path / "table"


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda weights: weights.pop(ROUTER), r"1 missing tensors, the first is 1\.router\.weight"),
        (
            lambda weights: weights.update({ROUTER: weights[ROUTER][:2].clone()}),
            "1 mismatched tensors",
        ),
        (
            lambda weights: weights.update({ROUTER.replace("router", "gate"): weights[ROUTER] + 0}),
            "1 unexpected tensors",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, edit, said):
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=said), engine(folder):
        pass


def test_weights_made_up_by_vllm_are_refused(folder):
    with (
        pytest.raises(ValueError, match="never got their weights"),
        engine(folder, load_format="dummy") as llm,
    ):
        vllm_greedy(llm, [[1, 2, 3]], 1)


def test_experts_alone_find_their_backbone(tmp_path):
    tiny_model("llama", **ONE_HEAD).save_pretrained(tmp_path / "backbone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    attached(model, train_backbone=False, save="experts").save_pretrained(tmp_path / "experts")
    le.reparameterize(tmp_path / "experts", tmp_path / "table", encoding="float32")
    prompts = [token_ids(9).tolist()]
    for folder in (tmp_path / "experts", tmp_path / "table"):
        with engine(folder) as llm:
            found = vllm_greedy(llm, prompts)
        assert [ids for ids, _ in found] == [ids for ids, _ in our_greedy(folder, prompts)]
