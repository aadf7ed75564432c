"""Model folders: the authors' checkpoints load as what they are, and nothing loads as another."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import greedy, logits_of, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import read_config, tensor_names, weight_files
from lookup_experts.folders.official import official_kind
from lookup_experts.model.expert_products import normalize
from lookup_experts.model.moe import MoeGatelessLlamaForCausalLM
from lookup_experts.model.wiring import routed_experts

CONFIG = {
    "architectures": ["MoleForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {"dense": "DenseForCausalLM", "mole": "MoleForCausalLM", "moe": "MoeForCausalLM"}


def official_weights(kind: str) -> dict[str, Tensor]:
    """Random weights under the authors' names."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.4

    hidden, width = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    weights = {"model.embed_tokens.weight": drawn(64, hidden), "lm_head.weight": drawn(64, hidden)}
    weights["model.norm.weight"] = 1 + drawn(hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{block}.self_attn.{name}.weight"] = drawn(hidden, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{block}.{name}.weight"] = 1 + drawn(hidden)
        ffns = [] if kind == "moe" else [f"{block}.mlp"]
        if kind != "dense":
            ffns += [f"{block}.experts.{expert}" for expert in range(CONFIG["num_experts"])]
            weights[f"{block}.router.weight"] = drawn(CONFIG["num_experts"], hidden)
        if kind == "mole":
            weights[f"{block}.expert_layernorm.weight"] = 1 + drawn(hidden)
        for ffn in ffns:
            weights[f"{ffn}.up_proj.weight"] = drawn(width, hidden)
            weights[f"{ffn}.down_proj.weight"] = drawn(hidden, width)
    return weights


def official_folder(folder: Path, kind: str = "mole", **config) -> Path:
    """A tiny random checkpoint in the authors' format."""
    folder.mkdir()
    content = {**CONFIG, "architectures": [ARCHITECTURES[kind]], **config}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(official_weights(kind), folder / "model.safetensors")
    return folder


def rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5) * weight


def official_logits(weights: dict[str, Tensor], ids: Tensor, selected: int = 2) -> Tensor:
    """The published models in a few lines, from their weights: [B, T, V].

    Args:
        weights: under the authors' names.
        ids: [B, T].
        selected: experts per token of a mixture of experts.
    """

    def linear(inputs: Tensor, name: str) -> Tensor:
        return F.linear(inputs, weights[f"{name}.weight"])

    def ffn(inputs: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(inputs, f"{name}.up_proj")), f"{name}.down_proj")

    embedding = weights["model.embed_tokens.weight"][ids]
    hidden = embedding
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        hidden = hidden + _attention(
            rms_norm(hidden, weights[f"{block}.input_layernorm.weight"]),
            f"{block}.self_attn",
            linear,
        )
        inputs = rms_norm(hidden, weights[f"{block}.post_attention_layernorm.weight"])
        if f"{block}.mlp.up_proj.weight" in weights:
            hidden = hidden + ffn(inputs, f"{block}.mlp")
        else:
            logits = linear(inputs, f"{block}.router")
            lowest = logits.sort(-1, descending=True).values[..., selected - 1, None]
            shares = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
            for expert in range(CONFIG["num_experts"]):
                said = ffn(inputs, f"{block}.experts.{expert}")
                hidden = hidden + shares[..., expert, None] * said
        if f"{block}.expert_layernorm.weight" in weights:
            shares = linear(inputs, f"{block}.router").softmax(-1)
            normed = rms_norm(embedding, weights[f"{block}.expert_layernorm.weight"])
            for expert in range(CONFIG["num_experts"]):
                hidden = hidden + shares[..., expert, None] * ffn(
                    normed, f"{block}.experts.{expert}"
                )
    return linear(rms_norm(hidden, weights["model.norm.weight"]), "lm_head")


