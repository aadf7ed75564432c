"""Weights that accelerate keeps elsewhere: the same logits, and everything can be saved and folded.

The model runs on the CPU, where "offloaded to the CPU" means weights that a module has only while
it is called, as on a GPU.
"""

import warnings

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    attached_model,
    greedy,
    logits_of,
    randomize_experts,
    tiny_model,
    token_ids,
)
from transformers import AutoConfig, AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.generation.inspection import verify_folder
from lookup_experts.generation.sampling import Sampling
from lookup_experts.generation.text import generate_ids
from lookup_experts.model.fingerprint import fingerprint
from lookup_experts.model.placement import execution_device, named_weights, state_with_values
from lookup_experts.model.wiring import routed_experts

# PEFT uses what transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
IDS = token_ids(2, 9)
EXPERTS = "model.layers.1.mlp.lookup_experts"
PLACES = {
    "a layer": ["model.layers.1"],
    "all layers": ["model.layers"],
    "a block's experts": [EXPERTS],
    "a router": [f"{EXPERTS}.router"],
    "routed experts": [f"{EXPERTS}.routed"],
    "the embedding": ["model.embed_tokens"],
    "everything": ["model", "lm_head"],
}
IN_TABLE_FORM = [place for place in PLACES if place != "routed experts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model as a backbone, in training form, folded, and as experts alone."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_model("llama").save_pretrained(folder / "backbone")
    model = attached_model()
    model.save_pretrained(folder / "experts")
    le.reparameterize(model, folder / "table", encoding="float32")
    alone = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    le.attach(alone, 4, expert_size=16, train_backbone=False, save="experts")
    alone.load_state_dict(model.state_dict())
    alone.save_pretrained(folder / "alone")
    return folder


@pytest.fixture(scope="module")
def expected(folders):
    return logits_of(le.load(folders / "experts"), IDS)


def device_map(model, elsewhere, where="disk"):
    """A place for each module that holds tensors, as accelerate infers one."""
    return {
        name: where if any(f"{name}.".startswith(f"{place}.") for place in elsewhere) else "cpu"
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }


def num_elsewhere(model):
    return sum(weight.is_meta for weight in model.parameters())


def assert_works(model, expected, folder):
    """What is elsewhere computes, saves, folds, and stays where it is."""
    elsewhere = num_elsewhere(model)
    assert elsewhere > 0
    assert torch.equal(logits_of(model, IDS), expected)
    assert greedy(model, IDS[:1], 4).shape == (1, 4)
    with warnings.catch_warnings():  # transformers tells of the memory that saving may take
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(folder / "saved")
    assert torch.equal(logits_of(le.load(folder / "saved"), IDS), expected)
    if model.lookup_settings.form == "experts":
        assert fingerprint_of(model) == fingerprint_of(le.load(folder / "saved"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            le.reparameterize(model, folder / "folded", encoding="float32")
        torch.testing.assert_close(
            logits_of(le.load(folder / "folded"), IDS), expected, rtol=0, atol=1e-5
        )
        assert verify_folder(folder / "folded").matches_model
    assert num_elsewhere(model) == elsewhere
    assert torch.equal(logits_of(model, IDS), expected)


def fingerprint_of(model):
    return fingerprint(model.get_input_embeddings(), routed_experts(model))


@pytest.mark.parametrize("place", PLACES)
def test_training_form_with_parts_on_disk(place, folders, expected, tmp_path):
    where = device_map(le.load(folders / "experts"), PLACES[place])
    loaded = AutoModelForCausalLM.from_pretrained(
        folders / "experts", device_map=where, offload_folder=tmp_path / "offloaded"
    )
    assert_works(loaded, expected, tmp_path / "loaded")
    model = le.load(folders / "experts")
    dispatched = dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path / "elsewhere")
    assert_works(dispatched, expected, tmp_path / "dispatched")


@pytest.mark.parametrize("place", IN_TABLE_FORM)
def test_table_form_with_parts_on_disk(place, folders, tmp_path):
    expected = logits_of(le.load(folders / "table"), IDS)
    where = device_map(le.load(folders / "table"), PLACES[place])
    loaded = AutoModelForCausalLM.from_pretrained(
        folders / "table", device_map=where, offload_folder=tmp_path / "offloaded", cache="1MB"
    )
    loaded.expert_source.fill_cache()
    assert_works(loaded, expected, tmp_path / "loaded")
    model = le.load(folders / "table")
    dispatched = dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path / "elsewhere")
    assert_works(dispatched, expected, tmp_path / "dispatched")


@pytest.mark.parametrize("place", ["a layer", "the embedding", "everything"])
def test_experts_alone_on_a_backbone_with_parts_on_disk(place, folders, expected, tmp_path):
    """The experts are where the backbone computes: it is not to bring them."""
    where = device_map(AutoModelForCausalLM.from_pretrained(folders / "backbone"), PLACES[place])
    model = AutoModelForCausalLM.from_pretrained(
        folders / "alone", device_map=where, offload_folder=tmp_path / "offloaded"
    )
    assert all(not weight.is_meta for block in model.lookup_blocks for weight in block.parameters())
    assert_works(model, expected, tmp_path)


@pytest.mark.parametrize("form", ["experts", "table", "alone"])
def test_an_automatic_map_within_little_memory(form, folders, expected, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        folders / form,
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in model.hf_device_map.values()
    expected = logits_of(le.load(folders / form), IDS)
    assert_works(model, expected, tmp_path)


@pytest.mark.parametrize("form", ["experts", "table", "alone"])
@pytest.mark.parametrize("way", ["disk", "cpu", "nested"])
def test_everything_elsewhere(way, form, folders, tmp_path):
    """Three ways after which transformers by itself can't save any model."""
    model = le.load(folders / form)
    expected = logits_of(model, IDS)
    if way == "disk":
        disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    elif way == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        where = {"": "cpu", "model.layers": "disk"}
        dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path / "offloaded")
    assert_works(model, expected, tmp_path)


@pytest.mark.parametrize("place", ["a router", "all layers", "the embedding"])
def test_tied_embeddings(place, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    le.attach(model, 4, expert_size=16, init="normal")
    randomize_experts(model)
    expected = logits_of(model, IDS)
    elsewhere = [*PLACES[place], "lm_head"] if place == "the embedding" else PLACES[place]
    where = device_map(model, elsewhere)
    dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path / "offloaded")
    assert_works(model, expected, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=where, offload_folder=tmp_path / "again"
    )
    assert_works(loaded, expected, tmp_path / "loaded")


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gateless_llama"])
def test_other_families(family, tmp_path):
    """Mixtral's weights are saved in another shape than they have in memory."""
    model = attached_model(family)
    expected = logits_of(model, IDS)
    disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    assert_works(model, expected, tmp_path)


def test_bfloat16(tmp_path):
    attached_model().save_pretrained(tmp_path / "model")
    expected = logits_of(le.load(tmp_path / "model", dtype="bfloat16"), IDS)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",  # of float32: every weight is cast when it is brought
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": 30_000},
        offload_folder=tmp_path / "offloaded",
    )
    assert torch.equal(logits_of(model, IDS), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = le.load(tmp_path / "saved")
    assert saved.dtype == torch.bfloat16
    assert torch.equal(logits_of(saved, IDS), expected)
    assert fingerprint_of(model) == fingerprint_of(saved)


def test_generating_from_ids(folders, tmp_path):
    """Where the first weight is elsewhere, that is not where ids have to be."""
    here = le.load(folders / "table")
    model = disk_offload(
        le.load(folders / "table"), tmp_path / "offloaded", execution_device=torch.device("cpu")
    )
    assert model.device == torch.device("meta")
    sampling = Sampling(max_new_tokens=5, temperature=0)
    generated, expected = (generate_ids(each, [3, 1, 4], sampling) for each in (model, here))
    assert generated.token_ids == expected.token_ids


def test_attaching_to_a_backbone_with_parts_on_disk(folders, expected, tmp_path):
    where = device_map(
        AutoModelForCausalLM.from_pretrained(folders / "backbone"),
        ["model.layers.1", "model.embed_tokens"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folders / "backbone", device_map=where, offload_folder=tmp_path / "offloaded"
    )
    plain = logits_of(model, IDS)
    le.attach(model, 4, expert_size=16)
    assert torch.equal(logits_of(model, IDS), plain)
    randomize_experts(model)
    assert_works(model, expected, tmp_path)


def test_a_checkpoint_is_dispatched_as_it_is_loaded(folders, expected, tmp_path):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders / "experts"))
    where = device_map(le.load(folders / "experts"), ["model.layers.1"])
    model = load_checkpoint_and_dispatch(
        model,
        str(folders / "experts" / "model.safetensors"),
        device_map=where,
        offload_folder=tmp_path / "offloaded",
    )
    assert_works(model.eval(), expected, tmp_path)


