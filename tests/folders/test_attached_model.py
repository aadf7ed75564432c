"""Attached models as Hugging Face models: saved, loaded, checkpointed, never taken for another."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import (
    attached_model,
    enable_checkpointing,
    gateless_model,
    logits_of,
    randomize_experts,
    tiny_model,
    token_ids,
)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.wiring import routed_experts

IDS = token_ids(2, 9)

# With converted weights (mixtral, qwen3_moe), tied embeddings (gpt2, gemma), a Conv1D, a tuple.
SAVED = [
    "llama",
    "gateless_llama",
    "qwen2",
    "gemma",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "phimoe",
    "gpt_oss",
]


@pytest.mark.parametrize("family", SAVED)
def test_a_saved_model_loads_as_itself(family, tmp_path):
    model = attached_model(family)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    assert loaded.lookup_settings == model.lookup_settings
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_names_of_saved_weights_are_the_backbone_names_and_ours(family, tmp_path):
    from lookup_experts.folders.model_folder import tensor_names

    backbone = tiny_model(family)
    backbone.save_pretrained(tmp_path / "backbone")
    attached_model(family).save_pretrained(tmp_path / "attached")
    names = tensor_names(tmp_path / "attached")
    ours = {name for name in names if ".lookup_experts." in name}
    assert names - ours == tensor_names(tmp_path / "backbone")
    assert len(ours) == 3 * 4


def test_a_tied_head_stays_tied(tmp_path):
    attached_model("gemma").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_many_small_files_load_as_one(tmp_path):
    model = attached_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))


def test_half_precision_is_kept(tmp_path):
    attached_model("llama").save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))


def test_a_loaded_model_can_be_saved_again(tmp_path):
    model = attached_model("llama", layers=[0, 2], expert_kind="swiglu")
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("first", "second")
    )
    assert first == second
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))


def test_missing_experts_of_a_checkpoint_start_silent(tmp_path):
    """A folder whose weights are the backbone's alone gives the backbone's logits."""
    backbone = tiny_model("llama")
    model = attached_model("llama")
    state = {key: value for key, value in model.state_dict().items() if "lookup_exp" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, IDS), logits_of(backbone, IDS))


def test_the_configuration_says_what_was_attached(tmp_path):
    attached_model("llama").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "lookup_experts"
    assert saved["backbone_type"] == "llama"
    assert saved["architectures"] == ["LookupExpertsLlamaForCausalLM"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlamaConfig)
    assert (config.model_type, config.hidden_size) == ("llama", 32)
    assert config.lookup_experts["num_experts"] == 4


def test_an_unknown_backbone_type_is_an_error(tmp_path):
    attached_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"backbone_type": "llama"', '"backbone_type": "lama"'))
    with pytest.raises(UserError, match="lama"):
        le.load(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path]:
    """A saved model with the logits it gives for `IDS`, and a table-form folder of it."""
    folder = tmp_path_factory.mktemp("saved")
    model = attached_model("llama")
    model.save_pretrained(folder / "training")
    le.reparameterize(model, folder / "table", encoding="float32")
    torch.save((IDS, logits_of(model, IDS)), folder / "logits.pt")
    return folder / "training", folder / "table"


LOAD_AND_COMPARE = """
import sys, torch
{imports}
torch.set_num_threads(1)  # as in the tests: the same sums in the same order
ids, expected = torch.load(sys.argv[2])
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids, use_cache=False).logits
print(float((logits - expected).abs().max()))
"""
IMPORTS = {
    "ours first": "import lookup_experts\nfrom transformers import AutoModelForCausalLM",
    "ours last": "from transformers import AutoModelForCausalLM\nimport lookup_experts",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_importing_the_package_is_all_that_a_fresh_process_needs(order, saved, run_python):
    code = LOAD_AND_COMPARE.format(imports=IMPORTS[order])
    form = saved[0] if order == "ours first" else saved[1]
    exit_code, out, err = run_python(code, form, form.parent / "logits.pt")
    assert exit_code == 0, err
    assert float(out) <= (0 if form == saved[0] else 1e-5)


WITHOUT_THE_PACKAGE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
for folder in sys.argv[1:]:
    for load in (
        AutoConfig.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        LlamaForCausalLM.from_pretrained,
        LlamaConfig.from_pretrained,
    ):
        try:
            load(folder)
        except Exception as error:
            print("refused", "import lookup_experts" in str(error), type(error).__name__)
        else:
            print("LOADED", folder, load.__qualname__, load.__self__)
"""


