"""Re-parameterising: the table form says what the training form says, from every store."""

import functools
import json

import pytest
import torch
from tiny_models import (
    attached_model,
    gateless_model,
    greedy,
    left_padded,
    logits_of,
    tiny_model,
    token_ids,
)
from transformers import AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import DiskFullError, UserError
from lookup_experts.model.fingerprint import fingerprint
from lookup_experts.model.wiring import routed_experts
from lookup_experts.table import build
from lookup_experts.table.opening import open_table
from lookup_experts.table.store_choice import STORES

IDS = token_ids(4, 20)
# Relative error of the logits, about twice what a tiny random model of 12 experts shows.
TOLERANCES = {
    "float32": 1e-6,
    "float16": 2e-4,
    "bfloat16": 2e-3,
    "int8": 6e-3,
    "nf4": 0.1,
    "nf3": 0.2,
}
FAMILIES = ["gateless_llama", "qwen2", "gemma2", "gpt2", "bloom", "falcon", "gpt_oss"]


def relative_error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def training_form(training_folder):
    return le.load(training_folder)


@pytest.mark.parametrize("store", [*STORES, "auto"])
def test_every_store_gives_the_logits_and_tokens_of_training(store, training_form, table_folder):
    model = le.load(table_folder, store=store)
    torch.testing.assert_close(
        logits_of(model, IDS), logits_of(training_form, IDS), rtol=1e-5, atol=1e-5
    )
    prompt = token_ids(1, 5)
    assert torch.equal(greedy(model, prompt, 64), greedy(training_form, prompt, 64))
    prompts = [token_ids(length, seed=length).tolist() for length in (3, 12, 1, 7, 5, 9, 2, 4)]
    ids, mask = left_padded(prompts)
    expected = greedy(training_form, ids, 64, attention_mask=mask)
    assert torch.equal(greedy(model, ids, 64, attention_mask=mask), expected)


@pytest.mark.parametrize("store", ["memory", "direct"])
@pytest.mark.parametrize("encoding", TOLERANCES)
def test_every_encoding_stays_within_its_error(encoding, store, training_form, tmp_path):
    le.reparameterize(training_form, tmp_path / "out", encoding=encoding)
    model = le.load(tmp_path / "out", store=store)
    expected = logits_of(training_form, IDS)
    assert relative_error(logits_of(model, IDS), expected) <= TOLERANCES[encoding]
    assert greedy(model, IDS, 8).shape == (4, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_folded(family, tmp_path):
    model = attached_model(family)
    le.reparameterize(model, tmp_path / "out", encoding="float32")
    folded = le.load(tmp_path / "out", store="direct")
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model, IDS), rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy(folded, IDS, 8), greedy(model, IDS, 8))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_backbones_with_experts_of_their_own_can_be_folded(family, tmp_path):
    """Their weights are converted on the way to disk and back."""
    model = attached_model(family)
    le.reparameterize(model, tmp_path / "out", encoding="float32")
    folded = le.load(tmp_path / "out", store="mmap")
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"expert_kind": "swiglu"}, {"layers": [1]}, {"layers": [0, 2]}, {"num_experts": 1}],
    ids=str,
)
def test_every_kind_of_attachment_can_be_folded(settings, tmp_path):
    model = attached_model("llama", **settings)
    table = le.reparameterize(model, tmp_path / "out", encoding="float32")
    assert table.layout.shape.num_layers == len(model.lookup_settings.layers)
    folded = le.load(tmp_path / "out", store="direct")
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model, IDS), rtol=1e-5, atol=1e-5)


def test_a_table_in_many_shards_gives_the_same(training_form, tmp_path, monkeypatch):
    small = functools.partial(build.plan_shards, max_shard_bytes=60_000)
    monkeypatch.setattr(build, "plan_shards", small)
    table = le.reparameterize(training_form, tmp_path / "out", encoding="float32")
    assert len(table.shards) > 2
    for store in STORES:
        model = le.load(tmp_path / "out", store=store)
        torch.testing.assert_close(
            logits_of(model, IDS), logits_of(training_form, IDS), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_half_precision_model_folds_exactly_into_its_own_type(dtype, tmp_path):
    attached_model("llama").save_pretrained(tmp_path / "model")
    model = le.load(tmp_path / "model", dtype="bfloat16")
    le.reparameterize(model, tmp_path / "out", encoding=dtype)
    folded = le.load(tmp_path / "out", store="direct")
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model, IDS), rtol=0.02, atol=0.05)


def test_the_training_model_is_left_as_it_was(tmp_path):
    model = attached_model("llama")
    before, config = logits_of(model, IDS), json.loads(model.config.to_json_string())
    le.reparameterize(model, tmp_path / "out")
    assert torch.equal(logits_of(model, IDS), before)
    assert json.loads(model.config.to_json_string()) == config
    assert model.lookup_settings.form == "experts"


def test_an_inference_folder_holds_no_experts(table_folder):
    from lookup_experts.folders.model_folder import tensor_names

    names = tensor_names(table_folder)
    assert not any(".routed." in name for name in names)
    assert sum(".lookup_experts.router.weight" in name for name in names) == 3
    model = le.load(table_folder)
    assert not any(".routed." in name for name, _ in model.named_parameters())


