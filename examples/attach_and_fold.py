"""Lookup experts on a model of your own: attach, train a little, fold, generate from the table.

Run: python examples/attach_and_fold.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lookup_experts as le

# Any Hugging Face causal LM will do; this one is tiny and random.
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
model = LlamaForCausalLM(config)

le.attach(model, num_experts=4)  # in place; the outputs don't change yet

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = torch.arange(64).repeat(4, 1)
for _ in range(20):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "folded"
    le.reparameterize(model, out, encoding="float32")  # experts -> a table on disk
    reader = le.load(out, store="direct")  # reads records past the page cache
    prompt = tokens[:1, :8]
    computed = model.eval().generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)
    looked_up = reader.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert torch.equal(computed, looked_up)
    print("the table says what the experts say:", looked_up[0].tolist())
