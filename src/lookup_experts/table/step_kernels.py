# mypy: disable-error-code="no-untyped-def"
"""The kernels of a decoding step: a block's part in one launch or two, for a few positions.

A step has many small operations, each of which is begun later than it is computed. So a kernel
here does all that it can, and what every program of a position needs (the router's weights, a
narrow row) each computes anew: reading a few kilobytes once more from the GPU's cache takes less
than another launch. What is known early is loaded first, and waited for last. Sums are in float32,
and rounded once.

Sizes of a model are constants to the kernels: each has one set of them. `places` may be None:
record p is position p's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookup_experts.table.encoding import Encoding
from lookup_experts.table.kernels import codes_of, load_codes, values_of

MIX_PIECE = 256
"""Numbers of a mixed row per program."""
TILE = 8192
"""Numbers of a matrix that a program holds in registers."""
ADD_PIECE = 512
NUM_WARPS = 4
OVERLAPS = False
"""Whether `route_mix_add` is launched before the FFN's last product has ended, and waits for it
where it needs it (from compute capability 9.0 on)."""


@triton.jit
def _router_weights(
    states, router, hidden_size: tl.constexpr, num_experts: tl.constexpr,
    padded_experts: tl.constexpr, router_piece: tl.constexpr,
):  # fmt: skip
    """The softmax over the experts [padded_experts]; zero where there are none.

    Args:
        states: address of a position's hidden state.
    """
    experts = tl.arange(0, padded_experts)
    known = experts < num_experts
    logits = tl.zeros([padded_experts], dtype=tl.float32)
    for first in tl.static_range(0, hidden_size, router_piece):
        inputs = first + tl.arange(0, router_piece)
        inside = inputs < hidden_size
        state = tl.load(states + inputs, mask=inside, other=0.0).to(tl.float32)
        rows = tl.load(
            router + experts[:, None] * hidden_size + inputs[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        logits += tl.sum(rows.to(tl.float32) * state[None, :], axis=1)
    logits = tl.where(known, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=0))
    return powers / tl.sum(powers, axis=0)


@triton.jit
def _record_of(records, places, position, width, offset):
    """Address of a position's codes in a layer."""
    if places is not None:
        position = tl.load(places + position)
    return records + position * width + offset


