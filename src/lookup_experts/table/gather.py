"""Records out of memory that a device reaches into memory of its own, by places on the device.

No id comes to the host: places lie on the device, one kernel reads them and the records, and what
it does can be captured in a CUDA graph. On a device without kernels it is its reference.
"""

import torch
from torch import Tensor

SKIP = -(2**62)
"""The place of a row of `out` that nothing is to be put into."""
NO_PROBLEM = 2**62
"""What `problem` holds as long as all places were right."""
QUAD = 16
"""Bytes that a thread copies at once; starts, widths and strides are multiples of it."""


def gather(records: Tensor, places: Tensor, start: int, out: Tensor, problem: Tensor) -> None:
    """Put bytes `start` to `start + W` of the records at `places` into `out`.

    The row of a place that isn't there becomes bytes of 0xFF: in every encoding these are no
    numbers, so whatever is computed of them shows it. Who gathers from byte 0 on is told the place
    in `problem`: records come in several pieces, of which the later ones may be on their way while
    somebody reads what the first one told, and what is told once mustn't come back.

    Args:
        records: uint8 [M, stride], contiguous, within reach of the device.
        places: int64 [P] on the device; `SKIP` leaves a row as it is.
        start: a multiple of 16, as W and the stride are.
        out: uint8 [P, W] on the device, contiguous.
        problem: int64 [1] within reach of the device.
    """
    if not out.numel():
        return
    if out.device.type != "cuda":
        gather_reference(records, places, start, out, problem)
        return
    from lookup_experts.table.gather_kernels import gather_kernel

    with torch.cuda.device(out.device):
        gather_kernel(records, places, start, out, problem, SKIP)


def gather_reference(
    records: Tensor, places: Tensor, start: int, out: Tensor, problem: Tensor
) -> None:
    """The same by the book, one place after the other."""
    for row, place in enumerate(places.tolist()):
        if 0 <= place < len(records):
            out[row] = records[place, start : start + out.shape[1]]
        elif place != SKIP:
            out[row] = 0xFF
            if start == 0:
                problem[0] = place


def unique_places(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [P] int64 -> places [P]: each id once, in ascending order, then `SKIP`; and index
    [P]: position -> where its id is among these.

    As `torch.unique`, but without its result's size, for which a device would be waited for.
    """
    ordered, origin = ids.sort()
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
    rank = is_first.cumsum(0) - 1
    index = torch.empty_like(ids).scatter_(0, origin, rank)
    places = torch.full_like(ids, SKIP).scatter_(0, rank, ordered)
    return places, index
