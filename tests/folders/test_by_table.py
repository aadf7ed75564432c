"""Several tables on one backbone: each text as with its table alone, and nothing without."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_command import run_command
from tables_of_a_backbone import fold
from tiny_models import (
    VOCAB,
    attached_model,
    greedy,
    logits_of,
    randomize_experts,
    tiny_model,
    token_ids,
)
from transformers import AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.folders import by_table
from lookup_experts.folders.by_table import ByTableMixin
from lookup_experts.table.reader import read_table

TABLES = {
    "novels": {"num_experts": 4, "row_size": 8},
    "code": {"num_experts": 2, "layers": "0,2"},
    "law": {"form": "meki", "row_size": 16},
    "tales": {"num_experts": 4, "row_size": 8},
    "proofs": {"num_experts": 2, "layers": "0,2"},
    "letters": {"num_experts": 4, "row_size": 8},
}
"""Of three shapes, which a batch mixes all the same; those of one are read together."""


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def folders(request, tmp_path_factory):
    """A backbone, and folders with tables of it; one holds the backbone too."""
    place = tmp_path_factory.mktemp(request.param)
    backbone = place / "backbone"
    tiny_model(request.param).save_pretrained(backbone)
    tables = {
        name: fold(
            backbone, place / name, seed, "full" if name == "code" else "experts", **settings
        )
        for seed, (name, settings) in enumerate(TABLES.items(), 1)
    }
    return backbone, tables


@pytest.fixture(params=["memory", "direct"])
def model(request, folders):
    backbone, tables = folders
    loaded = le.load(backbone, tables=tables, store=request.param, cache="20kB")
    yield loaded
    for reader in loaded.table_readers.values():
        reader.close()


def alone(folders: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    backbone, tables = folders
    return logits_of(le.load(backbone if name is None else tables[name]), ids)


@pytest.mark.parametrize("name", [None, *TABLES])
def test_all_texts_of_one(folders, model, name):
    ids = token_ids(3, 7)
    model.use_table(name)
    found, expected = logits_of(model, ids), alone(folders, name, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert name is not None or torch.equal(found, expected)


def test_at_first_there_is_none(folders, model):
    ids = token_ids(2, 5)
    assert torch.equal(logits_of(model, ids), alone(folders, None, ids))
    with_gradients = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(with_gradients, alone(folders, None, ids))


@pytest.mark.parametrize("gradients", [False, True])
def test_each_text_its_own(folders, model, gradients):
    names = ["code", None, "novels", "law", "code", "tales", "proofs", "letters", "novels"]
    ids = token_ids(len(names), 9)
    model.use_table(names)
    with torch.set_grad_enabled(gradients):
        found = model(input_ids=ids, use_cache=False).logits
    for row, name in enumerate(names):
        expected = alone(folders, name, ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-5, atol=2e-5)


def test_texts_without_a_table_are_the_backbones_to_the_bit(folders, model):
    names = ["novels", None, "code", None]
    ids = token_ids(len(names), 6)
    model.use_table(names)
    found = logits_of(model, ids)
    model.use_table(None)
    plain = logits_of(model, ids)
    assert torch.equal(found[[1, 3]], plain[[1, 3]])
    assert not torch.allclose(found[[0, 2]], plain[[0, 2]], atol=1e-2)


def test_prompts_and_steps(folders, model):
    """Longer than what goes through the row cache, then token by token."""
    names = ["novels", "code", None]
    ids = token_ids(3, 70)
    model.use_table(names)
    found = greedy(model, ids, 6)
    backbone, tables = folders
    for row, name in enumerate(names):
        own = le.load(backbone if name is None else tables[name])
        assert torch.equal(found[row : row + 1], greedy(own, ids[row : row + 1], 6))


def test_several_answers_to_a_prompt(folders, model):
    names = ["novels", "code"]
    ids = token_ids(2, 8)
    model.use_table(names)
    found = greedy(model, ids, 5, num_beams=3)
    _, tables = folders
    for row, name in enumerate(names):
        own = le.load(tables[name])
        assert torch.equal(found[row : row + 1], greedy(own, ids[row : row + 1], 5, num_beams=3))


def test_numbers_that_do_not_match(model):
    model.use_table(["novels", "code"])
    with pytest.raises(UserError, match="chosen for 2 sequences, and 3 came"):
        logits_of(model, token_ids(3, 4))
    model.use_table("novels")
    assert logits_of(model, token_ids(3, 4)).shape == (3, 4, VOCAB)


def test_who_watches_is_told_of_each(folders, model):
    """Router weights are those of the text's own table; where it has none, they are no numbers."""
    names = ["code", None, "novels", "law"]
    ids = token_ids(len(names), 3)
    heard: dict[int, torch.Tensor] = {}
    model.lookup_entrance.observe = heard.__setitem__
    model.use_table(names)
    logits_of(model, ids)
    model.lookup_entrance.observe = None
    assert heard.keys() == {0, 1, 2}
    for layer, weights in heard.items():
        by_text = weights.view(len(names), 3, 4)
        code = by_text[0]
        assert code[:, 2:].isnan().all()
        assert code.isnan().all() if layer == 1 else code[:, :2].sum(-1).allclose(torch.ones(3))
        assert by_text[1].isnan().all() and by_text[3].isnan().all()
        torch.testing.assert_close(by_text[2].sum(-1), torch.ones(3))


