#!/usr/bin/env bash
# transformers 5.24.0 (tokenizers 0.23.3): `"add_bos_token": true` in a tokenizer_config.json is
# dropped without a word wherever a tokenizer.json lies beside it, also for the Llama classes that
# owned the option: texts lose their BOS token, and `tokenizer.add_bos_token` says False.
# transformers 4.57.6 heeded it for LlamaTokenizerFast: the same folder gives other ids.
#
# Output seen:
#   4.57.6: [0, 4] add_bos_token=True
#   5.24.0: [4] add_bos_token=False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/check.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
ids = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
Tokenizer(models.BPE(ids, [("a", "b")])).save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
(folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
tokenizer = AutoTokenizer.from_pretrained(folder)
found = tokenizer("ab")["input_ids"]
print(f"{transformers.__version__}: {found} add_bos_token={tokenizer.add_bos_token}")
assert (found, tokenizer.add_bos_token) == (json.loads(sys.argv[2]), sys.argv[3] == "true")
PYTHON

run() {  # version, ids expected, add_bos_token expected
  python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet "transformers==$1" jinja2
  "$folder/$1/bin/python" "$folder/check.py" "$folder/model-$1" "$2" "$3" 2>/dev/null
}
run 4.57.6 '[0, 4]' true
run 5.24.0 '[4]' false
