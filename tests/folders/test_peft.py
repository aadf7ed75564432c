"""PEFT on attached models: adapters and copies compute, learn, merge, and come back from disk."""

import copy
import json
import logging
from contextlib import nullcontext

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from tiny_models import (
    attached_model,
    greedy,
    greedy_reference,
    logits_of,
    randomize_experts,
    tiny_model,
    token_ids,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.shared_outputs import shared_expert_outputs

# PEFT uses what transformers will drop, and says of tied embeddings what a test here shows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
IDS = token_ids(2, 9)
UP_AND_DOWN = ["routed.up_proj", "routed.down_proj"]
CLOSE = {"rtol": 0, "atol": 5e-5}  # merging adds another way round
NOISY = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}

LORA = {
    "a block's experts": {"target_modules": ["q_proj"], "modules_to_save": ["lookup_experts"]},
    "routers": {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
    "routed experts": {"target_modules": ["q_proj"], "modules_to_save": ["routed"]},
    "their norm": {"target_modules": ["q_proj"], "modules_to_save": ["routed.norm"]},
    "a whole FFN": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows of the embedding": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": IDS[0].tolist()},
    },
    "all linear": {"target_modules": "all-linear"},
    "LoRA on routers": {"target_modules": ["router"]},
    "LoRA on expert weights": {"target_modules": [], "target_parameters": UP_AND_DOWN},
    "all of these": {"target_modules": "all-linear", "target_parameters": UP_AND_DOWN},
}


class Sequences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, number):
        ids = token_ids(9, seed=number)
        return {"input_ids": ids, "labels": ids}


def train(model, folder, resume=None, **arguments):
    """Four steps of transformers' Trainer, with a checkpoint after two and four."""
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    data = Sequences()
    Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data).train(
        resume_from_checkpoint=resume
    )
    return model.eval()


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


