#!/usr/bin/env bash
# transformers 5.24.0: where a model's folder has a `generate` of its own (custom_generate/generate.py)
# and is loaded with trust_remote_code=True, `model.generate(input_ids)` is a TypeError for every such
# function whose first parameter is `model`, as the guide says it should be: `generate` is then
# functools.partial(custom_generate, model=model), so the ids land where the model is. Only
# `model.generate(inputs=input_ids)` works; without trust_remote_code both do.
#
# Output seen:
#   plain: by position (1, 6), by name (1, 6)
#   with custom_generate: by position TypeError: generate() got multiple values for argument 'model', by name (1, 6)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0

cat > "$folder/check.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

folder = Path(sys.argv[1])
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    eos_token_id=None,
)
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
(folder / "custom_generate").mkdir()
(folder / "custom_generate" / "generate.py").write_text(
    "def generate(model, inputs=None, **kwargs):\n"
    "    return type(model).generate(model, inputs, **kwargs)\n"
)
ids = torch.tensor([[1, 2, 3, 4]])


def tried(call):
    try:
        return tuple(call().shape)
    except TypeError as error:
        return f"TypeError: {error}"


found = []
for name, trust in (("plain", False), ("with custom_generate", True)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    by_position = tried(lambda: model.generate(ids, max_new_tokens=2))
    by_name = tried(lambda: model.generate(inputs=ids, max_new_tokens=2))
    found += [by_position, by_name]
    print(f"{name}: by position {by_position}, by name {by_name}")
assert found[0] == found[1] == found[3] == (1, 6)
assert found[2] == "TypeError: generate() got multiple values for argument 'model'"
PYTHON
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/check.py" "$folder/model" 2>"$folder/errors" || { cat "$folder/errors"; exit 1; }
