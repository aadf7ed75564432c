# mypy: disable-error-code="no-untyped-def"
"""The kernels of `device_cache.py` in Triton. Imported where they run: Triton is optional.

`_locate` is one program of one warp: with a second one, what the first has counted up would have to
be kept from it. While it waits for the worker it takes one warp of one of the GPU's processors, and
all others go on. What it writes into shared memory goes past the caches, and what it polls there is
read anew each time; so are records in RAM, of which the worker may have read others since.
Volatile loads do that: the modifier .cv for it is left out by Triton without a word.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookup_experts.table import miss_messages

PIECE = 512
"""Words of 4 bytes per program of `_gather`: 16 bytes for each thread of four warps."""
COPIED_AT_ONCE = 2048
"""Words that `_locate` copies at a time from RAM to the device's memory."""

_MOST_POSITIONS = tl.constexpr(miss_messages.MOST_POSITIONS)
_STEP_MASK = tl.constexpr(miss_messages.STEP_MASK)
_KIND_SHIFT = tl.constexpr(miss_messages.KIND_SHIFT)
_HIT = tl.constexpr(miss_messages.HIT)
_MISS = tl.constexpr(miss_messages.MISS)
_UNREADABLE = tl.constexpr(miss_messages.UNREADABLE)
_NEVER = tl.constexpr(miss_messages.NEVER)
_NUM_COUNTS = tl.constexpr(miss_messages.NUM_COUNTS)
_STEPS = tl.constexpr(miss_messages.STEPS)
_BROKEN = tl.constexpr(miss_messages.BROKEN)
_IDS = tl.constexpr(miss_messages.IDS)
_HOT_HITS = tl.constexpr(miss_messages.HOT_HITS)
_RAM_HITS = tl.constexpr(miss_messages.RAM_HITS)
_OUTSIDE = tl.constexpr(miss_messages.OUTSIDE)
_OUTSIDE_ID = tl.constexpr(miss_messages.OUTSIDE_ID)
_LOWER_HALF = tl.constexpr(2**32 - 1)


@triton.jit(
    do_not_specialize=["num_ids", "vocab_size", "num_hot", "most_looks"],
    do_not_specialize_on_alignment=["ids"],
)
def _locate(
    ids,  # int64 [num_ids]
    where,  # int32 [vocab_size]: place of each id's record, -1 for none
    places,  # int64 [64]
    counts,  # int64 [8], kept here
    requests,  # int64 [64], shared
    shared_counts,  # int64 [8], shared
    replies,  # int64 [3, 64], shared
    hot,  # int32 [num_hot, stride]; strides are in these words
    ram,  # int32 [R, stride], shared
    num_ids,
    vocab_size,
    num_hot,
    most_looks,
    stride: tl.constexpr,
    copied_at_once: tl.constexpr,
):
    positions = tl.arange(0, _MOST_POSITIONS)
    given = positions < num_ids
    asked = tl.load(ids + positions, mask=given, other=-1)
    known = given & (asked >= 0) & (asked < vocab_size)
    token = tl.where(known, asked, 0)
    place = tl.load(where + token, mask=known, other=-1).to(tl.int64)
    step = (tl.load(counts + _STEPS) + 1) & _STEP_MASK
    broken = tl.load(counts + _BROKEN)
    hits = known & (place >= 0) & (broken == 0)
    missing = known & (place < 0) & (broken == 0)
    kind = tl.where(hits, _HIT, tl.where(missing, _MISS, 0)).to(tl.int64)
    request = (step << 32) | (kind << _KIND_SHIFT) | token
    tl.store(requests + positions, request, cache_modifier=".wt")

    # All numbers of positions in one sum, a byte for each: a sum takes longer than a step's loads.
    outside = given & (known == 0)
    parts = missing.to(tl.int64) | ((hits & (place < num_hot)).to(tl.int64) << 8)
    parts |= ((hits & (place >= num_hot)).to(tl.int64) << 16) | (outside.to(tl.int64) << 24)
    numbers = tl.sum(parts, axis=0)
    num_outside = (numbers >> 24) & 255

    looks = 0
    waiting = (numbers & 255).to(tl.int32)
    reply = tl.zeros([_MOST_POSITIONS], dtype=tl.int64)
    source = tl.zeros([_MOST_POSITIONS], dtype=tl.int64)
    evicted = tl.zeros([_MOST_POSITIONS], dtype=tl.int64)
    while (waiting > 0) & (looks < most_looks):
        answers = replies + positions
        reply = tl.load(answers, mask=missing, other=0, volatile=True)
        source = tl.load(answers + _MOST_POSITIONS, mask=missing, other=0, volatile=True)
        evicted = tl.load(answers + 2 * _MOST_POSITIONS, mask=missing, other=0, volatile=True)
        is_late = ((reply >> 32) != step) | ((source >> 32) != step) | ((evicted >> 32) != step)
        waiting = tl.sum((missing & is_late & (reply != _NEVER)).to(tl.int32), axis=0)
        looks += 1
    unanswered = waiting + tl.sum((missing & (reply == _NEVER)).to(tl.int32), axis=0)
    broken = tl.where(unanswered > 0, 1, broken)

    answered = missing & (unanswered == 0)
    evicted_id = (evicted & _LOWER_HALF) - 1
    tl.store(where + evicted_id, -1, mask=answered & (evicted_id >= 0))
    found = reply & _LOWER_HALF
    is_there = answered & (found != _UNREADABLE)
    tl.store(where + token, found.to(tl.int32), mask=is_there)
    place = tl.where(missing, tl.where(is_there, found, -1), place)
    place = tl.where(broken == 0, place, -1)
    tl.store(places + positions, place, mask=given)

    # Records for the device's memory, which the worker can't write to.
    slot = (source & _LOWER_HALF) - 1
    is_moved = is_there & (slot >= 0)
    if tl.sum(is_moved.to(tl.int32), axis=0) > 0:
        words = tl.arange(0, copied_at_once)
        for position in range(_MOST_POSITIONS):
            this = is_moved & (positions == position)
            if tl.sum(this.to(tl.int32), axis=0) > 0:
                from_record = ram + tl.sum(tl.where(this, slot, 0), axis=0) * stride
                to_record = hot + tl.sum(tl.where(this, found, 0), axis=0) * stride
                for first in range(0, stride, copied_at_once):
                    inside = first + words < stride
                    values = tl.load(
                        from_record + first + words, mask=inside, other=0, volatile=True
                    )
                    tl.store(to_record + first + words, values, mask=inside)

    number = tl.arange(0, _NUM_COUNTS)
    before = tl.load(counts + number)
    more = tl.where(number == _IDS, num_ids, 0).to(tl.int64)
    more = tl.where(number == _HOT_HITS, (numbers >> 8) & 255, more)
    more = tl.where(number == _RAM_HITS, (numbers >> 16) & 255, more)
    more = tl.where(number == _OUTSIDE, num_outside, more)
    after = tl.where(number == _STEPS, step, before + more)
    after = tl.where(number == _BROKEN, broken, after)
    if num_outside > 0:
        an_id = tl.max(tl.where(outside, asked, -(2**62)), axis=0)
        after = tl.where(number == _OUTSIDE_ID, an_id, after)
    tl.store(counts + number, after)
    tl.store(shared_counts + number, after, cache_modifier=".wt")


