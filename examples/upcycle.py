"""Lookup experts on a model that is trained already; saved beside it, and folded.

Run: python examples/upcycle.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer
from transformers import TrainingArguments as Arguments

import lookup_experts as le

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    # In place of a trained model: any causal LM, from a folder or the hub.
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")

    model = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    # Experts in every second block. Their outputs are zero, so nothing has changed yet. The
    # backbone takes no gradients, and saving leaves it where it is.
    le.attach(model, 2, layers="every:2", train_backbone=False, save="experts")

    tokens = torch.arange(32).repeat(8, 1)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = Arguments(
        output_dir=folder / "run",
        max_steps=20,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()

    model.save_pretrained(folder / "experts")
    backbone, experts = (
        (folder / part / "model.safetensors").stat().st_size for part in ("backbone", "experts")
    )
    print(f"backbone {backbone:,} bytes, experts beside it {experts:,} bytes")

    le.reparameterize(folder / "experts", folder / "folded", encoding="float32")
    with torch.no_grad():
        trained, folded = (
            model.eval()(tokens[:1]).logits for model in (model, le.load(folder / "folded"))
        )
    assert torch.allclose(trained, folded, atol=1e-5)
    print("the folded model says what the trained one says")