def _attention(inputs: Tensor, name: str, linear) -> Tensor:
    batch, tokens, hidden = inputs.shape
    size = hidden // CONFIG["num_attention_heads"]
    angles = torch.outer(
        torch.arange(tokens).float(), 10000.0 ** -(torch.arange(0, size, 2).float() / size)
    ).repeat(1, 2)

    def heads(projection: str) -> Tensor:
        return linear(inputs, f"{name}.{projection}").view(batch, tokens, -1, size).transpose(1, 2)

    def rotated(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    mixed = F.scaled_dot_product_attention(
        rotated(heads("q_proj")), rotated(heads("k_proj")), heads("v_proj"), is_causal=True
    )
    return linear(mixed.transpose(1, 2).reshape(batch, tokens, hidden), f"{name}.o_proj")


@pytest.mark.parametrize("kind", ["dense", "mole", "moe"])
def test_the_authors_format_gives_the_logits_of_the_paper(kind, tmp_path):
    folder = official_folder(tmp_path / kind, kind)
    ids = token_ids(2, 12, vocab_size=64)
    expected = official_logits(official_weights(kind), ids)
    torch.testing.assert_close(logits_of(le.load(folder), ids), expected, rtol=1e-4, atol=1e-4)


def test_the_published_oracle_of_the_dense_model(official_oracles):
    _assert_oracle(official_oracles / "dense")


def test_the_published_oracle_of_mole(official_oracles):
    folder = official_oracles / "mole-4e"
    model = _assert_oracle(folder)
    expected = load_file(folder / "expected.safetensors")["table"]
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        layers = routed_experts(model)
        normalized = normalize(embedding, layers[0].norm_eps)
        table = torch.stack([experts(normalized).transpose(0, 1) for experts in layers], dim=1)
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-5)
    _assert_greedy(model, folder)


def _assert_greedy(model, folder: Path) -> None:
    oracle = load_file(folder / "greedy.safetensors")
    prompt, tokens = oracle["prompt"], oracle["tokens"]  # the prompt and what follows it
    new = tokens.shape[1] - prompt.shape[1]
    assert torch.equal(torch.cat([prompt, greedy(model, prompt, new)], dim=1), tokens)


def _assert_oracle(folder: Path, **options):
    model = le.load(folder, **options)
    expected = load_file(folder / "expected.safetensors")
    logits = logits_of(model, expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    return model


def test_the_published_table_is_what_folding_writes(official_oracles, tmp_path):
    folder = official_oracles / "mole-4e"
    le.reparameterize(folder, tmp_path / "out", encoding="float32")
    expected = load_file(folder / "expected.safetensors")
    for store in ("memory", "direct"):
        model = le.load(tmp_path / "out", store=store)
        logits = logits_of(model, expected["input_ids"])
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
        rows = model.expert_source.rows(torch.arange(320)[None])
        table = torch.stack([rows.layer(layer)[rows.index[0]] for layer in range(2)], dim=1)
        torch.testing.assert_close(table, expected["table"], rtol=1e-5, atol=1e-5)
        _assert_greedy(model, folder)


def test_the_published_oracle_of_the_mixture_of_experts(official_oracles):
    """The published code selects ten of ten, whatever the paper says."""
    model = _assert_oracle(official_oracles / "moe-10e-top10", num_experts_per_tok=10)
    assert isinstance(model, MoeGatelessLlamaForCausalLM)


@pytest.mark.parametrize("selected", [1, 2, 3])
def test_how_many_experts_are_selected_is_an_option(selected, tmp_path):
    folder = official_folder(tmp_path / "moe", "moe")
    ids = token_ids(2, 12, vocab_size=64)
    expected = official_logits(official_weights("moe"), ids, selected)
    model = le.load(folder, num_experts_per_tok=selected)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_more_experts_per_token_than_there_are(tmp_path):
    folder = official_folder(tmp_path / "moe", "moe")
    for selected in (0, 4):
        with pytest.raises(UserError, match=f"num_experts_per_tok is {selected}; expected 1 to 3"):
            le.load(folder, num_experts_per_tok=selected)
    le.load(folder).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="expected 1 to 3"):
        le.load(tmp_path / "ours", num_experts_per_tok=4)
    with pytest.raises(UserError, match="is for the paper's mixture of experts"):
        le.load(official_folder(tmp_path / "dense", "dense"), num_experts_per_tok=2)


