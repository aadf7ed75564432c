#!/usr/bin/env bash
# transformers 5.24.0: `from_pretrained(folder, gguf_file="model.gguf")` reads the configuration
# from folder/model.gguf, and the weights from ./model.gguf where the working directory happens to
# have a file of that name. Sizes being alike, no word is said: the same call gives another model in
# another working directory. (`gguf_file` is tried as a path of its own first, but only when weights
# are looked for.)
#
# Output seen:
#   elsewhere:        rms_norm_eps 1e-05, first weight 1.0
#   beside another:   rms_norm_eps 1e-05, first weight 2.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0

cat > "$folder/write.py" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np

D, FFN, VOCAB = 32, 64, 50


def write(path, value, eps):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(D // 4)
    writer.add_vocab_size(VOCAB)
    shapes = {"token_embd": (VOCAB, D), "output_norm": (D,), "output": (VOCAB, D)}
    block = {"attn_norm": (D,), "ffn_norm": (D,), "ffn_down": (D, FFN)}
    block |= dict.fromkeys(("ffn_gate", "ffn_up"), (FFN, D))
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D, D))
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write(Path(sys.argv[1], "named", "model.gguf"), 1.0, 1e-5)
write(Path(sys.argv[1], "other", "model.gguf"), 2.0, 1e-3)
PYTHON
mkdir "$folder/named" "$folder/other" "$folder/elsewhere"
"$folder/venv/bin/python" "$folder/write.py" "$folder"

cat > "$folder/load.py" <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="model.gguf", dtype=torch.float32)
print(f"rms_norm_eps {model.config.rms_norm_eps:.0e}, first weight {model.lm_head.weight[0, 0]:.1f}")
PYTHON
elsewhere=$(cd "$folder/elsewhere" && "$folder/venv/bin/python" "$folder/load.py" "$folder/named" 2> /dev/null)
beside=$(cd "$folder/other" && "$folder/venv/bin/python" "$folder/load.py" "$folder/named" 2> /dev/null)
echo "elsewhere:        $elsewhere"
echo "beside another:   $beside"
test "$elsewhere" = "rms_norm_eps 1e-05, first weight 1.0"
test "$beside" = "rms_norm_eps 1e-05, first weight 2.0"
