# mypy: disable-error-code="no-untyped-def"
"""The kernels of `mixing.py` in Triton. Imported where they are run, since Triton is optional.

One program sums one piece of one position's result. It reads the codes of all N experts and, for
the encodings that have them, their scales, as `encoding.py` lays them out; the sum stays in
registers. Scales begin wherever the codes end, at an odd byte too, so they are read byte by byte.

What a step of decoding takes, all of a block's part in one or two kernels, is in
`step_kernels.py`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookup_experts.table.encoding import (
    Encoding,
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
def _load_float32(address, inside):
    """float32 numbers at any address."""
    word = tl.load(address, mask=inside, other=0).to(tl.uint32)
    word |= tl.load(address + 1, mask=inside, other=0).to(tl.uint32) << 8
    word |= tl.load(address + 2, mask=inside, other=0).to(tl.uint32) << 16
    word |= tl.load(address + 3, mask=inside, other=0).to(tl.uint32) << 24
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
def load_codes(
    record, experts, columns, row_size, code_bytes, block_width, blocks_per_row,
    num_experts: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """A tile of a layer's rows as it is stored: codes and their scales, for `values_of`.

    Apart from that, so that what else has to be computed first lies between: a load takes longer
    than most of it.

    Args:
        record: address of the layer's codes.
        experts: [E], those from `num_experts` on are none.
        columns: [C] of the rows, those from `row_size` on are none.

    Returns:
        Codes [E, C], and scales that fit to them.
    """
    known = (experts < num_experts)[:, None]
    inside = known & (columns < row_size)[None, :]
    places = experts[:, None] * row_size + columns[None, :]
    if kind == FLOAT:
        codes = tl.load(record + places, mask=inside, other=0.0)
        scales = codes
    elif kind == INT8:
        codes = tl.load(record + places, mask=inside, other=0)
        scales = _load_float32(record + code_bytes + 4 * experts[:, None], known)
    else:
        if kind == NF4:
            codes = _load_codes_of_4_bits(record, places, inside)
        else:
            codes = _load_codes_of_3_bits(record, places, inside)
        blocks = experts[:, None] * blocks_per_row + (columns // block_width)[None, :]
        scales = _load_float16(record + code_bytes + 2 * blocks, inside)
    return codes, scales


@triton.jit
def values_of(codes, scales, codebook, kind: tl.constexpr):
    """What codes stand for, float32 [E, C]; zero where there are none."""
    if kind == FLOAT:
        values = codes.to(tl.float32)
    elif kind == INT8:
        values = codes.to(tl.int8, bitcast=True).to(tl.float32) * scales
    else:
        values = tl.load(codebook + codes) * scales
    return values


@triton.jit
def _decode_and_mix(
    records,  # uint8 [M, width], or the floats themselves; sizes are in these elements
    places,  # int64 [P]
    weights,  # [P, num_experts]
    codebook,  # float32 [2^bits]; anything for the other kinds
    result,  # [P, row_size]
    width,
    offset,
    row_size,
    code_bytes,  # what the codes of all experts take
    block_width,  # neighbours that share a scale
    blocks_per_row,
    num_experts: tl.constexpr,
    kind: tl.constexpr,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    record = records + tl.load(places + position) * width + offset
    total = tl.zeros([piece], dtype=tl.float32)
    for expert in range(num_experts):
        experts = expert + tl.arange(0, 1)
        codes, scales = load_codes(
            record, experts, columns, row_size, code_bytes, block_width, blocks_per_row,
            num_experts, kind,
        )  # fmt: skip
        weight = tl.load(weights + position * num_experts + expert).to(tl.float32)
        total += weight * tl.sum(values_of(codes, scales, codebook, kind), axis=0)
    target = result + position * row_size + columns
    tl.store(target, total.to(result.dtype.element_ty), mask=columns < row_size)


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
    codes = codes_of(encoding, num_experts, hidden_size, records.device)
    if codes.stored is not None:
        records = records.view(codes.stored)
        offset //= codes.stored.itemsize
    _decode_and_mix[num_positions, codes.pieces](
        records,
        places,
        weights.contiguous(),
        codes.book,
        result,
        records.shape[1],
        offset,
        hidden_size,
        codes.code_bytes,
        codes.block_width,
        codes.blocks_per_row,
        num_experts,
        codes.kind,
        PIECE,
        num_warps=2,
    )
    return result


class Codes(NamedTuple):
    """What the kernels must know of the codes in a table's records."""

    kind: int
    stored: torch.dtype | None
    """What records hold, if these are floats."""
    book: Tensor
    """The values of the codes, float32 on the device; a zero where there are none."""
    code_bytes: int
    block_width: int
    blocks_per_row: int
    pieces: int
    """Programs per position."""


@lru_cache
def codes_of(encoding: Encoding, num_experts: int, hidden_size: int, device: torch.device) -> Codes:
    """Found out once: at every launch it would take longer than the launch."""
    pieces = triton.cdiv(hidden_size, PIECE)
    with torch.inference_mode(False):
        if isinstance(encoding, NormalFloatEncoding):
            book = normal_float_codebook(encoding.bits).to(device)
        else:
            book = torch.zeros(1, device=device)
    if not isinstance(encoding, ScaledEncoding):
        return Codes(FLOAT.value, encoding.torch_dtype, book, 0, 1, 1, pieces)
    kind = encoding.bits if isinstance(encoding, NormalFloatEncoding) else INT8.value
    code_bytes = encoding.code_bytes(num_experts * hidden_size)
    width = min(encoding.block_size or hidden_size, hidden_size)
    return Codes(kind, None, book, code_bytes, width, triton.cdiv(hidden_size, width), pieces)
