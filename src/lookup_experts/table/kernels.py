# mypy: disable-error-code="no-untyped-def"
"""The kernels of `mixing.py` in Triton. Imported where they are run, since Triton is optional.

One program sums one piece of one position's result. It reads the codes of all N experts and, for
the encodings that have them, their scales, as `encoding.py` lays them out; the sum stays in
registers. Scales begin wherever the codes end, at an odd byte too, so they are read byte by byte.

`_route_mix_add` does the router's part as well. Every program of a position does it anew: for the
few positions of a decoding step, reading the router's weights once more from the GPU's cache takes
less than another kernel's launch.
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
def _expert_values(
    record, codebook, expert, columns, inside, hidden_size, code_bytes, block_width, blocks_per_row,
    kind: tl.constexpr,
):  # fmt: skip
    """One expert's row, or a piece of it, as float32."""
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
    return values


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
        values = _expert_values(
            record, codebook, expert, columns, inside, hidden_size, code_bytes, block_width,
            blocks_per_row, kind,
        )  # fmt: skip
        total += tl.load(weights + position * num_experts + expert).to(tl.float32) * values
    target = result + position * hidden_size + columns
    tl.store(target, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _route_mix_add(
    records,  # as above
    places,
    hidden,  # [P, hidden_size]
    router,  # [num_experts, hidden_size]
    output,  # [P, hidden_size]
    codebook,
    result,  # [P, hidden_size]
    row_size,
    offset,
    hidden_size,
    code_bytes,
    block_width,
    blocks_per_row,
    num_experts: tl.constexpr,
    padded_experts: tl.constexpr,  # the next power of two
    kind: tl.constexpr,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, padded_experts)
    logits = tl.zeros([padded_experts], dtype=tl.float32)
    for first in range(0, hidden_size, piece):
        inputs = first + tl.arange(0, piece)
        known = inputs < hidden_size
        state = tl.load(hidden + position * hidden_size + inputs, mask=known, other=0.0)
        rows = tl.load(
            router + experts[:, None] * hidden_size + inputs[None, :],
            mask=(experts < num_experts)[:, None] & known[None, :],
            other=0.0,
        )
        logits += tl.sum(rows.to(tl.float32) * state.to(tl.float32)[None, :], axis=1)
    logits = tl.where(experts < num_experts, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=0))
    weights = powers / tl.sum(powers, axis=0)

    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = columns < hidden_size
    record = records + tl.load(places + position) * row_size + offset
    total = tl.load(output + position * hidden_size + columns, mask=inside, other=0.0)
    total = total.to(tl.float32)
    for expert in range(num_experts):
        values = _expert_values(
            record, codebook, expert, columns, inside, hidden_size, code_bytes, block_width,
            blocks_per_row, kind,
        )  # fmt: skip
        total += tl.sum(tl.where(experts == expert, weights, 0.0), axis=0) * values
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


def route_mix_add_kernel(
    records: Tensor,
    places: Tensor,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """See `route_mix_add` in `mixing.py`."""
    num_experts, hidden_size = router.shape
    result = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    num_positions = len(places)
    if not num_positions:
        return result
    codes = codes_of(encoding, num_experts, hidden_size, records.device)
    if codes.stored is not None:
        records = records.view(codes.stored)
        offset //= codes.stored.itemsize
    _route_mix_add[num_positions, codes.pieces](
        records,
        places,
        hidden_states.contiguous(),
        router.contiguous(),
        output.contiguous(),
        codes.book,
        result,
        records.shape[1],
        offset,
        hidden_size,
        codes.code_bytes,
        codes.block_width,
        codes.blocks_per_row,
        num_experts,
        triton.next_power_of_2(num_experts),
        codes.kind,
        PIECE,
        num_warps=4,
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
