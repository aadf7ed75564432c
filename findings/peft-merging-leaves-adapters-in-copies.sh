#!/usr/bin/env bash
# PEFT 0.21.2 (with transformers 5.24.0, torch 2.13.0): merge_and_unload() leaves adapters behind
# in modules that modules_to_save has copied, and what is saved then can't be loaded.
#
# On a mixture of experts "all-linear" also stands for the experts' weights and the gate, which are
# parameters and not linear layers (PEFT turns it into target_parameters by itself). Where the FFNs
# are copied by modules_to_save=["mlp"] as well, the copies have these adapters inside, and merging
# takes out the outer wrapper only. The model is of the plain class and its logits are right, but
# its parameters are named mlp.experts.base_layer.base_layer.down_proj and so on: save_pretrained
# writes them so, and from_pretrained gives the FFNs random weights with a report and no error.
# target_modules=["q_proj", ...] beside the same modules_to_save is merged whole.
#
# Output seen:
#   target_modules=all-linear: MixtralForCausalLM, off by 0.00, 6 modules of PEFT in it; loaded again: 6 weights missing
#   target_modules=['q_proj']: MixtralForCausalLM, off by 0.00, 0 modules of PEFT in it; loaded again: 0 weights missing
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical env/bin/python -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
ids = torch.arange(8).unsqueeze(0)
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
)
found = {}
for targets in ("all-linear", ["q_proj"]):
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=targets, modules_to_save=["mlp"], init_lora_weights=False)
    adapted = get_peft_model(MixtralForCausalLM(config).eval(), lora).eval()
    with torch.no_grad():
        logits = adapted(ids).logits
        merged = adapted.merge_and_unload()
        off = float((merged(ids).logits - logits).abs().max())
    left = [name for name, part in merged.named_modules() if type(part).__module__[:4] == "peft"]
    merged.save_pretrained("merged")
    _, report = MixtralForCausalLM.from_pretrained("merged", output_loading_info=True)
    missing = len(report["missing_keys"])
    found[str(targets)] = (len(left), missing)
    print(
        f"target_modules={targets}: {type(merged).__name__}, off by {off:.2f}, {len(left)} modules "
        f"of PEFT in it; loaded again: {missing} weights missing"
    )
    assert off < 1e-4
assert found["['q_proj']"] == (0, 0), "the behaviour has changed"
assert found["all-linear"] == (6, 6), "the behaviour has changed"
PYTHON
