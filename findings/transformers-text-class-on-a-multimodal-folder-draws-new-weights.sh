#!/usr/bin/env bash
# transformers 5.24.0: a saved Gemma3ForConditionalGeneration loaded as its text-only class,
# Gemma3ForCausalLM.from_pretrained(folder), gives a model all of whose weights are drawn anew: the
# class has no mapping from the names in the folder. It is told in the report of a warning that lists
# names, and nothing fails. AutoModelForCausalLM gives the multi-modal class. The same holds for
# Llava's text part (LlamaForCausalLM). What gives the text part: its configuration and its modules.
#
# Output seen:
#   Gemma3ForCausalLM.from_pretrained: 29 of 29 tensors drawn anew, logits differ by 7.4
#   AutoModelForCausalLM.from_pretrained: Gemma3ForConditionalGeneration
#   text configuration and modules: logits differ by 0.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0

cat > "$folder/check.py" <<'PYTHON'
import sys

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
)

folder = sys.argv[1]
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
text = {"vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
vision = {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
config = AutoConfig.for_model(
    "gemma3",
    text_config={**sizes, **text, "model_type": "gemma3_text", "initializer_range": 0.3},
    vision_config={**sizes, **vision, "model_type": "siglip_vision_model"},
    mm_tokens_per_image=4,
    image_token_index=96,
)
torch.manual_seed(0)
model = AutoModelForImageTextToText.from_config(config).eval()
model.save_pretrained(folder)
ids = torch.tensor([[5, 6, 7, 8]])


def logits(of):
    with torch.no_grad():
        return of.eval()(input_ids=ids).logits


with torch.no_grad():
    expected = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
torch.manual_seed(1)
loaded, report = Gemma3ForCausalLM.from_pretrained(folder, output_loading_info=True)
missing, number = len(report["missing_keys"]), len(loaded.state_dict())
apart = float((logits(loaded) - expected).abs().max())
print(f"{type(loaded).__name__}.from_pretrained: {missing} of {number} tensors drawn anew, "
      f"logits differ by {apart:.1f}")
auto = AutoModelForCausalLM.from_pretrained(folder)
print(f"AutoModelForCausalLM.from_pretrained: {type(auto).__name__}")
part = Gemma3ForCausalLM(model.config.text_config)
part.model, part.lm_head = model.model.language_model, model.lm_head
same = float((logits(part) - expected).abs().max())
print(f"text configuration and modules: logits differ by {same:.1f}")
assert missing == number and apart > 0.1 and same == 0.0
assert type(auto).__name__ == "Gemma3ForConditionalGeneration"
PYTHON
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/check.py" "$folder/model" 2>"$folder/errors" || { cat "$folder/errors"; exit 1; }
