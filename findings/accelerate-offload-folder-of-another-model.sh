#!/usr/bin/env bash
# accelerate 1.15.0 (with transformers 5.24.0, torch 2.13.0): disk_offload(model, folder), and
# dispatch_model(offload_dir=folder), compute with the weights of another model if that has been
# offloaded to the folder before.
#
# Where the folder has an index.json nothing is written: what is there is taken for the model's
# weights, without a look at them, and the model's own are dropped. Of two models of one shape the
# second gives the logits of the first, without a word; so does a model that was trained on and
# offloaded again. So each model, each time, needs a folder of its own.
#
# Output seen (how far logits are from the model's own):
#   disk_offload: a new folder 0.00, the folder of another model 2.07
#   dispatch_model: a new folder 0.00, the folder of another model 1.96
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=critical env/bin/python -W ignore - <<'PYTHON'
import torch
from accelerate import disk_offload, dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(8).unsqueeze(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.1,
)


def by_disk_offload(model):
    return disk_offload(model, "offloaded", execution_device=torch.device("cpu"))


def by_dispatch_model(model):
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    places = {part: "disk" if part == "model.layers" else "cpu" for part in parts}
    return dispatch_model(model, places, main_device="cpu", offload_dir="dispatched")


@torch.no_grad()
def distance(offload, seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    own = model(ids).logits
    return float((offload(model)(ids).logits - own).abs().max())


for offload in (by_disk_offload, by_dispatch_model):
    first, second = distance(offload, seed=0), distance(offload, seed=1)
    name = offload.__name__.removeprefix("by_")
    print(f"{name}: a new folder {first:.2f}, the folder of another model {second:.2f}")
    assert first == 0 and second > 0.1, "the behaviour has changed"
PYTHON
