"""What `inspect` and `verify` find in folders of every kind."""

import json
import shutil

import pytest
from random_tables import flip_bit
from safetensors.torch import load_file, save_file
from tiny_models import attached_model, gateless_model, moe_model, tiny_model

import lookup_experts as le
from lookup_experts.commands.inspect import format_description
from lookup_experts.errors import TableError, UserError
from lookup_experts.generation.inspection import inspect_folder, verify_folder
from lookup_experts.training.costs import count
from lookup_experts.training.models import build_without_weights
from lookup_experts.training.recipe import load_recipe


@pytest.fixture
def own_folder(table_folder, tmp_path):
    """A copy of the inference folder, to spoil."""
    return shutil.copytree(table_folder, tmp_path / "own")


def test_training_form(training_folder):
    described = inspect_folder(training_folder)
    assert (described["form"], described["format"]) == ("experts", "lookup-experts")
    assert (described["backbone"], described["table"]) == ("llama", None)
    assert described["lookup_experts"]["num_experts"] == 4
    total = sum(weight.numel() for weight in attached_model("llama").parameters())
    counts = described["parameters"]
    experts = 3 * (4 * 2 * 32 * 16 + 32)
    assert described["rows"] == {"form": "mole", "size": 32}
    assert counts == {
        "resident": total - experts,
        "readers": 3 * 4 * 32,
        "experts": experts,
        "offloaded": 97 * 3 * 4 * 32,  # V ids, 3 layers, 4 experts, d 32
        "loaded_per_token": 3 * 4 * 32,
    }
    json.dumps(described)


def test_table_form(table_folder):
    described = inspect_folder(table_folder)
    assert (described["form"], described["backbone"]) == ("table", "llama")
    assert described["parameters"]["experts"] == 0
    assert described["parameters"]["table"] == 97 * 3 * 4 * 32
    assert described["parameters"]["loaded_per_token"] == 3 * 4 * 32
    table = described["table"]
    assert (table["encoding"], table["record_bytes"], table["shards"]) == ("float32", 1536, 1)
    assert table["fingerprint"] == described["lookup_experts"]["fingerprint"]
    json.dumps(described)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gateless_llama"])
def test_training_form_foretells_its_table(family, tmp_path):
    """Every second layer, and a family whose configuration has names of its own for the sizes."""
    attached_model(family, layers="every:2").save_pretrained(tmp_path / "experts")
    le.reparameterize(tmp_path / "experts", tmp_path / "folded", encoding="nf4")
    before, after = (
        inspect_folder(tmp_path / name)["parameters"] for name in ("experts", "folded")
    )
    assert (before["offloaded"], before["resident"]) == (after["table"], after["resident"])
    assert before["loaded_per_token"] == after["loaded_per_token"] == 2 * 4 * 32


@pytest.mark.parametrize("save", ["full", "experts"])
@pytest.mark.parametrize(
    ("settings", "num_rows", "readers"),
    [
        ({"form": "meki", "row_size": 7}, 1, 2 * 7 * 32 + 32),
        ({"num_experts": 3, "row_size": 7}, 3, 3 * 32 + 7 * 32),
    ],
)
def test_rows_of_every_form(settings, num_rows, readers, save, tmp_path):
    """Training form, experts alone, and the table of both."""
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    model = le.load(tmp_path / "backbone")
    le.attach(model, train_backbone=save == "full", save=save, init="normal", **settings)
    model.save_pretrained(tmp_path / "experts")
    le.reparameterize(tmp_path / "experts", tmp_path / "folded", encoding="int8")
    before, after = (inspect_folder(tmp_path / name) for name in ("experts", "folded"))
    running = sum(weight.numel() for weight in le.load(tmp_path / "folded").parameters())
    total = sum(weight.numel() for weight in model.parameters())
    for described in (before, after):
        assert described["rows"] == {"form": settings.get("form", "mole"), "size": 7}
        assert described["parameters"]["readers"] == 3 * readers
        assert described["parameters"]["resident"] == running
        text = format_description(described)
        assert f"  of it reads rows {3 * readers:,} parameters" in text
        assert f", 7 numbers each, {num_rows} per token id and layer" in text
        json.dumps(described)
    assert before["parameters"]["experts"] == total - running
    per_token = 3 * num_rows * 7
    assert before["parameters"]["loaded_per_token"] == per_token
    assert before["parameters"]["offloaded"] == after["parameters"]["table"] == 97 * per_token


