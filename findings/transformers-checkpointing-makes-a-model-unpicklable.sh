#!/usr/bin/env bash
# transformers 5.24.0: a model that can be pickled can't be any more once gradient checkpointing was
# turned on, not even after it was turned off again: turning it on puts a hook that is local to a
# function on the embedding (of every model, not of PEFT's alone), and turning it off leaves it
# there. So torch.save(model) and spawned processes fail; copy.deepcopy and state dicts don't.
#
# Output seen:
#   before: pickled
#   on:     Can't pickle local object 'PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads'
#   off:    Can't pickle local object 'PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0

cat > "$folder/check.py" <<'PYTHON'
import pickle

from transformers import AutoModelForCausalLM, LlamaConfig


def tried(model):
    try:
        pickle.loads(pickle.dumps(model))
        return "pickled"
    except (AttributeError, pickle.PicklingError) as error:
        return str(error)


config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
model = AutoModelForCausalLM.from_config(config)
before = tried(model)
model.activation_checkpointing_enable()
on = tried(model)
model.activation_checkpointing_disable()
off = tried(model)
print(f"before: {before}\non:     {on}\noff:    {off}")
assert before == "pickled"
assert "make_inputs_require_grads" in on
assert off == on
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