def test_a_folder_and_a_model_fold_into_the_same_bytes(
    training_folder, training_form, tokenizer, tmp_path
):
    from_folder = le.reparameterize(training_folder, tmp_path / "a", encoding="nf4")
    from_model = le.reparameterize(
        training_form, tmp_path / "b", encoding="nf4", tokenizer=tokenizer
    )
    assert _shards(from_folder) == _shards(from_model)
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert (tmp_path / "b" / "tokenizer.json").exists()
    manifests = [table.manifest.tokenizer_hash for table in (from_folder, from_model)]
    assert None not in manifests


def _shards(table) -> list[bytes]:
    return [table.path(shard).read_bytes() for shard in table.shards]


def test_an_inference_folder_can_be_moved_saved_and_loaded_by_transformers(
    table_folder, training_form, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(table_folder, store="mmap")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    model.expert_source.close()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    torch.testing.assert_close(
        logits_of(again, IDS), logits_of(training_form, IDS), rtol=1e-5, atol=1e-5
    )
    assert open_table(tmp_path / "moved" / "table").manifest.fingerprint == fingerprint(
        training_form.get_input_embeddings(),
        routed_experts(training_form),
    )


def test_saving_over_its_own_folder_keeps_the_table(table_folder, tmp_path):
    le.load(table_folder).save_pretrained(tmp_path / "copy")
    model = le.load(tmp_path / "copy", store="direct")
    model.save_pretrained(tmp_path / "copy")
    before = logits_of(model, IDS)
    assert torch.equal(logits_of(le.load(tmp_path / "copy"), IDS), before)


def test_gradients_through_the_table_are_those_of_training(training_form, table_folder):
    """Router and backbone can be trained on in table form; records are never overwritten."""
    folded = le.load(table_folder, store="direct")
    folded.train()
    batches = [token_ids(2, 9, seed=seed) for seed in range(3)]
    gradients = []
    for model in (training_form, folded):
        model.zero_grad()
        losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
        with torch.no_grad():
            model(input_ids=token_ids(4, 30, seed=9))
        sum(losses).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    trained, found = gradients
    assert any(".router." in name for name in found)
    for name, gradient in found.items():
        if name != "model.embed_tokens.weight":  # whose experts are numbers in the table now
            torch.testing.assert_close(gradient, trained[name], rtol=1e-4, atol=1e-6, msg=name)


# -------------------------------------------------------------------------------- bad input


def test_an_existing_folder_is_not_touched(training_form, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        le.reparameterize(training_form, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_has_no_experts_to_fold_is_refused(table_folder, tmp_path):
    for model in (tiny_model("llama"), gateless_model()):
        with pytest.raises(UserError, match="no lookup experts"):
            le.reparameterize(model, tmp_path / "out")
    with pytest.raises(UserError, match="into a table already"):
        le.reparameterize(table_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_encodings_and_block_sizes_are_refused_first(training_form, tmp_path):
    with pytest.raises(UserError, match=r"'nf5'.*Did you mean 'nf"):
        le.reparameterize(training_form, tmp_path / "out", encoding="nf5")
    with pytest.raises(UserError, match="Block size 0"):
        le.reparameterize(training_form, tmp_path / "out", encoding="nf4", block_size=0)
    assert not list(tmp_path.iterdir())


def test_experts_with_infinite_outputs_are_refused(tmp_path):
    model = attached_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.lookup_experts.routed.down_proj.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN or infinite"):
        le.reparameterize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- interruption


def test_an_interrupted_run_goes_on(training_form, tmp_path, monkeypatch):
    messages = []

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.reparameterize(training_form, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    table = le.reparameterize(training_form, tmp_path / "out", notify=messages.append)
    assert messages == [f"Going on with the interrupted run in {tmp_path / 'out.partial'}."]
    expected = le.reparameterize(training_form, tmp_path / "expected")
    assert _shards(table) == _shards(expected)
    assert not (tmp_path / "out.partial").exists()


def test_a_run_interrupted_after_the_table_goes_on(training_form, tmp_path, monkeypatch):
    """The table was finished, and then the disk had no room for what is kept with it."""
    from lookup_experts.generation import folding

    with monkeypatch.context() as patched:
        patched.setattr(folding, "keep_counts", _no_space)
        with pytest.raises(DiskFullError, match="No space"):
            le.reparameterize(training_form, tmp_path / "out")
    assert (tmp_path / "out.partial" / "table" / "table.json").exists()
    le.reparameterize(training_form, tmp_path / "out")
    expected = logits_of(training_form, IDS)
    assert relative_error(logits_of(le.load(tmp_path / "out"), IDS), expected) < 2e-3


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_an_interrupted_run_of_other_weights_is_not_mixed_in(training_form, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.reparameterize(training_form, tmp_path / "out", progress=stop)
    with pytest.raises(UserError, match=r"unfinished build of another table.*Delete it"):
        le.reparameterize(attached_model("llama", seed=7), tmp_path / "out")
    with pytest.raises(UserError, match="unfinished build of another table"):
        le.reparameterize(training_form, tmp_path / "out", encoding="float16")
