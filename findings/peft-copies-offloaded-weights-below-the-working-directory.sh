#!/usr/bin/env bash
# peft 0.21.2, accelerate 1.15.0: `PeftModel.from_pretrained` onto a model some of whose weights
# accelerate keeps on a disk (in the model's own safetensors files) writes the whole of those files
# again, into the working directory: the file's path is cut at "/" and joined without the first one,
# so /models/m/model.safetensors becomes ./models/m/model.safetensors. `offload_folder` doesn't
# matter, nothing is said, and nothing removes them; the model goes on reading them there.
#
# Output seen:
#   before: working directory has []
#   after:  working directory has ['tmp/.../model/model.safetensors'], the original's bytes and more
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

cat > "$folder/check.py" <<'PYTHON'
import sys
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

folder = Path(sys.argv[1]).resolve()
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
adapted = get_peft_model(
    AutoModelForCausalLM.from_pretrained(folder / "model"), LoraConfig(target_modules=["q_proj"])
)
adapted.save_pretrained(folder / "adapter")


def files():
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


options = {
    "device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": str(folder / "offloaded")
}
base = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
print("before: working directory has", before := files())
PeftModel.from_pretrained(base, folder / "adapter", **options)
print("after:  working directory has", after := files())
original = folder / "model" / "model.safetensors"
assert before == []
assert after == [original.as_posix().removeprefix("/")]
assert Path(after[0]).stat().st_size >= original.stat().st_size
PYTHON
mkdir "$folder/working"
cd "$folder/working"
"$folder/venv/bin/python" "$folder/check.py" "$folder"
