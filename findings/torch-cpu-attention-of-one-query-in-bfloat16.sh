#!/usr/bin/env bash
# torch 2.13.0 on a CPU that multiplies in bfloat16 (AVX-512 BF16): scaled_dot_product_attention of a
# single query per sequence, as in every step of decoding, takes several times as long in bfloat16 as
# in float32, and as two matmuls and a softmax in bfloat16.
#
# Half the bytes take five times as long: at batch 8, 12 heads and 128 keys the attention of a small
# model costs more than its linear layers do. Converting query, keys and values to float32 in every
# call is faster too, and nearer to the exact result.
#
# Output seen (µs at batch 8, 12 heads of 64, 128 keys, one thread):
#   bfloat16 965, float32 195, two products in bfloat16 149
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy
env/bin/python -W ignore - <<'PYTHON'
import statistics
import sys
import time

import torch
import torch.nn.functional as F

if "avx512_bf16" not in open("/proc/cpuinfo").read():
    sys.exit("this processor doesn't multiply in bfloat16")
torch.set_num_threads(1)
query = torch.randn(8, 12, 1, 64, dtype=torch.bfloat16)
key, value = (torch.randn(8, 12, 128, 64, dtype=torch.bfloat16) for _ in range(2))
floats = [each.float() for each in (query, key, value)]


def products():
    scores = (query @ key.transpose(2, 3)).float() * 64**-0.5
    return scores.softmax(-1).bfloat16() @ value


systems = {
    "bfloat16": lambda: F.scaled_dot_product_attention(query, key, value),
    "float32": lambda: F.scaled_dot_product_attention(*floats),
    "two products in bfloat16": products,
}
seconds = {name: [] for name in systems}
with torch.inference_mode():
    torch.testing.assert_close(systems["bfloat16"](), products(), rtol=2e-2, atol=2e-2)
    for _ in range(200):
        for name, run in systems.items():
            started_at = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - started_at)
found = {name: statistics.median(taken) * 1e6 for name, taken in seconds.items()}
print(", ".join(f"{name} {taken:.0f}" for name, taken in found.items()))
others = [taken for name, taken in found.items() if name != "bfloat16"]
assert found["bfloat16"] > 2 * max(others), "attention in bfloat16 has caught up"
PYTHON
