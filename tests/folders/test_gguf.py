"""Backbones that come from a GGUF file."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits_of, randomize_experts, tiny_model, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.experts_alone import backbone_fingerprint

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

IDS = token_ids(2, 9)
TYPES = ["F32", "F16", "Q8_0"]


def write_gguf(path: Path, seed: int = 0, kind: str = "F32") -> Path:
    """A tiny Llama as llama.cpp's converter writes it; matrices in the given type."""
    model = tiny_model("llama", seed, intermediate_size=64)  # rows of whole blocks
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if "q_proj" in name:
            values = _permuted(values, config.num_attention_heads)
        if "k_proj" in name:
            values = _permuted(values, config.num_key_value_heads)
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            gguf.quants.quantize(values, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permuted(weight: Any, heads: int) -> Any:
    """llama.cpp's order of the rows of a head, for its rotary embedding."""
    width = len(weight) // heads // 2
    return weight.reshape(heads, 2, width, -1).swapaxes(1, 2).reshape(weight.shape).copy()


def load_gguf(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **options
    )


def attached(path: Path, **settings: Any) -> Any:
    model = le.attach(load_gguf(path), 2, **settings)
    randomize_experts(model)
    return model.eval()


def experts_alone(path: Path) -> Any:
    return attached(path, train_backbone=False, save="experts")


def reference_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["lookup_experts"]["backbone"]


def test_the_files_of_these_tests_are_what_transformers_reads(tmp_path):
    loaded = load_gguf(write_gguf(tmp_path / "model.gguf"))
    written = tiny_model("llama", intermediate_size=64)
    torch.testing.assert_close(logits_of(loaded, IDS), logits_of(written, IDS))


# ------------------------------------------------------------------------------------ saved in full


@pytest.mark.parametrize("kind", TYPES)
def test_it_is_attached_saved_loaded_and_folded_as_any_model(kind, tmp_path):
    model = attached(write_gguf(tmp_path / "model.gguf", kind=kind))
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "model.gguf").unlink()
    for load in (AutoModelForCausalLM.from_pretrained, le.load):
        assert torch.equal(logits_of(load(tmp_path / "saved"), IDS), expected)
    le.reparameterize(model, tmp_path / "of model", encoding="float32")
    le.reparameterize(tmp_path / "saved", tmp_path / "of folder", encoding="float32")
    for folder in ("of model", "of folder"):
        torch.testing.assert_close(logits_of(le.load(tmp_path / folder), IDS), expected)


def test_attaching_leaves_the_backbone_as_it_was(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="Q8_0")
    model = le.attach(load_gguf(path), 2)
    assert torch.equal(logits_of(model, IDS), logits_of(load_gguf(path), IDS))
    assert not model.is_quantized


@pytest.mark.parametrize("save", ["full", "experts"])
def test_the_trainer_trains_it(save, tmp_path):
    model = attached(
        write_gguf(tmp_path / "model.gguf"), train_backbone=save == "full", save=save
    ).train()
    before = logits_of(model, IDS)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 6)]
    Trainer(model, arguments, train_dataset=rows).train()
    loaded = le.load(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits_of(loaded, IDS), logits_of(model.eval(), IDS))
    assert not torch.equal(logits_of(loaded, IDS), before)


# ------------------------------------------------------------------------------------ experts alone


@pytest.mark.parametrize("kind", TYPES)
def test_experts_alone_name_the_file(kind, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind=kind)
    model = experts_alone(path)
    model.save_pretrained(tmp_path / "experts")
    assert reference_in(tmp_path / "experts") == {
        "name": str(tmp_path),
        "file": "model.gguf",
        "fingerprint": backbone_fingerprint(tmp_path, "model.gguf"),
    }
    for load in (AutoModelForCausalLM.from_pretrained, le.load):
        loaded = load(tmp_path / "experts")
        assert type(loaded) is type(model)
        assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(le.load(tmp_path / "again"), IDS), logits_of(model, IDS))
    le.reparameterize(tmp_path / "experts", tmp_path / "table", encoding="float32")
    path.unlink()  # the inference folder stands alone
    torch.testing.assert_close(logits_of(le.load(tmp_path / "table"), IDS), logits_of(model, IDS))


def test_they_are_inspected_with_their_backbone(tmp_path):
    from lookup_experts.generation.inspection import inspect_folder

    model = experts_alone(write_gguf(tmp_path / "model.gguf"))
    model.save_pretrained(tmp_path / "experts")
    counts = inspect_folder(tmp_path / "experts")["parameters"]
    assert counts["experts"] + counts["resident"] == sum(p.numel() for p in model.parameters())