def test_a_record_that_cannot_be_read_is_an_error_and_others_go_on(folders, model):
    model.use_table(["novels", "code"])
    with pytest.raises(TableError, match="outside"):
        logits_of(model, torch.tensor([[1, 2], [1, VOCAB]]))
    ids = token_ids(2, 4)
    for _ in range(30):  # what was begun was given back
        logits_of(model, ids)


def test_compiled(folders):
    backbone, tables = folders
    loaded = le.load(backbone, tables=tables, store="memory")
    names = ["code", None, "novels", "tales"]
    ids = token_ids(len(names), 6)
    loaded.use_table(names)
    expected = logits_of(loaded, ids)
    compiled = torch.compile(loaded, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled, ids), expected, rtol=1e-5, atol=2e-5)
    loaded.use_table(None)
    plain = logits_of(loaded, ids)
    torch.testing.assert_close(logits_of(compiled, ids), plain, rtol=1e-5, atol=2e-5)


def test_gradients_after_inference(folders):
    """What a pass in inference mode has planned serves one with gradients too."""
    backbone, tables = folders
    loaded = le.load(backbone, tables=tables, store="memory", weights="plain")
    ids = token_ids(2, 6)
    loaded.use_table(["novels", None])
    with torch.inference_mode():
        loaded(input_ids=ids, use_cache=False)
    embeddings = loaded.get_input_embeddings().weight.requires_grad_()
    loaded(input_ids=ids, use_cache=False).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_in_bfloat16_with_fast_linears(folders):
    backbone, tables = folders
    loaded = le.load(backbone, tables=tables, dtype="bfloat16", store="memory")
    loaded.use_table(["law", "novels"])
    ids = token_ids(2, 6)
    found = logits_of(loaded, ids)
    for row, name in enumerate(["law", "novels"]):
        own = logits_of(le.load(tables[name], dtype="bfloat16"), ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], own, rtol=0.1, atol=0.1)


def test_tables_alike_are_read_together(folders, model):
    groups = [group.tables for group in model.source_by_table.groups]
    assert groups == [("novels", "tales", "letters"), ("code", "proofs"), ("law",)]
    assert len(model.table_readers) == 3


def test_no_more_are_multiplied_for_all_than_the_model_is_wide(folders):
    """Rows of 8 and 32 numbers of width: four tables side by side."""
    backbone, tables = folders
    names = [f"t{number}" for number in range(6)]
    loaded = le.load(backbone, tables=dict.fromkeys(names, tables["novels"]), store="memory")
    assert [len(group.tables) for group in loaded.source_by_table.groups] == [4, 2]
    ids = token_ids(1, 5).repeat(6, 1)
    loaded.use_table(names)
    found = logits_of(loaded, ids)
    expected = alone(folders, "novels", ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_one_budget_for_all(folders):
    backbone, tables = folders
    loaded = le.load(backbone, tables=tables, store="direct", cache="30kB")
    budgets = [reader.cache_bytes for reader in loaded.table_readers.values()]
    assert 0 < sum(budgets) <= 30_000


def test_it_is_the_backbone_it_knows(model):
    assert isinstance(model, ByTableMixin)
    assert not any(
        weight.requires_grad for n, weight in model.named_parameters() if "lookup" not in n
    )
    with pytest.raises(UserError, match="isn't saved as a whole"):
        model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


# --- what won't do ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tmp_path_factory.mktemp("refused")
    tiny_model("llama").save_pretrained(place / "backbone")
    fold(place / "backbone", place / "novels", 1, num_experts=2)
    fold(place / "backbone", place / "full", 2, "full", num_experts=2)
    return place


def test_an_unknown_name(llama):
    model = le.load(llama / "backbone", tables={"novels": llama / "novels"})
    with pytest.raises(UserError, match=r"Unknown table 'novel'. Did you mean 'novels'"):
        model.use_table("novel")
    with pytest.raises(UserError, match="Unknown table 'code'"):
        model.use_table([None, "code"])
    with pytest.raises(UserError, match="for no sequence"):
        model.use_table([])


@pytest.mark.parametrize("kind", ["novels", "full"])
def test_the_table_of_another_backbone(llama, tmp_path, kind):
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"Table novels: .* belongs to another backbone than"):
        le.load(tmp_path / "other", tables={"novels": llama / kind})