@torch.no_grad()
def shake(model, seed=5, scale=0.1):
    """Change whatever is to be trained."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)


def trained_names(model):
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def assert_trainable(model):
    """Whatever is to be trained gets a gradient."""
    model.train()
    loss_of(model).backward()
    without = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and (weight.grad is None or not weight.grad.any())
    ]
    assert without == []
    model.zero_grad()
    model.eval()


def assert_merges(model, folder, ids=IDS):
    """Merged, saved and loaded, and folded, the model says what it says with its adapters."""
    expected = logits_of(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, ids), expected, **CLOSE)
    merged.save_pretrained(folder / "merged")
    torch.testing.assert_close(logits_of(le.load(folder / "merged"), ids), expected, **CLOSE)
    if merged.lookup_settings.form == "experts":
        le.reparameterize(merged, folder / "folded", encoding="float32")
        torch.testing.assert_close(logits_of(le.load(folder / "folded"), ids), expected, **CLOSE)


def table_model(folder):
    if not (folder / "table-form").exists():
        le.reparameterize(attached_model(), folder / "table-form", encoding="float32")
    return le.load(folder / "table-form")


@pytest.mark.parametrize("what", LORA)
def test_what_peft_trains_learns_merges_and_comes_back(what, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(attached_model(), LoraConfig(**LORA[what], **NOISY))
    assert_trainable(model)
    before = {name: model.get_parameter(name).clone() for name in trained_names(model)}
    logits = logits_of(model, IDS)
    loss = float(loss_of(model))
    train(model, tmp_path / "run")
    for name, weight in before.items():
        assert not torch.equal(model.get_parameter(name), weight), name
    assert float(loss_of(model)) < loss
    expected = logits_of(model, IDS)
    assert (expected - logits).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(attached_model(), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, IDS), expected)
    assert_merges(model, tmp_path)


def test_a_copy_is_what_computes(tmp_path):
    """The original beside it may be anything, and comes back where the copy is switched off."""
    attached = attached_model()
    unchanged = logits_of(attached, IDS)
    model = get_peft_model(attached, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    wrapper = model.base_model.model.model.layers[1].mlp
    assert torch.equal(logits_of(model, IDS), unchanged)
    with torch.no_grad():
        wrapper.modules_to_save["default"].lookup_experts.routed.down_proj.mul_(2)
    assert not torch.equal(logits_of(model, IDS), unchanged)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, IDS), unchanged)
        with torch.no_grad():
            wrapper.original_module.lookup_experts.routed.down_proj.zero_()
        assert not torch.equal(logits_of(model, IDS), unchanged)


def test_gated_experts_have_a_third_weight(tmp_path):
    names = ["routed.gate_proj", *UP_AND_DOWN]
    model = get_peft_model(
        attached_model(expert_kind="swiglu"),
        LoraConfig(target_modules=["router"], target_parameters=names, **NOISY),
    )
    assert_trainable(model)
    assert_merges(model, tmp_path)


@pytest.mark.parametrize("family", ["gateless_llama", "gpt_neox", "mixtral", "gpt_oss", "bloom"])
def test_other_families(family, tmp_path):
    model = get_peft_model(
        attached_model(family),
        LoraConfig(target_modules="all-linear", target_parameters=UP_AND_DOWN, **NOISY),
    )
    routed = [name for name in trained_names(model) if ".routed." in name]
    assert len(routed) == 3 * 2 * 2  # blocks, weights, matrices of LoRA
    shake(model)
    assert_merges(model.eval(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(
            target_modules=["q_proj", "down_proj", "router"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        LoraConfig(target_modules="all-linear", use_dora=True, r=4),
        LoraConfig(target_modules="all-linear", use_rslora=True, r=4, init_lora_weights="olora"),
        LoHaConfig(target_modules=["q_proj", "router"], r=4, init_weights=False),
        LoKrConfig(target_modules=["q_proj", "router"], r=4, init_weights=False),
        OFTConfig(target_modules=["q_proj", "router"], r=4, oft_block_size=0, init_weights=False),
        VeraConfig(target_modules=["router"], r=4, init_weights=False),
    ],
    ids=["IA3", "DoRA", "rsLoRA", "LoHa", "LoKr", "OFT", "VeRA"],
)
def test_other_adapters_that_wrap(config, tmp_path):
    model = get_peft_model(attached_model(), config)
    shake(model)
    assert_trainable(model)
    assert_merges(model, tmp_path)


# -------------------------------------------------------------------------------- the embedding


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
    ],
    ids=["LoRA", "copy", "tied copy", "rows"],
)
def test_tied_embeddings_are_what_plain_peft_makes_of_them(how, tmp_path):
    """Merging may change what a tied head says; it does so with and without experts."""
    merged = []
    for with_experts in (False, True):
        model = tiny_model("llama", tie_word_embeddings=True)
        if with_experts:
            le.attach(model, 4, expert_size=16, init="normal")
            randomize_experts(model)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**how, **NOISY))
        shake(adapted)
        merged.append(adapted.merge_and_unload().eval())
    plain, attached = merged
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(attached.state_dict()[name], weight, rtol=0, atol=1e-6)
    expected = logits_of(attached, IDS)
    attached.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(le.load(tmp_path / "merged"), IDS), expected, **CLOSE)
    le.reparameterize(attached, tmp_path / "folded", encoding="float32")
    torch.testing.assert_close(logits_of(le.load(tmp_path / "folded"), IDS), expected, **CLOSE)


@pytest.mark.parametrize("moment", ["before", "after", "copied"])
def test_a_resized_embedding(moment, tmp_path):
    """New ids have experts as well: their rows are of the embedding as it is."""
    ids = token_ids(2, 9, vocab_size=120)
    config = LoraConfig(target_modules=["q_proj", "router"], **NOISY)
    model = attached_model()
    if moment == "after":
        model = get_peft_model(model, config)
        model.resize_token_embeddings(120)
    else:
        if moment == "copied":
            config.modules_to_save = ["embed_tokens", "lm_head"]
        model.resize_token_embeddings(120)
        model = get_peft_model(model, config)
    shake(model)
    expected = logits_of(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    fresh = attached_model()
    fresh.resize_token_embeddings(120)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded, ids), expected, **CLOSE)
    assert_merges(model, tmp_path, ids)


# ------------------------------------------------------------------------- training and switching


@pytest.mark.parametrize("what", ["a block's experts", "all of these", "LoRA on the embedding"])
def test_a_trainer_checkpoint_resumes_and_loads(what, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return get_peft_model(attached_model(), LoraConfig(**LORA[what], r=4))

    expected = logits_of(train(fresh(), tmp_path), IDS)
    resumed = train(fresh(), tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits_of(resumed, IDS), expected)
    loaded = PeftModel.from_pretrained(attached_model(), tmp_path / "checkpoint-4").eval()
    assert torch.equal(logits_of(loaded, IDS), expected)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(attached_model(), LoraConfig(**LORA["a block's experts"], r=4))
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    train(model, tmp_path, **arguments, metric_for_best_model="loss", greater_is_better=True)
    loaded = PeftModel.from_pretrained(attached_model(), tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits_of(model, IDS), logits_of(loaded, IDS))


@pytest.mark.parametrize("inputs_need_gradients", [False, True])
@pytest.mark.parametrize("what", ["a block's experts", "a whole FFN", "all of these"])
def test_gradients_are_the_same_with_checkpointing(what, inputs_need_gradients):
    def gradients(checkpointed):
        torch.manual_seed(0)
        model = get_peft_model(attached_model(), LoraConfig(**LORA[what], **NOISY))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if inputs_need_gradients:
                model.enable_input_require_grads()
        model.train()
        loss = loss_of(model)
        with torch.no_grad():
            model(input_ids=token_ids(1, 5, seed=9))  # its ids are not those to recompute with
        loss.backward()
        return {name: model.get_parameter(name).grad for name in trained_names(model)}

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cast", [True, False])
def test_bfloat16_models(cast, tmp_path):
    """The adapters are float32 or not; merging rounds, so that is a matter of plain PEFT."""
    attached_model().save_pretrained(tmp_path / "model")
    model = le.load(tmp_path / "model", dtype="bfloat16")
    config = LoraConfig(**LORA["all of these"], modules_to_save=["embed_tokens"], **NOISY)
    model = get_peft_model(model, config, autocast_adapter_dtype=cast)
    assert_trainable(model)
    logits = logits_of(model, IDS)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(le.load(tmp_path / "merged"), IDS), logits_of(merged, IDS))


def test_several_adapters_are_switched_and_disabled(tmp_path):
    attached = attached_model()
    unchanged = logits_of(attached, IDS)
    first = LoraConfig(target_modules="all-linear", modules_to_save=["routed"], **NOISY)
    second = LoraConfig(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["routed"], **NOISY
    )
    model = get_peft_model(attached, first, adapter_name="first")
    shake(model, 1)
    model.add_adapter("second", second)
    model.set_adapter("second")
    shake(model, 2)
    model.eval()
    expected = {}
    for name in ("second", "first"):
        model.set_adapter(name)
        expected[name] = logits_of(model, IDS)
        assert torch.equal(greedy(model, IDS[:1], 4), greedy_reference(model, IDS[:1], 4))
    assert (expected["first"] - expected["second"]).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits_of(model, IDS), unchanged)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(attached_model(), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.eval()
    for name in ("first", "second"):
        loaded.set_adapter(name)
        assert torch.equal(logits_of(loaded, IDS), expected[name])
    assert_merges(loaded, tmp_path)


def mixed_batch(base, **config):
    """Three sequences, each with an adapter of its own or none; and each by itself."""
    model = get_peft_model(base, LoraConfig(**config, **NOISY), adapter_name="first")
    model.add_adapter("second", LoraConfig(**config, **NOISY))
    model.eval()
    ids = token_ids(3, 7)
    with torch.no_grad():
        together = model(input_ids=ids, adapter_names=["second", "__base__", "first"]).logits
    model.set_adapter("second")
    apart = [logits_of(model, ids[:1])]
    with model.disable_adapter():
        apart.append(logits_of(model, ids[1:2]))
    model.set_adapter("first")
    apart.append(logits_of(model, ids[2:]))
    return together, torch.cat(apart)


@pytest.mark.parametrize("form", ["experts", "table"])
def test_a_batch_of_sequences_with_different_adapters(form, tmp_path):
    """Of PEFT, by `adapter_names`: on the backbone and the routers."""
    base = attached_model() if form == "experts" else table_model(tmp_path)
    together, apart = mixed_batch(base, target_modules="all-linear")
    torch.testing.assert_close(together, apart, **CLOSE)


def test_a_batch_with_different_embeddings_of_an_id_is_refused(tmp_path):
    """As many ids as sequences: PEFT itself would take one for the other."""
    for config in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ):
        with pytest.raises(UserError, match="one adapter at a time"):
            mixed_batch(attached_model(), **config)
    together, apart = mixed_batch(table_model(tmp_path), target_modules=["embed_tokens"])
    torch.testing.assert_close(together, apart, **CLOSE)  # a table's rows are the same for all


def test_accumulated_steps_share_the_outputs_of_copied_experts():
    batches = [token_ids(2, 6, seed=seed) for seed in range(3)]

    def gradients(shared):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "router"], modules_to_save=["routed"], r=4)
        model = get_peft_model(attached_model(), config).train()
        with shared_expert_outputs(model, batches) if shared else nullcontext():
            for ids in batches:
                model(input_ids=ids, labels=ids).loss.backward()
        return {name: model.get_parameter(name).grad for name in trained_names(model)}

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lookup_experts"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    ],
    ids=str,
)
def test_the_backbone_of_a_table_form_model(config, tmp_path):
    """Its rows stay those of the table; router, backbone and embedding are trained."""
    model = get_peft_model(table_model(tmp_path), LoraConfig(**config, **NOISY))
    shake(model)
    assert_trainable(model)
    expected = logits_of(model, IDS)
    assert torch.equal(greedy(model, IDS[:1], 4), greedy_reference(model, IDS[:1], 4))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(table_model(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, IDS), expected)
    assert_merges(model, tmp_path)


def test_a_quantised_backbone(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def fresh():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "backbone", quantization_config=quantised
        )
        le.attach(model, 4, expert_size=16, train_backbone=False, save="experts")
        randomize_experts(model)
        return model

    prepared = prepare_model_for_kbit_training(
        fresh(), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lookup_experts"], **NOISY)
    model = get_peft_model(prepared, config)
    shake(model)
    assert_trainable(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded, IDS), logits_of(model, IDS), **CLOSE)


def test_adapters_on_the_experts_of_a_model_that_saves_these_alone(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    le.attach(attached, 4, expert_size=16, train_backbone=False, save="experts")
    randomize_experts(attached)
    config = LoraConfig(target_modules=["router"], target_parameters=UP_AND_DOWN, **NOISY)
    model = get_peft_model(attached, config)
    assert_merges(model.eval(), tmp_path)
    assert len(load_file(tmp_path / "merged" / "model.safetensors")) == 12  # 4 weights in 3 blocks


# ------------------------------------------------------------------------- who is told, and refused


def frozen_warnings(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "lookup_experts" and "routed experts" in record.getMessage()
    ]


@pytest.mark.parametrize(
    ("what", "warned"),
    [
        ("all linear", True),
        ("routers", True),
        ("the embedding", True),
        ("a block's experts", False),
        ("a whole FFN", False),
        ("their norm", False),
        ("LoRA on expert weights", False),
    ],
)
def test_who_trains_adapters_is_told_once_of_experts_that_stay_frozen(what, warned, caplog):
    model = get_peft_model(attached_model(), LoraConfig(**LORA[what], **NOISY))
    model.eval()
    assert frozen_warnings(caplog) == []
    for _ in range(2):
        model.train()
        loss_of(model).backward()
        model.eval()
    assert len(frozen_warnings(caplog)) == warned


def test_the_warning_names_the_weights_that_there_are(caplog):
    for kind, names in (("gelu", UP_AND_DOWN), ("swiglu", ["routed.gate_proj", *UP_AND_DOWN])):
        caplog.clear()
        model = attached_model(expert_kind=kind)
        get_peft_model(model, LoraConfig(**LORA["all linear"])).train()
        (message,) = frozen_warnings(caplog)
        assert f"target_parameters={names}" in message
        assert 'modules_to_save=["lookup_experts"]' in message


def test_the_warning_names_the_modules_of_a_form_that_has_some(caplog, tmp_path):
    model = attached_model(form="meki", num_experts=1, expert_size=None, row_size=6)
    config = LoraConfig(target_modules=["q_proj"], **NOISY)
    get_peft_model(copy.deepcopy(model), config).train()
    (message,) = frozen_warnings(caplog)
    named = ["routed.gate_proj", "routed.up_proj", "routed.down_proj"]
    assert f"target_modules={named}" in message
    caplog.clear()
    adapted = get_peft_model(model, LoraConfig(target_modules=named, **NOISY))
    adapted.train()
    assert frozen_warnings(caplog) == []
    assert_merges(adapted.eval(), tmp_path, IDS)


def test_nobody_else_is_told(caplog, tmp_path):
    caplog.set_level(logging.INFO, "lookup_experts")
    attached_model().train()
    model = get_peft_model(attached_model(), LoraConfig(**LORA["all linear"]))
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(attached_model(), tmp_path / "adapter").train()  # trains nothing
    get_peft_model(table_model(tmp_path), LoraConfig(**LORA["all linear"])).train()
    assert frozen_warnings(caplog) == []


@pytest.mark.parametrize("what", ["all linear", "a whole FFN", "LoRA on expert weights"])
def test_unmerged_adapters_are_neither_saved_nor_folded_with_the_model(what, tmp_path):
    model = get_peft_model(attached_model(), LoraConfig(**LORA[what], **NOISY))
    base = model.get_base_model()
    for given in (model, base):
        with pytest.raises(UserError, match=r"can't be folded.*merge_and_unload\(\)"):
            le.reparameterize(given, tmp_path / "folded")
    with pytest.raises(UserError, match=r"can't be saved.*layers\.0\..*merge_and_unload\(\)"):
        base.save_pretrained(tmp_path / "saved")
    model.merge_adapter()  # the weights are merged, the names are still PEFT's
    with pytest.raises(UserError, match=r"can't be saved.*merge_and_unload\(\)"):
        base.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    assert_merges(model, tmp_path)


def test_unmerged_adapters_of_a_table_form_model_are_not_saved_with_it(tmp_path):
    model = get_peft_model(table_model(tmp_path), LoraConfig(**LORA["all linear"], **NOISY))
    with pytest.raises(UserError, match="can't be saved"):
        model.get_base_model().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_adapter_that_peft_leaves_behind_is_not_saved(tmp_path):
    """Of a mixture "all-linear" names every parameter down_proj, the copied experts' as well;
    unloading then leaves those adapters in the copy."""
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lookup_experts"], **NOISY)
    merged = get_peft_model(attached_model("mixtral"), config).merge_and_unload()
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.lookup_experts\.routed is one"):
        merged.save_pretrained(tmp_path / "saved")
    named = LoraConfig(target_modules=["q_proj"], modules_to_save=["lookup_experts"], **NOISY)
    assert_merges(get_peft_model(attached_model("mixtral"), named).eval(), tmp_path)


def test_a_folder_of_adapters_is_no_model(tmp_path):
    get_peft_model(attached_model(), LoraConfig(**LORA["all linear"])).save_pretrained(tmp_path)
    for use in (le.load, lambda folder: le.reparameterize(folder, tmp_path / "folded")):
        with pytest.raises(UserError, match=r"holds adapters.*PeftModel\.from_pretrained"):
            use(tmp_path)


@pytest.mark.parametrize("form", ["experts", "table"])
def test_a_folder_of_adapters_finds_its_model(form, tmp_path):
    """By the name that it was loaded by, through transformers' and PEFT's automatic classes."""
    attached_model().save_pretrained(tmp_path / "model")
    if form == "table":
        le.reparameterize(tmp_path / "model", tmp_path / "folded", encoding="float32")
    base = le.load(tmp_path / ("model" if form == "experts" else "folded"))
    model = get_peft_model(base, LoraConfig(**LORA["all linear"], **NOISY))
    shake(model)
    expected = logits_of(model.eval(), IDS)
    model.save_pretrained(tmp_path / "adapter")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(by_transformers, IDS), expected)
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    allowed = [stated["parent_library"]]  # without a task type PEFT asks for it
    by_class = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=allowed)
    assert torch.equal(logits_of(by_class, IDS), expected)
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "adapter")
    by_task = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(by_task, IDS), expected)


def test_prompts_that_are_no_token_ids_are_refused():
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(attached_model(), prompt)
    with pytest.raises(UserError, match="needs input_ids"):
        loss_of(model)


def test_prefixes_of_the_attention_are_trained():
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert_trainable(get_peft_model(attached_model(), prefix))
