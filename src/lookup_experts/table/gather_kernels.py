# mypy: disable-error-code="no-untyped-def"
"""The kernel of `gather.py` in Triton. Imported where it is run, since Triton is optional.

A program copies a piece of one record, 16 bytes per thread. Reading over the bus takes about a
microsecond however little is read, so a single record is spread over as many threads as keep the
bus busy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024
"""Words of 4 bytes per program: 16 bytes for each thread of eight warps."""


@triton.jit
def _gather(
    records,  # int32 [num_records, 4 * stride]; sizes are in quads of these words
    places,  # int64 [P]
    out,  # int32 [P, 4 * width]
    problem,  # int64 [1]
    num_records,
    stride,
    start,
    width,
    skip,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    place = tl.load(places + position)
    is_there = (place >= 0) & (place < num_records)
    words = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = words < width * 4
    record = records + tl.where(is_there, place, 0) * (stride * 4) + start * 4
    values = tl.load(record + words, mask=inside & is_there, other=-1)
    tl.store(out + position * (width * 4) + words, values, mask=inside & (place != skip))
    is_wrong = (place != skip) & (is_there == 0) & (tl.program_id(1) == 0)
    tl.store(problem, place, mask=is_wrong & (start == 0))


def gather_kernel(
    records: Tensor, places: Tensor, start: int, out: Tensor, problem: Tensor, skip: int
) -> None:
    """See `gather` in `gather.py`."""
    num_places, width = out.shape
    words = records.shape[1] // 4
    _gather[num_places, triton.cdiv(width // 4, PIECE)](
        records.view(-1).view(torch.int32),
        places,
        out.view(-1).view(torch.int32),
        problem,
        len(records),
        words // 4,
        start // 16,
        width // 16,
        skip,
        PIECE,
        num_warps=8,
    )
