#!/usr/bin/env bash
# transformers 5.24.0 with PEFT 0.21.2, the newest there was: adapters can be loaded onto a model,
# not added, switched off or saved.
#
# load_adapter(), and AutoModelForCausalLM.from_pretrained() of a folder of adapters, work. The
# model's other methods for adapters (add_adapter, set_adapter, disable_adapters, and save_pretrained
# once an adapter is loaded) ask for "a version >= 0.22.0", which wasn't published when this was
# written. PEFT's own get_peft_model and PeftModel.from_pretrained do all of it meanwhile.
#
# Output seen:
#   load_adapter: works
#   disable_adapters: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
#   save_pretrained: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
#   add_adapter: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical env/bin/python -W ignore - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
lora = LoraConfig(target_modules=["q_proj"])
get_peft_model(LlamaForCausalLM(config), lora).save_pretrained("adapter")
loaded = LlamaForCausalLM(config)
found = {}
for name, use in (
    ("load_adapter", lambda: loaded.load_adapter("adapter")),
    ("disable_adapters", loaded.disable_adapters),
    ("save_pretrained", lambda: loaded.save_pretrained("again")),
    ("add_adapter", lambda: LlamaForCausalLM(config).add_adapter(lora)),
):
    try:
        use()
        found[name] = "works"
    except ValueError as error:
        found[name] = f"ValueError: {error}"
    print(f"{name}: {found[name]}")
assert found.pop("load_adapter") == "works", "the behaviour has changed"
assert all("0.22.0" in result for result in found.values()), "the behaviour has changed"
PYTHON
