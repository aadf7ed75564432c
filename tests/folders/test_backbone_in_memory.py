"""Experts that are saved alone, from a backbone that is or isn't what it was; and their Trainer."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, logits_of, randomize_experts, tiny_model, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lookup_experts as le
from lookup_experts.errors import UserError

IDS = token_ids(2, 9)

# PEFT asks for things under their older names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def saved_backbone(folder: Path, family: str = "llama", **config: Any) -> Path:
    tiny_model(family, **config).save_pretrained(folder)
    return folder


def on_backbone(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    le.attach(model, 2, train_backbone=False, save="experts")
    randomize_experts(model)
    return model.eval()


@pytest.fixture
def model(tmp_path):
    """A model whose experts are saved alone; its backbone is in the folder `backbone`."""
    return on_backbone(saved_backbone(tmp_path / "backbone"))


# -------------------------------------------------------------------------- a backbone that changed


def merge_an_adapter(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings).merge_and_unload()


def add_a_bias(model: Any) -> Any:
    bias = torch.nn.Parameter(torch.ones(32), requires_grad=False)
    model.model.layers[2].self_attn.q_proj.bias = bias
    return model


def give_embedding_rows(model: Any) -> Any:
    model.resize_token_embeddings(120)
    return model


def train_and_freeze_again(model: Any) -> Any:
    weight = model.model.layers[1].self_attn.k_proj.weight.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW([weight], lr=1e-3).step()
    weight.requires_grad_(False)
    return model


def load_other_weights(model: Any) -> Any:
    model.load_state_dict(tiny_model("llama", seed=5).state_dict(), strict=False)
    return model


def change_one_norm(model: Any) -> Any:
    with torch.no_grad():
        model.model.norm.weight += 1e-4
    return model


def replace_a_projection(model: Any) -> Any:
    model.model.layers[0].self_attn.o_proj = torch.nn.Identity()
    return model


def round_and_widen(model: Any) -> Any:
    return model.bfloat16().float()


CHANGES = {
    merge_an_adapter: r"layers\.0\.self_attn\.q_proj\.weight has other values",
    add_a_bias: r"layers\.2\.self_attn\.q_proj\.bias is new",
    give_embedding_rows: r"embed_tokens\.weight is of shape \(120, 32\), it was \(97, 32\)",
    train_and_freeze_again: r"layers\.1\.self_attn\.k_proj\.weight has other values",
    load_other_weights: "has other values",
    change_one_norm: r"model\.norm\.weight has other values",
    replace_a_projection: r"layers\.0\.self_attn\.o_proj\.weight is gone",
    round_and_widen: "has other values",
}


@pytest.mark.parametrize("came_from", ["attach", "load"])
@pytest.mark.parametrize("change", CHANGES)
def test_experts_of_a_backbone_that_changed_are_not_saved_alone(change, came_from, model, tmp_path):
    if came_from == "load":
        model.save_pretrained(tmp_path / "first")
        model = le.load(tmp_path / "first")
    changed = change(model)
    with pytest.raises(UserError, match=CHANGES[change]) as refused:
        changed.save_pretrained(tmp_path / "experts")
    said = str(refused.value)
    assert "\n" not in said
    assert str(tmp_path / "backbone") in said
    assert 'model.save_pretrained(folder, save="full")' in said
    assert not (tmp_path / "experts").exists()


def test_an_adapter_that_isnt_merged_is_not_left_out(model, tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"]))
    model.requires_grad_(False)
    with pytest.raises(UserError, match="with adapters that aren't merged"):
        model.save_pretrained(tmp_path / "experts")


@pytest.mark.parametrize(
    "change", [merge_an_adapter, give_embedding_rows, train_and_freeze_again, change_one_norm]
)
def test_they_are_saved_in_full(change, model, tmp_path):
    changed = change(model).eval()
    changed.save_pretrained(tmp_path / "full", save="full")
    loaded = le.load(tmp_path / "full")
    assert torch.equal(logits_of(loaded, IDS), logits_of(changed, IDS))
    assert loaded.lookup_settings.backbone is None
    loaded.save_pretrained(tmp_path / "again")  # what is in full stays in full
    assert torch.equal(logits_of(le.load(tmp_path / "again"), IDS), logits_of(changed, IDS))


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma"])  # converted names, tied heads
def test_a_backbone_of_any_family_is_saved_in_full(family, tmp_path):
    first = on_backbone(saved_backbone(tmp_path / "backbone", family))
    first.save_pretrained(tmp_path / "experts")
    model = change_one_layer(le.load(tmp_path / "experts"))
    with pytest.raises(UserError, match="has other values"):
        model.save_pretrained(tmp_path / "experts")
    model.save_pretrained(tmp_path / "full", save="full")
    assert torch.equal(logits_of(le.load(tmp_path / "full"), IDS), logits_of(model, IDS))
    le.reparameterize(model, tmp_path / "table", encoding="float32")  # in full as well
    torch.testing.assert_close(logits_of(le.load(tmp_path / "table"), IDS), logits_of(model, IDS))


def change_one_layer(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if re.search(r"\.1\..*norm|ln_1", name):
                weight += 0.1
    return model


def test_saving_in_full_is_for_once(model, tmp_path):
    model.save_pretrained(tmp_path / "model", save="full")
    in_full = (tmp_path / "model" / "model.safetensors").stat().st_size
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < in_full
    assert le.load(tmp_path / "model").lookup_settings.backbone is not None
    model.save_pretrained(tmp_path / "model", save="experts")
    assert torch.equal(logits_of(le.load(tmp_path / "model"), IDS), logits_of(model, IDS))


def test_what_save_can_be(model, tmp_path):
    with pytest.raises(UserError, match="fulll"):
        model.save_pretrained(tmp_path / "saved", save="fulll")
    with pytest.raises(UserError, match="refers to no backbone"):
        le.attach(tiny_model()).save_pretrained(tmp_path / "saved", save="experts")
    with pytest.raises(UserError, match="Experts alone can't be saved with push_to_hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_backbones_that_are_what_they_were_are_left_out(family, tmp_path):
    model = on_backbone(saved_backbone(tmp_path / "backbone", family))
    model.save_pretrained(tmp_path / "experts")
    model.train()(input_ids=IDS, labels=IDS)
    model.eval().save_pretrained(tmp_path / "experts")
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_a_backbone_may_be_cast(stored, loaded, saved, tmp_path):
    """Once, to what it would also be loaded in."""
    tiny_model().to(stored).save_pretrained(tmp_path / "backbone")
    model = on_backbone(tmp_path / "backbone", dtype=loaded).to(saved)
    model.save_pretrained(tmp_path / "experts")


def test_a_cast_doesnt_hide_a_change(model, tmp_path):
    changed = merge_an_adapter(model).bfloat16()
    with pytest.raises(UserError, match="has other values"):
        changed.save_pretrained(tmp_path / "experts")


def test_numbers_that_are_none_are_equal_to_themselves(tmp_path):
    backbone = tiny_model()
    with torch.no_grad():
        backbone.model.norm.weight[0] = torch.nan
    backbone.save_pretrained(tmp_path / "backbone")
    on_backbone(tmp_path / "backbone").save_pretrained(tmp_path / "experts")


def test_a_state_dict_that_was_given_is_looked_at(model, tmp_path):
    """As FSDP has it, where the model itself holds nothing that could be compared."""
    state = dict(model.state_dict())
    model.save_pretrained(tmp_path / "experts", state_dict=state)
    assert torch.equal(logits_of(le.load(tmp_path / "experts"), IDS), logits_of(model, IDS))
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head\.weight has other values"):
        model.save_pretrained(tmp_path / "other", state_dict=state)


def test_parameters_without_values_are_passed_over(model, tmp_path):
    """As accelerate leaves those that it has put on a disk."""
    model.model.layers[0].self_attn.to("meta")
    model.save_pretrained(tmp_path / "experts")
    assert le.load(tmp_path / "experts").lookup_settings == model.lookup_settings


def test_a_quantised_backbone_stays_what_it_is(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = on_backbone(saved_backbone(tmp_path / "backbone"), quantization_config=nf4)
    model.save_pretrained(tmp_path / "experts")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", quantization_config=nf4)
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))
    change_one_norm(model)
    with pytest.raises(UserError, match=r"norm\.weight has other values.*Load the model anew"):
        model.save_pretrained(tmp_path / "experts")
    with pytest.raises(UserError, match="is quantised: its experts are saved without it"):
        model.save_pretrained(tmp_path / "full", save="full")


# ------------------------------------------------------- a backbone that isn't that of its folder


def test_a_backbone_that_changed_before_is_not_referred_to(tmp_path):
    backbone = AutoModelForCausalLM.from_pretrained(saved_backbone(tmp_path / "backbone"))
    plain = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    change_one_norm(backbone)
    with pytest.raises(UserError, match=r"model\.norm\.weight of the model in memory isn't that"):
        le.attach(backbone, train_backbone=False, save="experts")
    assert not hasattr(backbone.model.layers[0].mlp, "lookup_experts")
    backbone.load_state_dict(plain)
    le.attach(backbone, train_backbone=False, save="experts")


def test_nor_one_with_more_rows_nor_one_from_other_files_of_the_folder(tmp_path):
    folder = saved_backbone(tmp_path / "backbone")
    model = give_embedding_rows(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(UserError, match=r"of the model in memory isn't that"):
        le.attach(model, train_backbone=False, save="experts")
    tiny_model("llama", seed=3).save_pretrained(folder, variant="other")
    model = AutoModelForCausalLM.from_pretrained(folder, variant="other")
    with pytest.raises(UserError, match=r"of the model in memory isn't that"):
        le.attach(model, train_backbone=False, save="experts")


# ----------------------------------------------------------------------------- beside the weights


def test_the_generation_configuration_is_read_back(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 3
    model.save_pretrained(tmp_path / "experts")
    for load in (AutoModelForCausalLM.from_pretrained, le.load):
        loaded = load(tmp_path / "experts")
        assert loaded.generation_config.max_new_tokens == 7
        assert loaded.generation_config.pad_token_id == 3
        assert loaded.generate(IDS, do_sample=False).shape[1] == IDS.shape[1] + 7
    (tmp_path / "experts" / "generation_config.json").unlink()  # then the backbone's
    assert le.load(tmp_path / "experts").generation_config.max_new_tokens is None


def test_a_generation_configuration_that_is_given_wins(model, tmp_path):
    from transformers import GenerationConfig

    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "experts")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "experts", generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0)
    )
    assert loaded.generation_config.max_new_tokens == 4


# --------------------------------------------------------------------------------- the Trainer


class WorseEveryTime(Trainer):
    """Says that the model of the first evaluation was the best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        found["eval_loss"] = float(self.state.global_step)
        return found


