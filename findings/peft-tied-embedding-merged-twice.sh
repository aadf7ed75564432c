#!/usr/bin/env bash
# PEFT 0.21.2 (with transformers 5.24.0, torch 2.13.0): LoRA on an embedding that is tied to the
# head, with ensure_weight_tying=True, is merged twice.
#
# The option is there so that both ends of a tied weight get the same adapter: with it the head has
# LoRA, too. merge_and_unload() then adds the difference once for the embedding and once more for
# the head, to the one weight that they share: the merged weight has moved by twice the difference,
# and the model says something else than with its adapter. Without the option it moves once (and the
# head, which had no adapter, moves with it, of which PEFT warns).
#
# Output seen (how often the difference is in the merged weight; how far logits are off):
#   untied: 1.0 times, 0.0
#   tied: 1.0 times, 75.5
#   tied, ensure_weight_tying=True: 2.0 times, 112.9
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 env/bin/python -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(8).unsqueeze(0)


def merged(tied, ensure):
    """(how often LoRA's difference is in the merged embedding, how far the logits are off)."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.3, tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    before = model.get_input_embeddings().weight.detach().clone()
    lora = LoraConfig(
        target_modules=["embed_tokens"], r=4, lora_alpha=4, init_lora_weights=False,
        ensure_weight_tying=ensure,
    )
    adapted = get_peft_model(model, lora).eval()
    difference = adapted.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    with torch.no_grad():
        logits = adapted(ids).logits
        model = adapted.merge_and_unload()
        off = (model(ids).logits - logits).abs().max()
    moved = model.get_input_embeddings().weight.detach() - before
    return float((moved * difference).sum() / difference.square().sum()), float(off)


found = {}
for name, tied, ensure in (
    ("untied", False, False), ("tied", True, False), ("tied, ensure_weight_tying=True", True, True)
):
    times, off = found[name] = merged(tied, ensure)
    print(f"{name}: {times:.1f} times, {off:.1f}")
assert abs(found["untied"][0] - 1) < 0.01 and found["untied"][1] < 1e-3, "the behaviour has changed"
assert abs(found["tied"][0] - 1) < 0.01, "the behaviour has changed"
assert abs(found["tied, ensure_weight_tying=True"][0] - 2) < 0.01, "the behaviour has changed"
PYTHON
