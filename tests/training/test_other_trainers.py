"""Lookup experts in trainers that know nothing of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits_of, randomize_experts, tiny_model, token_ids
from tiny_runs import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lookup_experts as le
from lookup_experts.errors import UserError

IDS = token_ids(4, 16)


def saved_backbone(folder: Path, **config: Any) -> Path:
    tiny_model("llama", **config).save_pretrained(folder)
    return folder


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }


def num_trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def num_moments(trainer: Trainer) -> int:
    return sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())


def test_the_trainer_saves_experts_alone_and_resumes_from_them(tmp_path):
    folder = saved_backbone(tmp_path / "backbone")
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def trained(out: Path, resume: bool) -> tuple[Trainer, Any]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        le.attach(model, 2, layers="every:2", train_backbone=False, save="experts")
        trainer = Trainer(model, TrainingArguments(**arguments(out)), train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2") if resume else None)
        return trainer, model.eval()

    trainer, model = trained(tmp_path / "run", resume=False)
    assert num_moments(trainer) == num_trained(model)
    backbone_bytes = (folder / "model.safetensors").stat().st_size
    weights = tmp_path / "run/checkpoint-2/model.safetensors"
    assert weights.stat().st_size < 4 * num_trained(model) + 4096 < backbone_bytes
    _, resumed = trained(tmp_path / "resumed", resume=True)
    assert torch.equal(logits_of(resumed, IDS), logits_of(model, IDS))
    trainer.save_model(str(tmp_path / "experts"))
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))


# TRL sets it by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_with_prompts_that_are_masked(tmp_path):
    """TRL's SFTTrainer, its gradient checkpointing on, as it is by default."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer"))
    tokenizer.pad_token = tokenizer.eos_token
    folder = saved_backbone(tmp_path / "backbone", vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder)
    le.attach(model, 2, train_backbone=False, save="experts")
    rows = [{"prompt": f"one two {word}", "completion": f" three {word}"} for word in ("a", "beta")]
    config = trl.SFTConfig(
        **arguments(tmp_path / "run", max_steps=12, bf16=False),
        completion_only_loss=True,
        packing=False,
    )
    trainer = trl.SFTTrainer(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any() and (batch["labels"] != -100).any()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert num_moments(trainer) == num_trained(model)
    trainer.save_model(str(tmp_path / "experts"))
    ids = token_ids(2, 9)
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), ids), logits_of(model.eval(), ids))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_sft_with_adapters(tmp_path):
    """TRL puts PEFT's adapters on by itself: here LoRA on the backbone, and the experts' copies."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer"))
    tokenizer.pad_token = tokenizer.eos_token
    folder = saved_backbone(tmp_path / "backbone", vocab_size=len(tokenizer))
    model = le.attach(AutoModelForCausalLM.from_pretrained(folder), 2)
    rows = [{"text": f"one two {word} three {word}"} for word in ("a", "beta")]
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments(tmp_path / "run", max_steps=12, bf16=False)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            target_modules="all-linear", modules_to_save=["lookup_experts"], r=4
        ),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    ids = token_ids(2, 9)
    expected = logits_of(trainer.model.eval(), ids)
    le.reparameterize(trainer.model.merge_and_unload(), tmp_path / "folded", encoding="float32")
    found = logits_of(le.load(tmp_path / "folded"), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_backbone_under_trained_experts(tmp_path, kind):
    """bitsandbytes on the CPU; experts in float32, bfloat16 by autocast."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    how = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    # On AVX-512, bitsandbytes wants rows of whole blocks.
    folder = saved_backbone(tmp_path / "backbone", hidden_size=64, intermediate_size=128)
    load = {"quantization_config": how, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder, **load)
    with pytest.raises(UserError, match="is quantised: its experts are saved without it"):
        le.attach(model)
    le.attach(model, 2, train_backbone=False, save="experts")
    with torch.autocast("cpu", torch.bfloat16):
        # Where AVX512-BF16 is, 4-bit layers take another kernel in evaluation mode.
        plain = AutoModelForCausalLM.from_pretrained(folder, **load).train(kind == "nf4")
        before = logits_of(plain, IDS)
    for module in model.lookup_blocks:
        module.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(model, IDS), before)
    frozen = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if ".lookup_experts." not in name
    }
    settings = TrainingArguments(**arguments(tmp_path / "run", max_steps=10, bf16=True))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert num_moments(trainer) == num_trained(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert type(model.model.layers[0].mlp.lookup_experts.router) is torch.nn.Linear
    trainer.save_model(str(tmp_path / "experts"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model.eval(), IDS)
        # With the same quantisation the same model but for experts in bfloat16 ...
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", **load)
        difference = logits_of(quantised, IDS).float() - expected.float()
        assert difference.norm() < 0.05 * expected.float().norm()
    # ... and without being told, the backbone as it is in its folder.
    assert not hasattr(le.load(tmp_path / "experts").config, "quantization_config")


def test_layers_packed_for_inference_are_refused(tmp_path):
    """No gradient would pass through them; only processors with AVX512-BF16 pack."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import has_avx512bf16
    from transformers import BitsAndBytesConfig

    if not has_avx512bf16():
        pytest.skip("needs a processor with AVX512-BF16")
    folder = saved_backbone(tmp_path / "backbone", hidden_size=64, intermediate_size=128)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    before = logits_of(model, IDS)
    with pytest.raises(UserError, match=r"evaluated before.*Load the model anew"):
        le.attach(model, 2, train_backbone=False, save="experts")
    assert torch.equal(logits_of(model, IDS), before)


def test_a_backbone_that_comes_quantised_is_folded_and_stays_where_it_is(tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    folder = saved_backbone(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).save_pretrained(
        tmp_path / "backbone"
    )
    model = le.load(tmp_path / "backbone")
    le.attach(model, 2, train_backbone=False, save="experts")
    randomize_experts(model)
    model.save_pretrained(tmp_path / "experts")
    le.reparameterize(tmp_path / "experts", tmp_path / "folded", encoding="float32")
    folded = le.load(tmp_path / "folded")
    assert type(folded.model.layers[0].mlp.up_proj) is Linear4bit
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model.eval(), IDS))
    folded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits_of(le.load(tmp_path / "again"), IDS), logits_of(folded, IDS))
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model, IDS))
    (tmp_path / "backbone").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no folder here"):
        le.load(tmp_path / "folded")
