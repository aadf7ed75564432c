"""Experts that are saved alone, and the backbone they find again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import attached_model, logits_of, randomize_experts, tiny_model, token_ids
from transformers import AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.experts_alone import backbone_fingerprint
from lookup_experts.model.settings import parse_layers

IDS = token_ids(2, 9)


def saved_backbone(folder: Path, family: str = "llama", **config: Any) -> Path:
    tiny_model(family, **config).save_pretrained(folder)
    return folder


def on_backbone(folder: Path, **settings: Any) -> Any:
    """A model whose experts say something, to be saved without its backbone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    le.attach(model, 2, **{"train_backbone": False, "save": "experts", **settings})
    randomize_experts(model)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A folder with experts alone, and the logits of the model."""
    model = on_backbone(saved_backbone(tmp_path / "backbone"), layers="0,2")
    model.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts", logits_of(model, IDS)


# --- saved and loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_experts_find_their_backbone(family, tmp_path):
    model = on_backbone(saved_backbone(tmp_path / "backbone", family))
    model.save_pretrained(tmp_path / "experts")
    weights = load_file(tmp_path / "experts" / "model.safetensors")
    assert weights and all(".lookup_experts." in name for name in weights)
    for load in (AutoModelForCausalLM.from_pretrained, le.load, type(model).from_pretrained):
        loaded = load(tmp_path / "experts")
        assert type(loaded) is type(model)
        assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))


def test_they_fold_with_their_backbone(saved, tmp_path):
    folder, expected = saved
    le.reparameterize(folder, tmp_path / "table", encoding="float32")
    shutil.rmtree(tmp_path / "backbone")  # the inference folder stands alone
    torch.testing.assert_close(logits_of(le.load(tmp_path / "table"), IDS), expected)


def test_they_come_in_the_dtype_that_was_asked_for(saved):
    folder, _ = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.use_cache is False


def test_a_loaded_model_trains_and_saves_its_experts_again(saved, tmp_path):
    folder, _ = saved
    model = le.load(folder)
    assert all(
        parameter.requires_grad == (".lookup_experts." in name)
        for name, parameter in model.named_parameters()
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    randomize_experts(model, seed=5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(le.load(tmp_path / "again"), IDS), logits_of(model, IDS))


def test_a_backbone_in_the_authors_format(official_oracles, tmp_path):
    from lookup_experts.folders.experts_alone import save_experts

    model = le.load(official_oracles / "dense")
    model.name_or_path = str(official_oracles / "dense")
    le.attach(model, 2, train_backbone=False, save="experts")
    randomize_experts(model)
    save_experts(model, tmp_path)
    ids = token_ids(2, 9, vocab_size=model.config.vocab_size)
    assert torch.equal(logits_of(le.load(tmp_path), ids), logits_of(model, ids))


def test_without_the_package_it_fails(saved, run_python):
    folder, _ = saved
    code, _, errors = run_python(
        "import sys; from transformers import AutoModelForCausalLM;"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])",
        folder,
    )
    assert code != 0
    assert "lookup_experts" in errors


def test_inspecting_them_counts_their_backbone(saved, tmp_path):
    from lookup_experts.commands.inspect import format_description
    from lookup_experts.generation.inspection import inspect_folder

    folder, _ = saved
    described = inspect_folder(folder)
    model = le.load(folder)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".routed." in n)
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = described["parameters"]
    assert (counts["experts"], counts["resident"]) == (routed, total - routed)
    per_token = 2 * 2 * model.config.hidden_size  # 2 experts in 2 layers
    assert counts["loaded_per_token"] == per_token
    assert counts["offloaded"] == per_token * model.config.vocab_size
    assert f"  on              {tmp_path / 'backbone'}\n" in format_description(described)


# --- another backbone, or none ------------------------------------------------------------------


def change_one_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_backbone_that_was_changed_is_refused(saved, tmp_path):
    folder, _ = saved
    change_one_weight(tmp_path / "backbone", "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(UserError, match="another fingerprint"):
        le.load(folder)


def test_a_backbone_that_has_moved_can_be_named_again(saved, tmp_path):
    folder, expected = saved
    (tmp_path / "backbone").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no folder here.*config\.json"):
        le.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["lookup_experts"]["backbone"]["name"] = "../moved"  # as seen from the experts
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(le.load(folder), IDS), expected)


def test_experts_that_are_incomplete_are_refused(saved):
    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.2.mlp.lookup_experts.router.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing tensors.*layers\.2\.mlp.*router"):
        le.load(folder)


def test_a_reference_that_makes_no_sense_is_refused(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    config["lookup_experts"]["backbone"] = {"name": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="should have a name and a fingerprint"):
        le.load(folder)


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    whole = saved_backbone(tmp_path / "whole")
    tiny_model("llama").save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert backbone_fingerprint(whole) == backbone_fingerprint(tmp_path / "cut")
    other = saved_backbone(tmp_path / "other", seed=1)
    assert backbone_fingerprint(whole) != backbone_fingerprint(other)


def test_the_fingerprint_of_a_large_tensor_reads_its_ends_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr("lookup_experts.folders.experts_alone.SAMPLES", 3)
    monkeypatch.setattr("lookup_experts.folders.experts_alone.SAMPLE_BYTES", 8)
    values = torch.arange(100, dtype=torch.float32)
    found = set()
    for place in (None, 0, 49, 99):  # unchanged, and changed in one place that is read
        changed = values.clone()
        if place is not None:
            changed[place] += 1
        save_file({"weight": changed}, tmp_path / "model.safetensors")
        found.add(backbone_fingerprint(tmp_path))
    assert len(found) == 4


# --- what `attach` refuses ----------------------------------------------------------------------


def test_saving_experts_alone_needs_a_frozen_backbone(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_backbone(tmp_path))
    with pytest.raises(UserError, match="must not be trained: add train_backbone=False"):
        le.attach(model, save="experts")
    assert not hasattr(model.model.layers[0].mlp, "lookup_experts")


def test_saving_experts_alone_needs_a_backbone_from_somewhere():
    with pytest.raises(UserError, match="loaded from a folder or the hub"):
        le.attach(tiny_model(), train_backbone=False, save="experts")


def test_a_backbone_that_was_thawed_is_not_forgotten(tmp_path):
    model = on_backbone(saved_backbone(tmp_path / "backbone"))
    model.lm_head.requires_grad_(True)
    with pytest.raises(UserError, match=r"lm_head\.weight of the backbone is being trained"):
        model.save_pretrained(tmp_path / "experts")
    assert not (tmp_path / "experts").exists()


def test_a_frozen_backbone_is_saved_in_full_by_default(tmp_path):
    model = attached_model(train_backbone=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(le.load(tmp_path), IDS), logits_of(model, IDS))
    assert "backbone" not in json.loads((tmp_path / "config.json").read_text())["lookup_experts"]


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("0-3", (0, 1, 2, 3)),
        ("0,2,4", (0, 2, 4)),
        ("0-1, 6", (0, 1, 6)),
        ("every:3", (0, 3, 6)),
        ("7", (7,)),
    ],
)
def test_layers_in_words(words, chosen):
    assert parse_layers(words, 8) == chosen


@pytest.mark.parametrize("words", ["", "a", "1-", "every:0", "every:x", "2-a", "-3"])
def test_layers_that_make_no_sense(words):
    with pytest.raises(UserError, match="should be like 0-7, 0,2,4 or every:2"):
        parse_layers(words, 8)


def test_layers_that_are_not_there():
    with pytest.raises(UserError, match="blocks are 0 to 2"):
        le.attach(tiny_model(), layers="1-3")