@triton.jit(do_not_specialize=["num_hot", "quads", "start", "width"])
def _gather(
    places,  # int64 [P]
    hot,  # int32 [num_hot, 4 * quads]; sizes are in quads of these words
    ram,  # int32 [R, 4 * quads]
    out,  # int32 [P, 4 * width]
    num_hot,
    quads,
    start,
    width,
    piece: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * piece + tl.arange(0, piece)
    inside = words < width * 4
    target = out + position * (width * 4) + words
    place = tl.load(places + position)
    if place < 0:
        tl.store(target, tl.full([piece], -1, tl.int32), mask=inside)
    elif place < num_hot:
        record = hot + place * (quads * 4) + start * 4
        tl.store(target, tl.load(record + words, mask=inside, other=0), mask=inside)
    else:
        record = ram + (place - num_hot) * (quads * 4) + start * 4
        values = tl.load(record + words, mask=inside, other=0, volatile=True)
        tl.store(target, values, mask=inside)


def locate_kernel(
    ids: Tensor,
    where: Tensor,
    places: Tensor,
    counts: Tensor,
    requests: Tensor,
    shared_counts: Tensor,
    replies: Tensor,
    hot: Tensor,
    ram: Tensor,
    num_ids: int,
    num_hot: int,
    most_looks: int,
) -> None:
    """See `locate_reference` in `device_cache.py`."""
    with torch.cuda.device_of(where):
        _locate[1,](
            ids,
            where,
            places,
            counts,
            requests,
            shared_counts,
            replies,
            hot.view(-1).view(torch.int32),
            ram.view(-1).view(torch.int32),
            num_ids,
            len(where),
            num_hot,
            most_looks,
            ram.shape[1] // 4,
            COPIED_AT_ONCE,
            num_warps=1,
        )


def gather_kernel(
    places: Tensor, hot: Tensor, ram: Tensor, num_hot: int, start: int, out: Tensor
) -> None:
    """See `gather_reference` in `device_cache.py`."""
    num_places, width = out.shape
    with torch.cuda.device_of(out):
        _gather[num_places, triton.cdiv(width // 4, PIECE)](
            places,
            hot.view(-1).view(torch.int32),
            ram.view(-1).view(torch.int32),
            out.view(-1).view(torch.int32),
            num_hot,
            ram.shape[1] // 16,
            start // 16,
            width // 16,
            PIECE,
            num_warps=4,
        )
