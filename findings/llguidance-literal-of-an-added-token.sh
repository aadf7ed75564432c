#!/usr/bin/env bash
# llguidance 1.9.1 (with tokenizers 0.23.3, transformers 5.24.0): a string literal in a grammar that
# equals an added token of the form <...> can't be generated, though the token is not special.
#
# Tokenizers such as Qwen 2.5's have <tool_call> as an added token with special=False, whose text is
# part of every decoded text. The matcher of the grammar `start: "<tool_call>"` offers exactly one
# next token, the added one, and when that token is consumed it refuses it and is in an error state
# for good. A literal of the same words without < and > is fine, and so is naming the token by its
# id, <[258]>. So a grammar that spells a tool call with strings ends in an error at its first token.
#
# Output seen:
#   "<tool_call>": allowed [258], offered: True, consumed: False
#   "[tool_call]": allowed [257], offered: True, consumed: True
#   <[258]>: allowed [258], offered: True, consumed: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q llguidance==1.9.1 tokenizers==0.23.3 transformers==5.24.0 numpy
env/bin/python - <<'PYTHON'
import numpy as np
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
backend.add_special_tokens(["<|end|>"])
backend.add_tokens([AddedToken(name, special=False) for name in ("[tool_call]", "<tool_call>")])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
ids = tokenizer("<tool_call>")["input_ids"]
assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>"
known = from_tokenizer(tokenizer)


def try_first(expression, name):
    """(ids that may come first, whether the token of that name is then taken)."""
    matcher = LLMatcher(known, f"%llguidance {{}}\nstart: {expression}", log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = np.unpackbits(bits, count=known.vocab_size, bitorder="little").nonzero()[0].tolist()
    token_id = tokenizer.convert_tokens_to_ids(name)
    return allowed, token_id in allowed, matcher.consume_token(token_id)


angle = tokenizer.convert_tokens_to_ids("<tool_call>")
results = {
    '"<tool_call>"': try_first('"<tool_call>"', "<tool_call>"),
    '"[tool_call]"': try_first('"[tool_call]"', "[tool_call]"),
    f"<[{angle}]>": try_first(f"<[{angle}]>", "<tool_call>"),
}
for expression, (allowed, offered, taken) in results.items():
    print(f"{expression}: allowed {allowed}, offered: {offered}, consumed: {taken}")
assert results['"<tool_call>"'] == ([angle], True, False), "the behaviour has changed"
assert results['"[tool_call]"'][1:] == (True, True), "the behaviour has changed"
assert results[f"<[{angle}]>"][1:] == (True, True), "the behaviour has changed"
PYTHON
