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
from lookup_experts.table import mixing, step_kernels
from lookup_experts.table.kernels import decode_and_mix_kernel
from lookup_experts.table.mixing import decode_and_mix_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

@st.composite
def some_encoding(draw):
    name = draw(st.sampled_from(sorted(ENCODINGS)))
    blocked = ENCODINGS[name].block_size is not None
    block_size = draw(st.sampled_from([None, 1, 5, 128])) if blocked else None
    return get_encoding(name, block_size)

def some_records(data, encoding, ids, layers, experts, row_size, generator):
    # Numbers in one layer and rubbish in the others; and where that layer begins.
    layer_bytes = encoding.layer_bytes(experts, row_size)
    records = torch.full((ids, -(-layers * layer_bytes // 64) * 64), 0xA5, dtype=torch.uint8)
    offset = data.draw(st.integers(0, layers - 1)) * layer_bytes
    rows = torch.randn(ids, experts, row_size, generator=generator)
    records[:, offset : offset + layer_bytes] = encoding.encode(rows)
    return records, offset

@settings(max_examples=70, deadline=None, database=None)
@given(st.data())
def test_sums(data):
    encoding = data.draw(some_encoding())
    ids, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    hidden = data.draw(st.sampled_from([1, 7, 8, 100, 255, 256, 257, 768]))
    positions, layers = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    weight_dtype = data.draw(st.sampled_from([torch.float32, dtype]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    records, offset = some_records(data, encoding, ids, layers, experts, hidden, generator)
    places = torch.randint(0, ids, (positions,), generator=generator)
    weights = torch.rand(positions, experts, generator=generator).to(weight_dtype)
    arguments = (records, places, weights, encoding, hidden, offset, dtype)
    found, expected = decode_and_mix_kernel(*arguments), decode_and_mix_reference(*arguments)
    assert found.dtype == dtype and found.shape == (positions, hidden)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

def compare(name, *arguments):
    found = getattr(step_kernels, name + "_kernel")(*arguments)
    expected = getattr(mixing, name + "_reference")(*arguments)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.is_contiguous()
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

@settings(max_examples=70, deadline=None, database=None)
@given(st.data())
def test_a_block(data):
    encoding = data.draw(some_encoding())
    form = data.draw(st.sampled_from(["wide", "narrow", "gated"]))
    experts = 1 if form == "gated" else data.draw(st.integers(1, 5))
    hidden = data.draw(st.sampled_from([1, 7, 100, 255, 257, 768]))
    row = hidden if form == "wide" else data.draw(st.sampled_from([1, 5, 64, 192, 300]))
    positions, layers = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    in_order = data.draw(st.booleans())
    ids = max(1, positions) if in_order else data.draw(st.integers(1, 4))
    records, offset = some_records(data, encoding, ids, layers, experts, row, generator)
    places = None if in_order else torch.randint(0, ids, (positions,), generator=generator)

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    tensors = torch.randn(3, hidden, positions, generator=generator).to(dtype)
    if data.draw(st.booleans()):
        states, output, residual = tensors.transpose(1, 2)  # as they may come: not contiguous
    else:
        states, output, residual = tensors.transpose(1, 2).contiguous().view(3, 1, -1, hidden)
    router, gate, out_proj = matrix(experts, hidden), matrix(row, hidden), matrix(hidden, row)
    codes = (encoding, offset)
    if form == "wide":
        output = data.draw(st.sampled_from([output, None]))
        residual = data.draw(st.sampled_from([residual, None]))
        compare("route_mix_add", records, places, states, router, output, *codes, residual)
    elif form == "narrow":
        compare("route_mix_project", records, places, states, router, out_proj, *codes)
    else:
        norm = torch.randn(hidden, generator=generator).to(dtype)
        compare("gate_project", records, places, states, gate, out_proj, norm, 1e-3, *codes)
    compare("add_three", states, output if output is not None else states, states)

test_sums()
test_a_block()
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lookup_experts.table import kernels, step_kernels

SIZES = {
    "num_experts": 4, "padded_experts": 4, "hidden_size": 768, "padded_hidden": 1024,
    "row_size": 192, "padded_row": 256, "router_piece": 1024, "code_bytes": 384,
    "block_width": 192, "blocks_per_row": 1, "overlaps": False,
}
FLOATS = {"codebook", "inner", "products"}
NUMBERS = {"width": "i32", "offset": "i32", "epsilon": "fp32", "count": "i32", "arrived": "*i32",
           "places": "*i64"}

def compile_for(architecture, kernel, stored, constants, **types):
    constants = {name: constants.get(name) for name in kernel.arg_names
                 if name in constants or types.get(name) == "constexpr"}
    known = {**dict.fromkeys(FLOATS, "*fp32"), **NUMBERS, "records": stored, **types,
             **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, "*bf16") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    assert triton.compile(source, GPUTarget("cuda", architecture, 32)).asm["cubin"]

for architecture in (80, 90):
    for kind, stored in ((0, "*bf16"), (1, "*u8"), (4, "*u8"), (3, "*u8")):
        sizes = {"num_experts": 4, "kind": kind, "piece": kernels.PIECE}
        integers = dict.fromkeys(["row_size", "code_bytes", "block_width", "blocks_per_row"], "i32")
        compile_for(architecture, kernels._decode_and_mix, stored, sizes, **integers)
        sizes = {**SIZES, "kind": kind, "piece": 256}
        in_order = {"places": "constexpr", "output": "constexpr", "residual": "constexpr"}
        compile_for(architecture, step_kernels._route_mix_add, stored, sizes)
        compile_for(architecture, step_kernels._route_mix_add, stored, sizes, **in_order)
        sizes["piece"] = 32
        compile_for(architecture, step_kernels._route_mix_project, stored, sizes)
        compile_for(architecture, step_kernels._gate_and_row, stored, {**sizes, "piece": 8},
                    result="*fp32")
    sizes = {**SIZES, "piece": 32}
    compile_for(architecture, step_kernels._project_and_norm, None, sizes)
    compile_for(architecture, step_kernels._add_three, None, sizes)
"""


def test_the_kernels_give_what_their_references_give():
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus_without_one(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
