"""The Triton kernels against their references: by Triton's interpreter on the CPU, and compiled.

The interpreter is switched on by an environment variable that Triton reads when it is imported,
so both run in processes of their own. On a GPU the kernels are compared in `test_cuda.py`.
"""

import pytest
from triton_here import needs_triton, run

pytestmark = [needs_triton, pytest.mark.timeout(120)]

INTERPRETED = """
import torch
from hypothesis import given, settings, strategies as st
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.kernels import decode_and_mix_kernel, route_mix_add_kernel
from lookup_experts.table.mixing import decode_and_mix_reference, route_mix_add_reference

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

    states, output = torch.randn(2, hidden, positions, generator=generator).to(dtype).unbind()
    if data.draw(st.booleans()):
        states, output = states.T, output.T  # as they may come: not contiguous
    else:
        states, output = states.T.contiguous(), output.T.contiguous()
    router = (torch.randn(experts, hidden, generator=generator) / hidden**0.5).to(dtype)
    arguments = (records, places, states, router, output, encoding, offset)
    found, expected = route_mix_add_kernel(*arguments), route_mix_add_reference(*arguments)
    assert found.dtype == dtype and found.shape == (positions, hidden)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

test()
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lookup_experts.table import kernels

def compile_for(architecture, kernel, types, constants):
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), constants)
    assert triton.compile(source, GPUTarget("cuda", architecture, 32)).asm["cubin"]

for architecture in (80, 90):
    for kind, stored in ((0, "*bf16"), (1, "*u8"), (4, "*u8"), (3, "*u8")):
        constants = {"num_experts": 4, "kind": kind, "piece": kernels.PIECE}
        sizes = ["*fp32", "*bf16", *["i32"] * 6]
        types = [stored, "*i64", "*bf16", *sizes, *["constexpr"] * 3]
        compile_for(architecture, kernels._decode_and_mix, types, constants)
        types = [stored, "*i64", *["*bf16"] * 3, *sizes, *["constexpr"] * 4]
        constants["padded_experts"] = 4
        compile_for(architecture, kernels._route_mix_add, types, constants)
"""


def test_the_kernels_give_what_their_references_give():
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus_without_one(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