@triton.jit
def _load_sum(output, residual, places, inside, total):
    """What there is of both, and `total`."""
    if output is not None:
        total += tl.load(output + places, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _route_mix_add(
    records,  # uint8 [M, width], or the floats themselves; sizes are in these elements
    places,  # int64 [P] or None
    hidden,  # [P, hidden_size]
    router,  # [num_experts, hidden_size]
    output,  # [P, hidden_size] or None: nothing to add to
    residual,  # [P, hidden_size] or None: nothing more
    codebook,  # float32 [2^bits]; anything for the other kinds
    result,  # [P, hidden_size]
    width,
    offset,
    hidden_size: tl.constexpr,
    code_bytes: tl.constexpr,
    block_width: tl.constexpr,
    blocks_per_row: tl.constexpr,
    num_experts: tl.constexpr,
    padded_experts: tl.constexpr,  # the next power of two
    kind: tl.constexpr,
    router_piece: tl.constexpr,
    piece: tl.constexpr,
    overlaps: tl.constexpr,  # see `OVERLAPS`
):
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = columns < hidden_size
    record = _record_of(records, places, position, width, offset)
    codes, scales = load_codes(
        record, tl.arange(0, padded_experts), columns, hidden_size, code_bytes, block_width,
        blocks_per_row, num_experts, kind,
    )  # fmt: skip
    total = tl.zeros([piece], dtype=tl.float32)
    if not overlaps:
        total = _load_sum(output, residual, position * hidden_size + columns, inside, total)
    weights = _router_weights(
        hidden + position * hidden_size, router, hidden_size, num_experts, padded_experts,
        router_piece,
    )  # fmt: skip
    total += tl.sum(values_of(codes, scales, codebook, kind) * weights[:, None], axis=0)
    if overlaps:
        tl.extra.cuda.gdc_wait()
        total = _load_sum(output, residual, position * hidden_size + columns, inside, total)
    target = result + position * hidden_size + columns
    tl.store(target, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _route_mix_project(
    records,  # as above
    places,
    hidden,
    router,
    out_proj,  # [hidden_size, row_size]
    codebook,
    result,  # [P, hidden_size]
    width,
    offset,
    hidden_size: tl.constexpr,
    row_size: tl.constexpr,
    padded_row: tl.constexpr,  # the next power of two
    code_bytes: tl.constexpr,
    block_width: tl.constexpr,
    blocks_per_row: tl.constexpr,
    num_experts: tl.constexpr,
    padded_experts: tl.constexpr,
    kind: tl.constexpr,
    router_piece: tl.constexpr,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = columns < hidden_size
    inner = tl.arange(0, padded_row)
    record = _record_of(records, places, position, width, offset)
    codes, scales = load_codes(
        record, tl.arange(0, padded_experts), inner, row_size, code_bytes, block_width,
        blocks_per_row, num_experts, kind,
    )  # fmt: skip
    matrix = tl.load(
        out_proj + columns[:, None] * row_size + inner[None, :],
        mask=inside[:, None] & (inner < row_size)[None, :],
        other=0.0,
    )
    weights = _router_weights(
        hidden + position * hidden_size, router, hidden_size, num_experts, padded_experts,
        router_piece,
    )  # fmt: skip
    mixed = tl.sum(values_of(codes, scales, codebook, kind) * weights[:, None], axis=0)
    total = tl.sum(matrix.to(tl.float32) * mixed[None, :], axis=1)
    target = result + position * hidden_size + columns
    tl.store(target, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _gate_and_row(
    records,  # as above, of one row per record and layer
    places,
    hidden,
    gate,  # [row_size, hidden_size]
    codebook,
    result,  # float32 [P, row_size]
    arrived,  # int32 [P], set to zero for `_project_and_norm`
    width,
    offset,
    hidden_size: tl.constexpr,
    padded_hidden: tl.constexpr,  # the next power of two
    row_size: tl.constexpr,
    code_bytes: tl.constexpr,
    block_width: tl.constexpr,
    blocks_per_row: tl.constexpr,
    kind: tl.constexpr,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = columns < row_size
    inputs = tl.arange(0, padded_hidden)
    matrix = tl.load(
        gate + columns[:, None] * hidden_size + inputs[None, :],
        mask=inside[:, None] & (inputs < hidden_size)[None, :],
        other=0.0,
    )
    state = tl.load(hidden + position * hidden_size + inputs, mask=inputs < hidden_size, other=0.0)
    record = _record_of(records, places, position, width, offset)
    codes, scales = load_codes(
        record, tl.arange(0, 1), columns, row_size, code_bytes, block_width, blocks_per_row, 1,
        kind,
    )  # fmt: skip
    logits = tl.sum(matrix.to(tl.float32) * state.to(tl.float32)[None, :], axis=1)
    total = tl.sigmoid(logits) + tl.sum(values_of(codes, scales, codebook, kind), axis=0)
    tl.store(result + position * row_size + columns, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(arrived + position, 0)


@triton.jit
def _project_and_norm(
    inner,  # float32 [P, row_size]
    out_proj,  # [hidden_size, row_size]
    norm,  # [hidden_size]
    products,  # float32 [P, hidden_size], to write to
    arrived,  # int32 [P], zeros
    result,  # [P, hidden_size]
    epsilon,
    hidden_size: tl.constexpr,
    padded_hidden: tl.constexpr,
    row_size: tl.constexpr,
    padded_row: tl.constexpr,
    piece: tl.constexpr,
):
    """Each program makes a piece of a position's product; who comes last has all of it at hand,
    and norms it."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = columns < hidden_size
    places = tl.arange(0, padded_row)
    matrix = tl.load(
        out_proj + columns[:, None] * row_size + places[None, :],
        mask=inside[:, None] & (places < row_size)[None, :],
        other=0.0,
    )
    row = tl.load(inner + position * row_size + places, mask=places < row_size, other=0.0)
    product = tl.sum(matrix.to(tl.float32) * row[None, :], axis=1)
    tl.store(products + position * hidden_size + columns, product, mask=inside)
    # All threads' numbers are written before the one that counts says so.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + position, 1, sem="acq_rel")
    if before == tl.num_programs(1) - 1:
        every = tl.arange(0, padded_hidden)
        known = every < hidden_size
        weight = tl.load(norm + every, mask=known, other=0.0).to(tl.float32)
        # Not by way of the processor's own cache, which knows nothing of other processors.
        whole = tl.load(
            products + position * hidden_size + every, mask=known, other=0.0, cache_modifier=".cg"
        )
        scale = tl.rsqrt(tl.sum(whole * whole, axis=0) / hidden_size + epsilon)
        target = result + position * hidden_size + every
        tl.store(target, (whole * scale * weight).to(result.dtype.element_ty), mask=known)


@triton.jit
def _add_three(first, second, third, result, count, piece: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * piece + tl.arange(0, piece)
    inside = places < count
    total = tl.load(first + places, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(second + places, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(third + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + places, total.to(result.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------ launching


def route_mix_add_kernel(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor | None,
    encoding: Encoding,
    offset: int,
    residual: Tensor | None = None,
) -> Tensor:
    """See `route_mix_add` in `mixing.py`."""
    num_experts, hidden_size = router.shape
    result = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=records.device)
    if not result.numel():
        return result
    piece = min(MIX_PIECE, triton.next_power_of_2(hidden_size))
    codes, records, offset = _codes_in(records, encoding, num_experts, hidden_size, offset)
    padded_experts = triton.next_power_of_2(num_experts)
    overlaps = OVERLAPS and residual is not None
    _route_mix_add[result.numel() // hidden_size, triton.cdiv(hidden_size, piece)](
        records,
        places,
        hidden_states.contiguous(),
        router.contiguous(),
        None if output is None else output.contiguous(),
        None if residual is None else residual.contiguous(),
        codes.book,
        result,
        records.shape[1],
        offset,
        hidden_size,
        codes.code_bytes,
        codes.block_width,
        codes.blocks_per_row,
        num_experts,
        padded_experts,
        codes.kind,
        _router_piece(hidden_size, padded_experts),
        piece,
        overlaps,
        num_warps=NUM_WARPS,
        **({"launch_pdl": True} if overlaps else {}),
    )
    return result


def route_mix_project_kernel(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    out_proj: Tensor,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """See `route_mix_project` in `mixing.py`."""
    num_experts, hidden_size = router.shape
    row_size = out_proj.shape[1]
    result = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=records.device)
    if not result.numel():
        return result
    codes, records, offset = _codes_in(records, encoding, num_experts, row_size, offset)
    padded_row, padded_experts = map(triton.next_power_of_2, (row_size, num_experts))
    piece = _rows_per_tile(padded_row, hidden_size)
    _route_mix_project[result.numel() // hidden_size, triton.cdiv(hidden_size, piece)](
        records,
        places,
        hidden_states.contiguous(),
        router.contiguous(),
        out_proj.contiguous(),
        codes.book,
        result,
        records.shape[1],
        offset,
        hidden_size,
        row_size,
        padded_row,
        codes.code_bytes,
        codes.block_width,
        codes.blocks_per_row,
        num_experts,
        padded_experts,
        codes.kind,
        _router_piece(hidden_size, padded_experts),
        piece,
        num_warps=NUM_WARPS,
    )
    return result


def gate_project_kernel(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    gate: Tensor,
    out_proj: Tensor,
    norm: Tensor,
    epsilon: float,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """See `gate_project` in `mixing.py`."""
    row_size, hidden_size = gate.shape
    device = records.device
    result = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=device)
    if not result.numel():
        return result
    num_positions = result.numel() // hidden_size
    inner = torch.empty((num_positions, row_size), dtype=torch.float32, device=device)
    products = torch.empty((num_positions, hidden_size), dtype=torch.float32, device=device)
    arrived = torch.empty(num_positions, dtype=torch.int32, device=device)
    codes, records, offset = _codes_in(records, encoding, 1, row_size, offset)
    padded_hidden, padded_row = map(triton.next_power_of_2, (hidden_size, row_size))
    piece = _rows_per_tile(padded_hidden, row_size)
    _gate_and_row[num_positions, triton.cdiv(row_size, piece)](
        records,
        places,
        hidden_states.contiguous(),
        gate.contiguous(),
        codes.book,
        inner,
        arrived,
        records.shape[1],
        offset,
        hidden_size,
        padded_hidden,
        row_size,
        codes.code_bytes,
        codes.block_width,
        codes.blocks_per_row,
        codes.kind,
        piece,
        num_warps=NUM_WARPS,
    )
    piece = _rows_per_tile(padded_row, hidden_size)
    _project_and_norm[num_positions, triton.cdiv(hidden_size, piece)](
        inner,
        out_proj.contiguous(),
        norm.contiguous(),
        products,
        arrived,
        result,
        epsilon,
        hidden_size,
        padded_hidden,
        row_size,
        padded_row,
        piece,
        num_warps=NUM_WARPS,
    )
    return result


def add_three_kernel(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """See `add_three` in `mixing.py`."""
    result = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    count = result.numel()
    if count:
        _add_three[(triton.cdiv(count, ADD_PIECE),)](
            first.contiguous(),
            second.contiguous(),
            third.contiguous(),
            result,
            count,
            ADD_PIECE,
            num_warps=NUM_WARPS,
        )
    return result


def _codes_in(
    records: Tensor, encoding: Encoding, num_experts: int, row_size: int, offset: int
) -> tuple[Any, Tensor, int]:
    """What is to be known of the codes, the records as what they hold, and the offset in that."""
    codes = codes_of(encoding, num_experts, row_size, records.device)
    if codes.stored is not None:
        return codes, records.view(codes.stored), offset // codes.stored.itemsize
    return codes, records, offset


def _rows_per_tile(padded_columns: int, num_rows: int) -> int:
    """Of a matrix with so many columns: a power of two."""
    return max(1, min(TILE // padded_columns, 64, triton.next_power_of_2(num_rows)))


def _router_piece(hidden_size: int, padded_experts: int) -> int:
    """Columns of the router at a time: all, where they fit into registers."""
    return max(16, min(triton.next_power_of_2(hidden_size), TILE // padded_experts))
