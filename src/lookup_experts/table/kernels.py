# mypy: disable-error-code="no-untyped-def"
"""The kernel of `mixing.py` in Triton. Imported where it is run, since Triton is optional.

One program sums one piece of one position's result. It reads the codes of all N experts and, for
the encodings that have them, their scales, as `encoding.py` lays them out; the sum stays in
registers. Scales begin wherever the codes end, at an odd byte too, so they are read byte by byte.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookup_experts.table.encoding import (
    Encoding,
    Int8Encoding,
    NormalFloatEncoding,
    ScaledEncoding,
    normal_float_codebook,
)

PIECE = 256
"""Numbers of the result per program. A power of two that divides the usual hidden sizes from 768
to 4096, and small enough that a single position is spread over several processors."""

# What the numbers of a record are; a kernel takes constants, not names.
FLOAT = tl.constexpr(0)
INT8 = tl.constexpr(1)
NF4 = tl.constexpr(4)
NF3 = tl.constexpr(3)


@triton.jit
def _load_float16(address, inside):
    """float16 numbers at any address, as float32."""
    low = tl.load(address, mask=inside, other=0).to(tl.uint16)
    high = tl.load(address + 1, mask=inside, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_float32(address):
    """A float32 number at any address."""
    word = tl.load(address).to(tl.uint32)
    word |= tl.load(address + 1).to(tl.uint32) << 8
    word |= tl.load(address + 2).to(tl.uint32) << 16
    word |= tl.load(address + 3).to(tl.uint32) << 24
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _load_codes_of_4_bits(record, codes, inside):
    """Two in a byte, the lower half first."""
    pairs = tl.load(record + codes // 2, mask=inside, other=0).to(tl.int32)
    return (pairs >> (codes % 2 * 4)) & 15


@triton.jit
def _load_codes_of_3_bits(record, codes, inside):
    """Eight in three bytes, from the lowest bit up; some reach into the byte behind."""
    first_bit = codes * 3
    shift = first_bit % 8
    address = record + first_bit // 8
    low = tl.load(address, mask=inside, other=0).to(tl.int32)
    high = tl.load(address + 1, mask=inside & (shift > 5), other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & 7


@triton.jit
def _decode_and_mix(
    records,  # uint8 [M, row_size], or the floats themselves; sizes are in these elements
    places,  # int64 [P]
    weights,  # [P, num_experts]
    codebook,  # float32 [2^bits]; anything for the other kinds
    result,  # [P, hidden_size]
    row_size,
    offset,
    hidden_size,
    code_bytes,  # what the codes of all experts take
    block_width,  # neighbours that share a scale
    blocks_per_row,
    num_experts: tl.constexpr,
    kind: tl.constexpr,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = columns < hidden_size
    record = records + tl.load(places + position) * row_size + offset
    total = tl.zeros([piece], dtype=tl.float32)
    for expert in range(num_experts):
        codes = expert * hidden_size + columns
        if kind == FLOAT:
            values = tl.load(record + codes, mask=inside, other=0.0).to(tl.float32)
        elif kind == INT8:
            signed = tl.load(record + codes, mask=inside, other=0).to(tl.int8, bitcast=True)
            values = signed.to(tl.float32) * _load_float32(record + code_bytes + 4 * expert)
        else:
            if kind == NF4:
                numbers = _load_codes_of_4_bits(record, codes, inside)
            else:
                numbers = _load_codes_of_3_bits(record, codes, inside)
            blocks = expert * blocks_per_row + columns // block_width
            scales = _load_float16(record + code_bytes + 2 * blocks, inside)
            values = tl.load(codebook + numbers) * scales
        weight = tl.load(weights + position * num_experts + expert).to(tl.float32)
        total += weight * values
    target = result + position * hidden_size + columns
    tl.store(target, total.to(result.dtype.element_ty), mask=inside)


def decode_and_mix_kernel(
    records: Tensor,
    places: Tensor,
    weights: Tensor,
    encoding: Encoding,
    hidden_size: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `decode_and_mix` in `mixing.py`."""
    num_positions, num_experts = weights.shape
    result = torch.empty((num_positions, hidden_size), dtype=dtype, device=records.device)
    if not num_positions:
        return result
    code_bytes, width, blocks = 0, 1, 1
    if isinstance(encoding, ScaledEncoding):
        code_bytes = encoding.code_bytes(num_experts * hidden_size)
        width = min(encoding.block_size or hidden_size, hidden_size)
        blocks = triton.cdiv(hidden_size, width)
    elif encoding.torch_dtype is not None:
        records = records.view(encoding.torch_dtype)
        offset //= encoding.torch_dtype.itemsize
    _decode_and_mix[num_positions, triton.cdiv(hidden_size, PIECE)](
        records,
        places,
        weights.contiguous(),
        codebook(encoding, records.device),
        result,
        records.shape[1],
        offset,
        hidden_size,
        code_bytes,
        width,
        blocks,
        num_experts,
        _kind(encoding),
        PIECE,
        num_warps=2,
    )
    return result


def _kind(encoding: Encoding) -> int:
    if isinstance(encoding, NormalFloatEncoding):
        return encoding.bits
    return INT8.value if isinstance(encoding, Int8Encoding) else FLOAT.value


@lru_cache
def codebook(encoding: Encoding, device: torch.device) -> Tensor:
    """The values of an encoding's codes, float32 on the device; a zero where it has none."""
    with torch.inference_mode(False):
        if isinstance(encoding, NormalFloatEncoding):
            return normal_float_codebook(encoding.bits).to(device)
        return torch.zeros(1, device=device)