def train_and_load_the_best(model: Any, folder: Path, **arguments: Any) -> None:
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 6)]
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    WorseEveryTime(model, settings, train_dataset=rows, eval_dataset=rows).train()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])  # gpt2, gemma: tied heads
def test_the_trainer_finds_the_best_experts_without_a_word(family, tmp_path, caplog):
    model = on_backbone(saved_backbone(tmp_path / "backbone", family))
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING, logger="transformers")
    train_and_load_the_best(model.train(), tmp_path / "run")
    assert not [each for each in caplog.messages if "keys" in each]
    model.eval()
    best, last = (le.load(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 3))
    assert torch.equal(logits_of(best, IDS), logits_of(model, IDS))
    assert not torch.equal(logits_of(last, IDS), logits_of(model, IDS))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (family != "llama")
    model.save_pretrained(tmp_path / "best")
    assert torch.equal(logits_of(le.load(tmp_path / "best"), IDS), logits_of(model, IDS))


def test_the_trainer_resumes_experts_without_a_word(model, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING, logger="transformers")
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 6)]

    def trainer(steps: int) -> Trainer:
        settings = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, report_to=[], use_cpu=True
        )
        return Trainer(model.train(), settings, train_dataset=rows)

    trainer(2).train()
    assert trainer(4).train(resume_from_checkpoint=True).global_step == 4
    assert not [each for each in caplog.messages if "keys" in each]


def test_a_checkpoint_that_lacks_experts_is_still_told_of(model, tmp_path):
    """What the Trainer doesn't miss is the backbone, and nothing else."""
    names = model._keys_to_ignore_on_save
    assert names == {name for name in model.state_dict() if ".lookup_experts." not in name}
    assert not le.attach(tiny_model())._keys_to_ignore_on_save


def test_a_model_in_full_is_saved_by_the_trainer_in_full(tmp_path):
    model = le.attach(tiny_model(), 2).train()
    train_and_load_the_best(model, tmp_path / "run")
    best = le.load(tmp_path / "run" / "checkpoint-1")
    assert torch.equal(logits_of(best, IDS), logits_of(model.eval(), IDS))
    config = json.loads((tmp_path / "run" / "checkpoint-1" / "config.json").read_text())
    assert "backbone" not in config["lookup_experts"]