def test_a_checkpoint_in_several_files_loads(tmp_path):
    folder = official_folder(tmp_path / "mole")
    whole = le.load(folder)
    weights = official_weights("mole")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ids = token_ids(1, 5, vocab_size=64)
    assert torch.equal(logits_of(le.load(folder), ids), logits_of(whole, ids))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"incomplete: model-1\.safetensors"):
        le.load(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_can_be_chosen(tmp_path, dtype):
    model = le.load(official_folder(tmp_path / "mole"), dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def test_an_official_model_saves_in_our_format(tmp_path):
    model = le.load(official_folder(tmp_path / "official"))
    model.save_pretrained(tmp_path / "ours")
    ids = token_ids(1, 7, vocab_size=64)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert model.lookup_settings.norm_eps == 1e-5


@pytest.mark.parametrize("kind", ["dense", "mole", "moe"])
def test_weights_decide_whatever_the_architecture_says(kind, tmp_path):
    """A folder that calls itself a plain Llama and isn't never loads as one."""
    folder = official_folder(tmp_path / kind, kind, architectures=["LlamaForCausalLM"])
    assert official_kind(folder, read_config(folder)) == kind
    ids = token_ids(1, 5, vocab_size=64)
    expected = official_logits(official_weights(kind), ids)
    torch.testing.assert_close(logits_of(le.load(folder), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "mole", "moe"])
@pytest.mark.parametrize("stated", ["dense", "mole", "moe"])
def test_an_architecture_that_the_weights_contradict_is_refused(kind, stated, tmp_path):
    folder = official_folder(tmp_path / "model", kind, architectures=[ARCHITECTURES[stated]])
    if kind == stated:
        assert official_kind(folder, read_config(folder)) == kind
        return
    with pytest.raises(UserError, match=rf"{ARCHITECTURES[stated]}.*those of a {kind} model"):
        le.load(folder)


def test_a_plain_llama_that_calls_itself_mole_is_refused(tmp_path):
    from tiny_models import tiny_model

    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert official_kind(tmp_path, read_config(tmp_path)) is None
    path.write_text(path.read_text().replace("LlamaForCausalLM", "MoleForCausalLM"))
    with pytest.raises(UserError, match="those of a plain Llama model"):
        le.load(tmp_path)
    path.write_text(path.read_text().replace("MoleForCausalLM", "LlamaForCausalLM"))
    assert isinstance(le.load(tmp_path), LlamaForCausalLM)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.experts.1.up_proj.weight"])
def test_weights_that_are_missing_are_named(name, tmp_path):
    folder = official_folder(tmp_path / "mole")
    weights = official_weights("mole")
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"don't fit|missing"):
        le.load(folder)


def test_weights_of_another_size_are_refused(tmp_path):
    with pytest.raises(UserError, match="don't fit the model"):
        le.load(official_folder(tmp_path / "mole", intermediate_size=32))


def test_more_experts_than_the_configuration_says_are_refused(tmp_path):
    with pytest.raises(UserError, match="don't fit the model"):
        le.load(official_folder(tmp_path / "mole", num_experts=2))


@pytest.mark.parametrize("key", ["num_experts", "intermediate_size", "num_hidden_layers"])
def test_a_configuration_without_a_size_is_refused(key, tmp_path):
    folder = official_folder(tmp_path / "mole")
    config = read_config(folder)
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=key):
        le.load(folder)


def test_folders_that_are_no_models_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="No such folder"):
        le.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        le.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        le.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        le.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        le.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        le.load(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        le.load(tmp_path / "config.json")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = official_folder(tmp_path / "mole") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="can't be read as safetensors"):
        le.load(tmp_path / "mole")


def test_names_and_files_of_a_folder(tmp_path):
    folder = official_folder(tmp_path / "dense", "dense")
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert tensor_names(folder) == set(official_weights("dense"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b""])
def test_a_configuration_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON"):
        read_config(tmp_path)


def test_a_broken_index_is_refused(tmp_path):
    folder = official_folder(tmp_path / "mole")
    (folder / "model.safetensors").unlink()
    for content in ("{", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
            le.load(folder)
