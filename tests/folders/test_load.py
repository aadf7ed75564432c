"""Loading a folder: every form of it, and a plain word where it can't be."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, attached_model, logits_of, tiny_model, token_ids
from transformers import AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.folders.model_folder import local_folder
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.table import uring

IDS = token_ids(2, 7)


@pytest.fixture
def own_folder(table_folder, tmp_path):
    """A copy of the inference folder, to spoil."""
    return shutil.copytree(table_folder, tmp_path / "own")


def test_every_form_is_ready_to_generate(training_folder, table_folder, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    for folder in (training_folder, str(table_folder), tmp_path):
        model = le.load(folder)
        assert not model.training
        assert logits_of(model, IDS).shape == (2, 7, VOCAB)


def test_the_chosen_store_is_told(table_folder):
    said = []
    model = le.load(table_folder, notify=said.append)
    assert model.expert_source.stats().store == "memory"
    assert len(said) == 1 and said[0].startswith("Store: memory, because")


@pytest.mark.parametrize("load", [le.load, AutoModelForCausalLM.from_pretrained])
def test_what_was_chosen_is_told_where_nobody_asked(table_folder, caplog, monkeypatch, load):
    load(table_folder)
    (chosen,) = caplog.messages
    assert chosen.startswith("Store: memory, because the table (")
    caplog.clear()
    refuse_ring(monkeypatch)
    load(table_folder, store="direct")
    assert caplog.messages == [
        f"No io_uring here ({os.strerror(errno.EPERM)}): reading with 8 threads."
    ]
    assert {(record.name, record.levelname) for record in caplog.records} == {
        ("lookup_experts", "WARNING")
    }


def refuse_ring(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(uring, "_syscall", refuse)


def test_python_prints_it(table_folder, run_python):
    code, out, err = run_python(
        "import sys, lookup_experts as le; le.load(sys.argv[1], store='auto:0')", table_folder
    )
    assert (code, out) == (0, ""), err
    assert "Store: direct, because the table (" in err


def test_who_wants_silence_has_it(table_folder, caplog, monkeypatch):
    refuse_ring(monkeypatch)
    model = le.load(table_folder, store="auto:0", notify=lambda message: None)
    assert model.expert_source.stats().backend == "preadv x8 threads"
    assert caplog.messages == []


def test_the_dtype_can_be_chosen(training_folder, table_folder):
    expected = logits_of(le.load(training_folder), IDS)
    for folder in (training_folder, table_folder):
        model = le.load(folder, dtype="bfloat16")
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        logits = logits_of(model, IDS)
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).norm() / expected.norm() < 0.05


def test_unknown_names_are_refused_with_the_nearest(table_folder, training_folder):
    with pytest.raises(UserError, match=r"Unknown store 'disk'.*Known: auto, direct"):
        le.load(table_folder, store="disk")
    with pytest.raises(UserError, match=r"'float23'.*Did you mean 'float32'"):
        le.load(table_folder, dtype="float23")


def test_a_model_with_a_missing_table_says_so(own_folder):
    shutil.rmtree(own_folder / "table")
    with pytest.raises(TableError, match=r"table: no such folder"):
        le.load(own_folder)


def test_the_table_of_another_model_is_refused(own_folder, tmp_path):
    le.reparameterize(attached_model("llama", seed=5), tmp_path / "other", encoding="float32")
    shutil.rmtree(own_folder / "table")
    shutil.copytree(tmp_path / "other" / "table", own_folder / "table")
    with pytest.raises(TableError, match="the table of another model"):
        le.load(own_folder)


def test_a_table_of_another_shape_is_refused(own_folder, tmp_path):
    model = attached_model("llama", layers=[0])
    le.reparameterize(model, tmp_path / "other", encoding="float32")
    shutil.rmtree(own_folder / "table")
    shutil.copytree(tmp_path / "other" / "table", own_folder / "table")
    with pytest.raises(TableError, match=r"made for .*num_layers=1.*needs .*num_layers=3"):
        le.load(own_folder)


def _change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("part", ["router", "routed.down_proj", "q_proj"])
def test_missing_weights_are_refused(part, training_folder, tmp_path):
    folder = shutil.copytree(training_folder, tmp_path / "model")

    def drop(weights):
        del weights[next(name for name in weights if part in name)]

    _change_weights(folder, drop)
    with pytest.raises(UserError, match=r"don't fit the model \(1 missing tensors"):
        le.load(folder)


def test_weights_of_another_shape_are_refused(training_folder, tmp_path):
    folder = shutil.copytree(training_folder, tmp_path / "model")

    def cut(weights):
        name = next(name for name in weights if "routed.up_proj" in name)
        weights[name] = weights[name][:, :5].contiguous()

    _change_weights(folder, cut)
    with pytest.raises(UserError, match=r"don't fit the model \(1 mismatched tensors"):
        le.load(folder)


def test_truncated_weights_are_refused(own_folder):
    path = own_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"can't be (read|loaded)"):
        le.load(own_folder)


def test_an_unknown_setting_is_refused(own_folder):
    path = own_folder / "config.json"
    config = json.loads(path.read_text())
    config["lookup_experts"]["number"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="Unknown lookup_experts setting 'number'"):
        le.load(own_folder)


def test_settings_that_are_missing_are_refused(own_folder):
    path = own_folder / "config.json"
    config = json.loads(path.read_text())
    del config["lookup_experts"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="lookup_experts"):
        le.load(own_folder)


def test_a_name_is_looked_up_on_the_hub_and_a_path_is_not(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, **_):
        asked.append(name)
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UserError, match=r"no model of that name could be fetched.*ConnectionError"):
        local_folder("someone/some-model")
    with pytest.raises(UserError, match="No such folder"):
        local_folder("out/of/reach")
    with pytest.raises(UserError, match="No such folder"):
        local_folder(tmp_path / "nowhere")
    assert asked == ["someone/some-model"]


def test_a_tokenizer_comes_from_the_folder_or_is_missed(table_folder, tmp_path):
    assert len(load_tokenizer(table_folder)) == VOCAB
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)
