"""The Triton kernel against its reference: by Triton's interpreter on the CPU, and compiled.

The interpreter is switched on by an environment variable that Triton reads when it is imported,
so both run in processes of their own. On a GPU the kernel is compared in `test_cuda.py`.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.timeout(120),
]

INTERPRETED = """
import torch
from hypothesis import given, settings, strategies as st
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.kernels import decode_and_mix_kernel
from lookup_experts.table.mixing import decode_and_mix_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

@settings(max_examples=70, deadline=None, database=None)
@given(st.data())
def test(data):
    name = data.draw(st.sampled_from(sorted(ENCODINGS)))
    blocked = ENCODINGS[name].block_size is not None
    block_size = data.draw(st.sampled_from([None, 1, 5, 128])) if blocked else None
    encoding = get_encoding(name, block_size)
    ids, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    hidden = data.draw(st.sampled_from([1, 7, 8, 100, 255, 256, 257, 768]))
    positions, layers = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    layer = data.draw(st.integers(0, layers - 1))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    weight_dtype = data.draw(st.sampled_from([torch.float32, dtype]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    layer_bytes = encoding.layer_bytes(experts, hidden)
    records = torch.full((ids, -(-layers * layer_bytes // 64) * 64), 0xA5, dtype=torch.uint8)
    offset = layer * layer_bytes
    rows = torch.randn(ids, experts, hidden, generator=generator)
    records[:, offset : offset + layer_bytes] = encoding.encode(rows)
    places = torch.randint(0, ids, (positions,), generator=generator)
    weights = torch.rand(positions, experts, generator=generator).to(weight_dtype)
    arguments = (records, places, weights, encoding, hidden, offset, dtype)
    found, expected = decode_and_mix_kernel(*arguments), decode_and_mix_reference(*arguments)
    assert found.dtype == dtype and found.shape == (positions, hidden)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

test()
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lookup_experts.table import kernels

names = kernels._decode_and_mix.arg_names
for architecture in (80, 90):
    for kind, stored in ((0, "*bf16"), (1, "*u8"), (4, "*u8"), (3, "*u8")):
        types = [stored, "*i64", "*bf16", "*fp32", "*bf16", *["i32"] * 6, *["constexpr"] * 3]
        constants = {"num_experts": 4, "kind": kind, "piece": kernels.PIECE}
        source = ASTSource(kernels._decode_and_mix, dict(zip(names, types)), constants)
        compiled = triton.compile(source, GPUTarget("cuda", architecture, 32))
        assert compiled.asm["cubin"]
"""


def run(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_kernel_gives_what_its_reference_gives():
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_gpus_without_one(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
