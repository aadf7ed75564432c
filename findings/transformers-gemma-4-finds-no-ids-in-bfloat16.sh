#!/usr/bin/env bash
# transformers 5.24.0: Gemma 4 given `inputs_embeds` alone finds the token ids by comparing them with
# its input embedding times the root of its width. In bfloat16, and at the released widths (1536 for
# E2B), the product there is rounded once and that of the embedding's own forward twice, so they
# differ: the model raises a RuntimeError for exactly the embeddings that it has given itself. In
# float32, or where the root is a number of bfloat16 (width 64), it works.
#
# Output seen:
#   width 64 float32: the logits of the ids
#   width 64 bfloat16: the logits of the ids
#   width 1536 float32: the logits of the ids
#   width 1536 bfloat16: RuntimeError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0

cat > "$folder/check.py" <<'PYTHON'
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig


def outcome(width, dtype):
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=97,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma4ForCausalLM(config).eval().to(dtype)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        try:
            logits = model(inputs_embeds=embeds).logits
        except RuntimeError:
            return "RuntimeError"
        return "the logits of the ids" if torch.equal(logits, model(ids).logits) else "others"


found = {}
for width in (64, 1536):
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[width, name] = outcome(width, dtype)
        print(f"width {width} {name}: {found[width, name]}")
assert found.pop((1536, "bfloat16")) == "RuntimeError"
assert set(found.values()) == {"the logits of the ids"}
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/check.py" 2>"$folder/errors" || { cat "$folder/errors"; exit 1; }