def test_without_the_package_nothing_takes_the_folder_for_a_plain_model(
    saved, run_python, tmp_path
):
    # A folder whose shapes are LlamaConfig's own defaults: only the configuration can tell.
    defaults = tmp_path / "defaults"
    config = attached_model("llama").config
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        setattr(config, name, getattr(LlamaConfig(), name))
    config.save_pretrained(defaults)
    exit_code, out, err = run_python(WITHOUT_THE_PACKAGE, *saved, defaults)
    assert exit_code == 0, err
    lines = out.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("refused") for line in lines), out


def test_a_plain_class_refuses_the_folder_even_with_the_package(saved):
    for folder in saved:
        with pytest.raises(Exception, match=r"import lookup_experts|num_hidden_layers"):
            LlamaForCausalLM.from_pretrained(folder)


# ----------------------------------------------------------------------- gradient checkpointing


def _is_checkpointing(model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _gradients(model, ids, between=None):
    """The gradients of a step; `between` is called after the forward and before the backward."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    if between is not None:
        between()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def _assert_same(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = attached_model(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = _gradients(model, IDS)
    enable_checkpointing(model, {"use_reentrant": False})
    assert _is_checkpointing(model)
    _assert_same(_gradients(model, IDS), plain)
    other = token_ids(3, 5, seed=8)

    def evaluate():
        with torch.no_grad():
            model(input_ids=other)

    _assert_same(_gradients(model, IDS, evaluate), plain)
    _assert_same(_gradients(model, IDS, lambda: model(input_ids=other)), plain)


def test_two_losses_can_be_summed_before_the_backward():
    model = attached_model("llama").train()
    other = token_ids(2, 7, seed=8)
    first, second = _gradients(model, IDS), _gradients(model, other)
    enable_checkpointing(model, {"use_reentrant": False})
    model.zero_grad()
    losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, other)]
    sum(losses).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, first[name] + second[name], rtol=1e-4, atol=1e-6)


def test_checkpointing_keeps_the_context_that_was_given():
    entered = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            pass

    model = attached_model("llama").train()
    contexts = lambda: (Noted("forward"), Noted("recompute"))  # noqa: E731
    enable_checkpointing(model, {"use_reentrant": False, "context_fn": contexts})
    _gradients(model, IDS)
    assert entered == ["forward"] * 3 + ["recompute"] * 3


def test_checkpointing_by_default_works():
    """transformers' own default is use_reentrant=False."""
    model = attached_model("llama").train()
    plain = _gradients(model, IDS)
    enable_checkpointing(model)
    _assert_same(_gradients(model, IDS), plain)


def test_reentrant_checkpointing_is_refused():
    model = attached_model("llama").train()
    with pytest.raises(UserError, match="needs use_reentrant=False"):
        enable_checkpointing(model, {"use_reentrant": True})
    assert not _is_checkpointing(model)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_checkpointing_under_its_older_name():
    model = attached_model("llama").train()
    plain = _gradients(model, IDS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    other = token_ids(1, 4)
    _assert_same(_gradients(model, IDS, lambda: model(input_ids=other)), plain)
    with pytest.raises(UserError, match="needs use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


# --------------------------------------------------------------------------------- the Trainer


def _train(model, folder, **arguments):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 6)]
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(model, TrainingArguments(**{**settings, **arguments}), train_dataset=rows)
    trainer.train(resume_from_checkpoint=arguments.get("max_steps", 2) > 2)
    return trainer


def test_checkpoints_of_the_trainer_load_and_resume(tmp_path):
    model = le.attach(tiny_model("llama"), 2, expert_size=8).train()
    before = [layer.down_proj.clone() for layer in routed_experts(model)]
    trainer = _train(model, tmp_path)
    layers = routed_experts(model)
    assert all(
        not torch.equal(layer.down_proj, old) for layer, old in zip(layers, before, strict=True)
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(logits_of(loaded, IDS), logits_of(model.eval(), IDS))
    assert trainer.state.global_step == 2
    assert _train(loaded.train(), tmp_path, max_steps=3).state.global_step == 3
    trainer.save_model(tmp_path / "final")
    assert torch.equal(logits_of(le.load(tmp_path / "final"), IDS), logits_of(model, IDS))


def test_a_model_under_fsdp_or_ddp_keeps_its_experts_in_the_block():
    """Experts are children of their block, so wrapping by block takes them along."""
    model = attached_model("llama")
    block = dict(model.model.layers[0].named_parameters())
    assert "mlp.lookup_experts.routed.up_proj" in block


def test_the_paper_backbone_saves_and_loads(tmp_path):
    model = gateless_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gateless_llama"
    loaded = le.load(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))


def test_attached_classes_are_made_once(tmp_path):
    first, second = attached_model("llama"), attached_model("llama", seed=3)
    assert type(first) is type(second)
    assert type(first.config) is type(second.config)
    randomize_experts(first, seed=5)
    assert not torch.equal(logits_of(first, IDS), logits_of(second, IDS))
