#!/usr/bin/env bash
# PEFT 0.21.2 (with transformers 5.24.0, torch 2.13.0): unload() does not give the base model back
# where modules_to_save was used.
#
# Its documentation: "This gives back the original base model." It takes LoRA away without merging,
# but puts the trained copies of modules_to_save in the place of the original modules. Within
# disable_adapter(), which is said to do the same for a while, the original modules compute.
#
# Output seen (how far logits are from those of the model before):
#   modules_to_save=None: disabled 0.00, unloaded 0.00
#   modules_to_save=['lm_head']: disabled 0.00, unloaded 0.95
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

torch.manual_seed(0)
ids = torch.randint(0, 64, (1, 8))
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)


@torch.no_grad()
def distances(copied):
    """How far the logits are from the model's own: with adapters disabled, and unloaded."""
    model = LlamaForCausalLM(config).eval()
    before = model(ids).logits
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=copied)
    adapted = get_peft_model(model, lora).eval()
    for weight in adapted.parameters():  # as if trained
        if weight.requires_grad:
            weight.add_(0.1)
    with adapted.disable_adapter():
        disabled = float((adapted(ids).logits - before).abs().max())
    return disabled, float((adapted.unload()(ids).logits - before).abs().max())


found = {}
for copied in (None, ["lm_head"]):
    disabled, unloaded = found[str(copied)] = distances(copied)
    print(f"modules_to_save={copied}: disabled {disabled:.2f}, unloaded {unloaded:.2f}")
assert found["None"] == (0, 0), "the behaviour has changed"
assert found["['lm_head']"][0] == 0 and found["['lm_head']"][1] > 0.1, "the behaviour has changed"
PYTHON
