"""Models and configurations that are pickled, copied and sent to other processes, whole or in
parts, at rest or at work."""

import copy
import io
import multiprocessing
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import tell_logits
from tiny_models import (
    attached_model,
    enable_checkpointing,
    gateless_model,
    logits_of,
    moe_model,
    randomize_experts,
    tiny_model,
    token_ids,
)
from transformers import AutoConfig, AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import TableError
from lookup_experts.model.router_losses import add_router_losses
from lookup_experts.model.shared_outputs import shared_expert_outputs

IDS = token_ids(2, 9)


def _through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": _through_pickle, "torch.save": _through_torch_save, "deepcopy": copy.deepcopy}


def _with_router_losses() -> Any:
    model = attached_model("llama")
    add_router_losses(model, 1, 0.01, 0.001)
    return model


def _checkpointed() -> Any:
    model = attached_model("llama")
    enable_checkpointing(model, {"use_reentrant": False})
    return model


def _checkpointed_mixture() -> Any:
    model = moe_model()
    enable_checkpointing(model, {"use_reentrant": False})
    return model


MODELS = {
    "llama": lambda: attached_model("llama"),
    "gpt2": lambda: attached_model("gpt2"),  # a tied head, a Conv1D
    "gpt_oss": lambda: attached_model("gpt_oss"),  # a tuple
    "gateless_llama": lambda: attached_model("gateless_llama"),
    "swiglu": lambda: attached_model("llama", expert_kind="swiglu", layers=[0, 2]),
    "router losses": _with_router_losses,
    "checkpointed": _checkpointed,
    "paper backbone": gateless_model,
    "mixture": moe_model,
    "checkpointed mixture": _checkpointed_mixture,
}


def _assert_same_model(found: Any, model: Any) -> None:
    assert type(found) is type(model)
    assert type(found.config) is type(model.config)
    assert found.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits_of(found, IDS), logits_of(model, IDS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back_as_itself(kind, way):
    model = MODELS[kind]()
    _assert_same_model(WAYS[way](model), model)


@pytest.mark.parametrize("kind", ["llama", "router losses", "checkpointed", "mixture"])
def test_what_came_back_trains_as_the_model_does(kind):
    model = MODELS[kind]().train()
    found = _through_pickle(model)
    for each in (model, found):
        each(input_ids=IDS, labels=IDS).loss.backward()
    weights = dict(model.named_parameters())
    for name, weight in found.named_parameters():
        assert torch.equal(weight.grad, weights[name].grad), name


def test_hooks_of_checkpointing_can_be_taken_from_what_came_back():
    model = _checkpointed()
    model.requires_grad_(False)
    found = _through_pickle(model)
    assert found.get_input_embeddings()(IDS).requires_grad
    found.disable_input_require_grads()
    assert not found.get_input_embeddings()(IDS).requires_grad
    assert model.get_input_embeddings()(IDS).requires_grad


# ------------------------------------------------------------------------------ folders and tables


def test_a_model_in_table_form_reopens_its_table(table_folder, tmp_path):
    shutil.copytree(table_folder, tmp_path / "model")
    model = le.load(tmp_path / "model")
    written = pickle.dumps(model)
    assert len(written) < 2 * sum(weight.nbytes for weight in model.state_dict().values())
    _assert_same_model(pickle.loads(written), model)
    assert pickle.loads(written).expert_source is not model.expert_source
    _assert_same_model(_through_torch_save(model), model)
    _assert_same_model(copy.deepcopy(model), model)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(TableError, match="no such folder"):
        pickle.loads(written)


def _with_experts_alone(folder: Path) -> Any:
    tiny_model().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    le.attach(model, 2, train_backbone=False, save="experts")
    randomize_experts(model)
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_refers_to_its_backbone_still_does(way, tmp_path):
    model = _with_experts_alone(tmp_path / "backbone")
    found = WAYS[way](model)
    _assert_same_model(found, model)
    found.save_pretrained(tmp_path / "experts")
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))