def test_on_a_model_with_experts(llama):
    with pytest.raises(UserError, match="has lookup experts of its own"):
        le.load(llama / "full", tables={"novels": llama / "novels"})


def test_experts_in_training_form(llama, tmp_path):
    attached_model().save_pretrained(tmp_path / "training")
    with pytest.raises(UserError, match=r"in training form. Fold them first"):
        le.load(llama / "backbone", tables={"novels": tmp_path / "training"})


def test_no_table_at_all(llama):
    with pytest.raises(UserError, match="has no lookup experts; give a folder that mole"):
        le.load(llama / "backbone", tables={"novels": llama / "backbone"})
    with pytest.raises(UserError, match="No such folder"):
        le.load(llama / "backbone", tables={"novels": llama / "nothing"})


@pytest.mark.parametrize("name", ["", "a.b", "a:b", "a b", "ü"])
def test_names_that_will_not_do(llama, name):
    with pytest.raises(UserError, match="A table can't be called"):
        le.load(llama / "backbone", tables={name: llama / "novels"})


@pytest.mark.parametrize("name", ["forward", "keys", "layer", "0", "weight"])
def test_names_that_modules_have(llama, name):
    model = le.load(llama / "backbone", tables={name: llama / "novels"})
    model.use_table(name)
    ids = token_ids(1, 4)
    assert torch.equal(logits_of(model, ids), logits_of(le.load(llama / "novels"), ids))


def test_a_table_that_is_gone(llama, tmp_path):
    shutil.copytree(llama / "novels", tmp_path / "novels")
    shutil.rmtree(tmp_path / "novels" / "table")
    with pytest.raises(TableError):
        le.load(llama / "backbone", tables={"novels": tmp_path / "novels"})


def test_what_was_opened_before_one_that_cannot_be_is_closed(llama, tmp_path, monkeypatch):
    fold(llama / "backbone", tmp_path / "other", 3, num_experts=3)
    opened = []

    def read_once(*arguments, **options):
        if opened:
            raise TableError("It can't be opened.")
        opened.append(read_table(*arguments, **options))
        return opened[0]

    monkeypatch.setattr(by_table, "read_table", read_once)
    tables = {"novels": llama / "novels", "other": tmp_path / "other"}
    with pytest.raises(TableError, match="It can't be opened"):
        le.load(llama / "backbone", tables=tables, store="direct")
    with pytest.raises(ValueError, match="is closed"):
        opened[0].rows(token_ids(1, 2))


def test_weights_that_are_missing(llama, tmp_path):
    shutil.copytree(llama / "novels", tmp_path / "novels")
    config = json.loads((tmp_path / "novels" / "config.json").read_text())
    config["lookup_experts"]["num_experts"] = 3
    (tmp_path / "novels" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"made for .* needs|don't fit the model"):
        le.load(llama / "backbone", tables={"novels": tmp_path / "novels"})


# --- tables without their backbone --------------------------------------------------------------


def test_folded_alone_they_find_their_backbone(llama, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(llama / "backbone")
    le.attach(model, 2, train_backbone=False, save="experts")
    randomize_experts(model)
    model.save_pretrained(tmp_path / "experts")
    code, _, err = run_command(
        capsys, "reparameterize", tmp_path / "experts", tmp_path / "out", "--save", "experts"
    )
    assert code == 0, err
    assert le.load(tmp_path / "out").lookup_settings.backbone is not None
    plain, full = (llama / "backbone", llama / "full")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < (plain / "model.safetensors").stat().st_size / 5
    assert (full / "model.safetensors").stat().st_size > size


def test_folded_alone_without_a_reference(tmp_path):
    with pytest.raises(UserError, match="refers to no backbone"):
        le.reparameterize(attached_model(), tmp_path / "out", save="experts")
    with pytest.raises(UserError, match="Unknown value of save 'expert'"):
        le.reparameterize(attached_model(), tmp_path / "out", save="expert")
    assert not list(tmp_path.iterdir())