def test_other_weights_in_the_same_folder_are_not_taken_for_it(tmp_path):
    model = experts_alone(write_gguf(tmp_path / "model.gguf"))
    model.save_pretrained(tmp_path / "experts")
    write_gguf(tmp_path / "a.gguf", seed=1)
    tiny_model("llama", 2, intermediate_size=64).save_pretrained(tmp_path)
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))
    again = experts_alone(tmp_path / "model.gguf")  # and so it is with them beside it
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(le.load(tmp_path / "again"), IDS), logits_of(model, IDS))


def test_another_file_under_its_name_is_refused(tmp_path):
    experts_alone(write_gguf(tmp_path / "model.gguf")).save_pretrained(tmp_path / "experts")
    write_gguf(tmp_path / "model.gguf", seed=1)
    with pytest.raises(UserError, match=r"another backbone than the one in .*model\.gguf: its"):
        le.load(tmp_path / "experts")
    (tmp_path / "model.gguf").write_bytes(b"no model at all")
    with pytest.raises(UserError, match=r"model\.gguf can't be read as GGUF"):
        le.load(tmp_path / "experts")
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(UserError, match=r"backbone in model\.gguf, which isn't in"):
        le.load(tmp_path / "experts")


def test_one_changed_tensor_is_noticed(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    before = backbone_fingerprint(tmp_path, path.name)
    reader = gguf.GGUFReader(path, "r+")
    norm = next(tensor for tensor in reader.tensors if tensor.name == "blk.2.ffn_norm.weight")
    norm.data[3] += 1e-3
    reader.data.flush()
    assert backbone_fingerprint(tmp_path, path.name) != before


def test_a_file_of_another_folder_and_of_the_working_directory(tmp_path, monkeypatch):
    """transformers takes a path as it is, and one that is there as seen from where it runs before
    the one in the model's folder."""
    write_gguf(tmp_path / "model.gguf")
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "model.gguf", seed=1)
    absolute = load_gguf(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path / "other")
    for given in (tmp_path / "other" / "model.gguf", "model.gguf"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=str(given))
        assert not torch.equal(logits_of(model, IDS), logits_of(absolute, IDS))
        le.attach(model, 2, train_backbone=False, save="experts")
        model.save_pretrained(tmp_path / "experts")
        assert reference_in(tmp_path / "experts")["name"] == str(tmp_path / "other")
        os.chdir(tmp_path)
        assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))
        os.chdir(tmp_path / "other")


def test_a_folder_that_has_moved_is_named_again(tmp_path):
    (tmp_path / "backbone" / "parts").mkdir(parents=True)
    write_gguf(tmp_path / "backbone" / "parts" / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "backbone", gguf_file="parts/model.gguf", dtype=torch.float32
    )
    le.attach(model, 2, train_backbone=False, save="experts")
    model.save_pretrained(tmp_path / "experts")
    shutil.move(tmp_path / "backbone", tmp_path / "moved")
    with pytest.raises(UserError, match=r"no folder here.*config\.json"):
        le.load(tmp_path / "experts")
    config = json.loads((tmp_path / "experts" / "config.json").read_text())
    config["lookup_experts"]["backbone"]["name"] = "../moved"
    (tmp_path / "experts" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))


def test_a_model_that_no_longer_knows_its_file_is_not_taken_for_another(tmp_path):
    """Who has made transformers forget the file can't refer to it, least of all by what lies
    beside it."""
    model = load_gguf(write_gguf(tmp_path / "model.gguf"))
    model.hf_quantizer.remove_quantization_config(model)
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        le.attach(model, 2, train_backbone=False, save="experts")
    tiny_model("llama", 1, intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of the model in memory isn't that in"):
        le.attach(model, 2, train_backbone=False, save="experts")
    le.attach(model, 2)


def test_weights_that_stay_packed_are_quantised_ones(tmp_path):
    """Where transformers has kernels for it, it computes with the file's own blocks."""
    packed = pytest.importorskip("transformers.integrations.gguf.utils")
    model = load_gguf(write_gguf(tmp_path / "model.gguf", kind="Q8_0"))
    blocks = gguf.GGMLQuantizationType.Q8_0.value
    model.model.layers[0].mlp.up_proj = packed.GgufLinear(32, 64, blocks)
    with pytest.raises(UserError, match="is quantised: its experts are saved without it"):
        le.attach(model, 2)
    le.attach(model, 2, train_backbone=False, save="experts")
    model.save_pretrained(tmp_path / "experts")
    assert reference_in(tmp_path / "experts")["file"] == "model.gguf"
    with pytest.raises(UserError, match="is quantised: its experts are saved without it"):
        model.save_pretrained(tmp_path / "full", save="full")