def _quantised(folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    tiny_model().save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4)
    le.attach(model, 2, train_backbone=False, save="experts")
    randomize_experts(model)
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_model_comes_back_trainable(way, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = _quantised(tmp_path)
    found = WAYS[way](model)
    _assert_same_model(found, model)
    assert type(found.hf_quantizer) is type(model.hf_quantizer)
    assert found.hf_quantizer.is_qat_trainable
    found(input_ids=IDS, labels=IDS).loss.backward()
    assert found.lookup_blocks[0].router.weight.grad.abs().sum() > 0


CONFIGURATIONS = {
    "attached": lambda folder: attached_model("llama").config,
    "attached mixture": lambda folder: attached_model("mixtral").config,
    "paper backbone": lambda folder: gateless_model().config,
    "mixture": lambda folder: moe_model().config,
    "read from a folder": AutoConfig.from_pretrained,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_configuration_comes_back_as_itself(kind, way, training_folder):
    config = CONFIGURATIONS[kind](training_folder)
    found = WAYS[way](config)
    assert type(found) is type(config)
    assert found.to_json_string() == config.to_json_string()


class ModelOfAUser(type(attached_model("llama"))):
    """Made out of a made class, but by the usual statement."""


def test_a_class_that_was_derived_from_ours_is_found_by_its_name():
    assert _through_pickle(ModelOfAUser) is ModelOfAUser
    model = attached_model("llama")
    model.__class__ = ModelOfAUser
    _assert_same_model(_through_pickle(model), model)


# --------------------------------------------------------------------------------- other processes


@pytest.mark.timeout(400)  # it imports all of it
def test_a_spawned_process_takes_models_and_configurations(table_folder, tmp_path):
    models = {name: make() for name, make in MODELS.items()}
    models["table"] = le.load(table_folder)
    models["experts alone"] = _with_experts_alone(tmp_path)
    configs = [model.config for model in models.values()]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=tell_logits, args=(models, IDS, configs, answers))
    process.start()
    logits, texts = answers.get(timeout=300)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert texts == [config.to_json_string() for config in configs]
    for name, model in models.items():
        assert torch.equal(torch.from_numpy(logits[name]), logits_of(model, IDS)), name


# ----------------------------------------------------------------------------------- models at work


@pytest.mark.parametrize("way", WAYS)
def test_nobody_observes_a_copy(way):
    model = attached_model("llama")
    seen: list[int] = []
    model.lookup_entrance.observe = lambda layer, weights: seen.append(layer)
    found = WAYS[way](model)
    logits_of(found, IDS)
    assert seen == []
    logits_of(model, IDS)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_copied_in_the_middle_of_its_forward_pass(way):
    model = attached_model("llama")
    expected = logits_of(model, IDS)
    other = token_ids(1, 5, seed=3)
    alone = logits_of(model, other)
    taken: list[Any] = []

    def take(module: Any, args: Any) -> None:
        handle.remove()  # a function of a function can't be pickled
        taken.append(WAYS[way](model))
        assert torch.equal(logits_of(taken[0], other), alone)  # and used at once

    handle = model.model.layers[1].register_forward_pre_hook(take)
    assert torch.equal(logits_of(model, IDS), expected)
    assert torch.equal(logits_of(taken[0], IDS), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "checkpointed", "router losses"])