def test_weights_that_are_brought_back_stay(folders, expected, tmp_path):
    model = le.load(folders / "experts")
    cpu_offload(model, execution_device=torch.device("cpu"))
    remove_hook_from_submodules(model)
    assert num_elsewhere(model) == 0
    assert torch.equal(logits_of(model, IDS), expected)


def test_weights_without_values_are_refused(folders, tmp_path):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders / "experts"))
    assert execution_device(model) == torch.device("meta")
    for use in (model.save_pretrained, lambda folder: le.reparameterize(model, folder)):
        with pytest.raises(UserError, match=r"has no values.*onto a device first"):
            use(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_have_the_names_and_dtypes_of_the_parameters(folders):
    here = le.load(folders / "experts")
    elsewhere = cpu_offload(le.load(folders / "experts"), execution_device=torch.device("cpu"))
    assert execution_device(elsewhere) == torch.device("cpu")
    assert [name for name, _ in named_weights(elsewhere)] == [n for n, _ in named_weights(here)]
    for (name, value), (_, wanted) in zip(
        named_weights(elsewhere), here.named_parameters(), strict=True
    ):
        assert torch.equal(value, wanted), name
    routers = state_with_values(elsewhere, lambda name: name.endswith("router.weight"))
    assert len(routers) == 3
    assert all(torch.equal(value, here.state_dict()[name]) for name, value in routers.items())


def test_adapters_on_offloaded_weights(folders, tmp_path, monkeypatch):
    """Merging brings the weights back to where accelerate keeps them."""
    monkeypatch.chdir(tmp_path)  # PEFT leaves a copy of the weights below the working directory
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    model = get_peft_model(le.load(folders / "experts"), config).eval()
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    options = {"device_map": "auto", "max_memory": {"cpu": 60_000}}
    base = AutoModelForCausalLM.from_pretrained(
        folders / "experts", **options, offload_folder=tmp_path / "offloaded"
    )
    adapted = PeftModel.from_pretrained(
        base, tmp_path / "adapter", **options, offload_folder=tmp_path / "again"
    )
    assert num_elsewhere(adapted) > 0
    torch.testing.assert_close(logits_of(adapted, IDS), expected, rtol=0, atol=5e-5)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(le.load(tmp_path / "merged"), IDS), expected, rtol=0, atol=5e-5
    )


@pytest.fixture
def fresh_state():
    """accelerate keeps for the whole process how it was first set up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
def test_a_prepared_model_trains_and_its_state_comes_back(tmp_path):
    """accelerate's own loop, in bfloat16, with a state that is saved and loaded."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = attached_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = logits_of(model, IDS)
    accelerator.save_state(tmp_path / "state")
    model.train()
    accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
    optimizer.step()
    model.eval()
    assert (logits_of(model, IDS) - before).abs().max() > 0.01
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "saved", state_dict=accelerator.get_state_dict(model)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loaded = logits_of(le.load(tmp_path / "saved"), IDS)
    torch.testing.assert_close(loaded.float(), logits_of(model, IDS), rtol=0, atol=1e-6)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(logits_of(model, IDS), before)