def test_a_mixture_of_experts(tmp_path):
    """2 layers of 6 experts of size 24 with d 32, of which a token selects 2."""
    model = moe_model()
    model.save_pretrained(tmp_path)
    described = inspect_folder(tmp_path)
    total = sum(weight.numel() for weight in model.parameters())
    assert described["parameters"] == {
        "resident": total,
        "experts": 2 * 6 * 2 * 32 * 24,
        "active": total - 2 * 4 * 2 * 32 * 24,
        "offloaded": 2 * 6 * 2 * 32 * 24,
        "loaded_per_token": 2 * 2 * 2 * 32 * 24,
    }
    lines = format_description(described).splitlines()
    assert "  offloaded       18,432 parameters" in lines
    assert "  loaded per token 6,144 parameters" in lines


def write_headers(model, folder):
    """A model folder with headers that tell the shapes of a model without weights, and no data.

    Of a sparse file only the header takes space, and reading headers is all that is looked at.
    """
    model.config.save_pretrained(folder)
    entries, end = {}, 0
    for name, weight in model.state_dict().items():
        begin, end = end, end + 4 * weight.numel()
        entries[name] = {
            "dtype": "F32",
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


# arXiv 2503.15798, table 2.
@pytest.mark.parametrize(
    ("name", "offloaded", "loaded"),
    [("moe-160m-10e", 0.3e9, 57e6), ("mole-160m-4e", 1.8e9, 0.037e6)],
)
def test_what_is_offloaded_is_what_the_paper_says(name, offloaded, loaded, tmp_path):
    write_headers(build_without_weights(load_recipe(name), 50304), tmp_path)
    found = inspect_folder(tmp_path)["parameters"]
    assert found["offloaded"] == pytest.approx(offloaded, rel=0.06)  # it rounds to a digit
    assert found["loaded_per_token"] == pytest.approx(loaded, rel=0.025)
    counted = count(load_recipe(name).model, 50304)
    assert found["offloaded"] == counted.offloaded_experts
    assert found["loaded_per_token"] == counted.loaded_per_token
    assert found["experts"] == counted.routed_experts


def test_resident_parameters_are_those_of_the_running_model(table_folder):
    running = sum(weight.numel() for weight in le.load(table_folder).parameters())
    assert inspect_folder(table_folder)["parameters"]["resident"] == running


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_the_backbone_are_resident(family, tmp_path):
    """A mixture-of-experts backbone has experts of its own, which no table holds."""
    model = attached_model(family)
    model.save_pretrained(tmp_path)
    routed = sum(weight.numel() for name, weight in model.named_parameters() if ".routed." in name)
    assert inspect_folder(tmp_path)["parameters"]["experts"] == routed


def test_a_bare_table(table_folder):
    described = inspect_folder(table_folder / "table")
    assert described["form"] == "bare table"
    assert described["table"] == inspect_folder(table_folder)["table"]


def test_plain_models(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    described = inspect_folder(tmp_path / "gpt2")
    assert (described["form"], described["format"]) == ("dense", "huggingface")
    assert (described["backbone"], described["lookup_experts"]) == ("gpt2", None)
    gateless_model().save_pretrained(tmp_path / "gateless")
    assert inspect_folder(tmp_path / "gateless")["backbone"] == "gateless_llama"


@pytest.mark.parametrize(
    ("name", "form"), [("dense", "dense"), ("mole-4e", "experts"), ("moe-10e-top10", "moe")]
)
def test_the_authors_checkpoints(official_oracles, name, form):
    described = inspect_folder(official_oracles / name)
    assert (described["form"], described["format"]) == (form, "official")
    if name == "mole-4e":
        assert described["parameters"]["experts"] == 2 * (4 * 2 * 48 * 96 + 48)
        assert described["parameters"]["loaded_per_token"] == 2 * 4 * 48
    if form == "moe":
        assert described["parameters"]["experts"] == 2 * 10 * 2 * 48 * 48
        assert described["parameters"]["offloaded"] == 2 * 10 * 2 * 48 * 48
        assert described["parameters"]["loaded_per_token"] == 2 * 2 * 2 * 48 * 48
        assert described["moe"]["num_experts_per_tok"] == 2
        assert "2 of 10 experts of size 48 per token" in format_description(described)


def test_a_folder_without_settings_is_an_error(own_folder):
    config = json.loads((own_folder / "config.json").read_text())
    del config["lookup_experts"]
    (own_folder / "config.json").write_text(json.dumps(config))
    for look in (inspect_folder, verify_folder):
        with pytest.raises(UserError, match="doesn't say what was attached"):
            look(own_folder)


def test_a_backbone_that_transformers_does_not_know_is_an_error(training_folder, tmp_path):
    folder = shutil.copytree(training_folder, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["backbone_type"] = "lama"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model type 'lama' is unknown to transformers"):
        inspect_folder(folder)


def test_no_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such folder"):
        inspect_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a model folder"):
        inspect_folder(tmp_path)
    with pytest.raises(UserError, match="not a model folder"):
        verify_folder(tmp_path)


# --------------------------------------------------------------------------------------- verify


def test_a_sound_table_has_no_problems(table_folder):
    seen = []
    found = verify_folder(table_folder, lambda done, total: seen.append((done, total)))
    assert (found.problems, found.matches_model) == ((), True)
    assert found.report.num_ids == 97
    assert seen[-1] == (97, 97)
    assert json.loads(json.dumps(found.to_dict()))["intact"]


def test_a_bare_table_has_no_model_to_match(table_folder):
    assert verify_folder(table_folder / "table").matches_model is None


def test_a_flipped_bit_is_found_and_named(own_folder):
    path = own_folder / "table" / "table-00001-of-00001.safetensors"
    flip_bit(path, 4096 + 5 * 1536 + 3)
    found = verify_folder(own_folder)
    assert found.problems[0] == "1 of 97 records are damaged"
    assert "record 5 in table-00001-of-00001.safetensors" in found.problems[1]
    assert not found.to_dict()["intact"]


def test_another_embedding_or_tokenizer_is_found(own_folder):
    weights = load_file(own_folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3] += 0.1
    save_file(weights, own_folder / "model.safetensors", {"format": "pt"})
    tokenizer = own_folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    found = verify_folder(own_folder)
    assert not found.matches_model
    assert [problem.split(" isn't")[0] for problem in found.problems] == [
        "the model's embedding",
        "the tokenizer",
    ]


def test_the_table_of_another_model_is_found(own_folder, tmp_path):
    le.reparameterize(attached_model("llama", seed=5), tmp_path / "other", encoding="float32")
    shutil.rmtree(own_folder / "table")
    shutil.copytree(tmp_path / "other" / "table", own_folder / "table")
    found = verify_folder(own_folder)
    assert not found.matches_model
    assert "another model" in found.problems[0]


def test_verify_says_why_there_is_nothing_to_verify(training_folder, tmp_path):
    with pytest.raises(UserError, match="in training form"):
        verify_folder(training_folder)
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no model in table form"):
        verify_folder(tmp_path)


def test_a_truncated_table_can_not_be_verified(own_folder):
    path = own_folder / "table" / "table-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TableError, match="truncated"):
        verify_folder(own_folder)


def test_a_model_saved_in_half_precision_still_matches(own_folder):
    """The same weights in another dtype on the way into memory are no other embedding."""
    le.load(own_folder, dtype="bfloat16")
    assert verify_folder(own_folder).matches_model