def test_a_model_copied_between_forward_and_backward(kind, way):
    model = MODELS[kind]().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    found = WAYS[way](model)
    found(input_ids=token_ids(1, 4), labels=token_ids(1, 4)).loss.backward()
    loss.backward()
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, expected[name]), name
    found.zero_grad()
    found(input_ids=IDS, labels=IDS).loss.backward()
    for name, weight in found.named_parameters():
        assert torch.equal(weight.grad, expected[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_a_model_copied_between_micro_batches_that_share_outputs(way):
    model = attached_model("llama").train()
    expected = logits_of(model, IDS)
    batches = [token_ids(2, 5, seed=1), token_ids(2, 5, seed=2)]
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
    plain = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    with shared_expert_outputs(model, batches):
        model(input_ids=batches[0], labels=batches[0]).loss.backward()
        found = WAYS[way](model)
        assert torch.equal(logits_of(found, IDS), expected)
        found(input_ids=IDS, labels=IDS).loss.backward()  # a micro batch of its own
        model(input_ids=batches[1], labels=batches[1]).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-4, atol=1e-6)


PARTS = {
    "block": "model.layers.1",
    "FFN": "model.layers.1.mlp",
    "lookup_experts": "model.layers.1.mlp.lookup_experts",
    "router": "model.layers.1.mlp.lookup_experts.router",
    "experts": "model.layers.1.mlp.lookup_experts.routed",
    "base model": "model",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_copied_alone_takes_the_place_of_the_first(part, way):
    model = attached_model("llama")
    expected = logits_of(model, IDS)
    found = WAYS[way](model.get_submodule(PARTS[part]))
    model.set_submodule(PARTS[part], found)
    assert torch.equal(logits_of(model, IDS), expected)
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(0.5)
    assert not torch.equal(logits_of(model, IDS), expected)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in found.parameters())


def test_blocks_of_a_table_model_are_copied_alone(table_folder):
    model = le.load(table_folder)
    expected = logits_of(model, IDS)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    model.model.layers[2].mlp = _through_pickle(model.model.layers[2].mlp)
    assert torch.equal(logits_of(model, IDS), expected)


def _in_threads(works: list[Any]) -> list[Any]:
    """What functions return that are called by a thread each, many times, together."""
    found: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def work(number: int) -> None:
        start.wait()
        found[number] = [works[number]() for _ in range(8)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("form", ["training", "table"])
def test_threads_use_one_model_at_once(form, training_folder, table_folder):
    model = le.load(training_folder if form == "training" else table_folder)
    batches = [token_ids(number + 1, 5 + number, seed=number) for number in range(6)]
    expected = [logits_of(model, ids) for ids in batches]
    found = _in_threads([lambda ids=ids: logits_of(model, ids) for ids in batches])
    for logits, alike in zip(expected, found, strict=True):
        assert all(torch.equal(each, logits) for each in alike)


@pytest.mark.parametrize("kind", ["llama", "checkpointed"])
def test_threads_take_gradients_of_one_model_at_once(kind):
    model = MODELS[kind]().train()
    weights = [block.router.weight for block in model.lookup_blocks]
    batches = [token_ids(2, 4 + number, seed=number) for number in range(4)]

    def gradients(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)

    expected = [gradients(ids) for ids in batches]
    found = _in_threads([lambda ids=ids: gradients(ids) for ids in batches])
    for grads, alike in zip(expected, found, strict=True):
        for each in alike:
            assert all(map(torch.equal, each, grads))


# ------------------------------------------------------------------- classes that others make of it


SHARDED = """
import pickle, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny_models import attached_model, logits_of, token_ids
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=0, world_size=1)
ids = token_ids(2, 9)
model = attached_model("llama")
plain, expected = type(model), logits_of(model, ids)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
assert type(model) is not plain and isinstance(model, plain), type(model)
assert torch.equal(logits_of(model, ids), expected)
model(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None for n, p in model.named_parameters() if ".lookup_experts." in n)
assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
weights = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
model.save_pretrained(f"{sys.argv[1]}/saved", state_dict=weights)
copied = pickle.loads(pickle.dumps(attached_model("llama")))
assert type(copied) is plain
torch.save(expected, f"{sys.argv[1]}/logits.pt")
dist.destroy_process_group()
"""


def test_the_class_that_fsdp_makes_of_ours(run_python, tmp_path):
    code, _, errors = run_python(SHARDED, tmp_path, timeout=110)
    assert code == 0, errors
    loaded = le.load(tmp_path / "saved")
    assert type(loaded).__name__ == "LookupExpertsLlamaForCausalLM"
    assert torch.equal(logits_of(loaded, IDS), torch.load(tmp_path / "logits.pt"))
