"""The kernels of `device_cache_kernels.py` by the book, for tensors of a CPU."""

import time

from torch import Tensor

from lookup_experts.table.miss_messages import (
    BROKEN,
    HIT,
    HOT_HITS,
    IDS,
    KIND_SHIFT,
    MISS,
    MOST_POSITIONS,
    NEVER,
    OUTSIDE,
    OUTSIDE_ID,
    RAM_HITS,
    STEP_MASK,
    STEPS,
    UNREADABLE,
)


def locate_reference(
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
    """Put the places of a step's records into `places`; wait for those that must be read first.

    A place is a row of `hot`, or `num_hot` more than one of `ram`; -1 where there is no record to
    be had. The words of the three shared tensors are explained in `miss_messages.py`.

    Args:
        ids: int64 [at least num_ids].
        where: int32 [V], the place of each id's record, or -1; changed.
        places: int64 [64], the result.
        counts: int64 [8], the device's counts; changed.
        requests, shared_counts, replies: int64 [64], [8] and [192], shared with the worker.
        hot: uint8 [at least num_hot, stride], the device's memory; records are brought to it here.
        ram: uint8 [R, stride], shared with the worker.
        num_ids: how many positions there are.
        num_hot: slots in the device's memory.
        most_looks: how often to look for the worker's answer before the step, and all that come,
            are given up.
    """
    step = (int(counts[STEPS]) + 1) & STEP_MASK
    counts[STEPS] = step
    asked = ids[:num_ids].tolist()
    found: list[int] = []
    missing: list[int] = []
    words = [0] * MOST_POSITIONS
    is_broken = bool(counts[BROKEN])
    for position, token_id in enumerate(asked):
        place = -1
        if not 0 <= token_id < len(where):
            counts[OUTSIDE] += 1
            counts[OUTSIDE_ID] = token_id
        elif is_broken:
            words[position] = token_id
        else:
            place = int(where[token_id])
            words[position] = (MISS if place < 0 else HIT) << KIND_SHIFT | token_id
            counts[HOT_HITS] += 0 <= place < num_hot
            counts[RAM_HITS] += place >= num_hot
            if place < 0:
                missing.append(position)
        found.append(place)
    counts[IDS] += num_ids
    for position, word in enumerate(words):
        requests[position] = step << 32 | word

    if missing and not _wait(replies, missing, step, most_looks):
        counts[BROKEN] = 1
        found = [-1] * num_ids
    elif missing:
        for position in missing:
            place, source, evicted = (
                int(word) & (2**32 - 1) for word in replies[position::MOST_POSITIONS]
            )
            if evicted:
                where[evicted - 1] = -1
            if place != UNREADABLE:
                where[asked[position]] = found[position] = place
                if source:
                    hot[place] = ram[source - 1]
    for position, place in enumerate(found):
        places[position] = place
    shared_counts.copy_(counts)


def _wait(replies: Tensor, missing: list[int], step: int, most_looks: int) -> bool:
    """Whether all of these positions were answered."""
    for _ in range(most_looks):
        words = [replies[position::MOST_POSITIONS].tolist() for position in missing]
        if any(answer[0] == NEVER for answer in words):
            return False
        if all(word >> 32 == step for answer in words for word in answer):
            return True
        time.sleep(0)
    return False


def gather_reference(
    places: Tensor, hot: Tensor, ram: Tensor, num_hot: int, start: int, out: Tensor
) -> None:
    """Put bytes `start` to `start + W` of the records at `places` into `out`; where there is no
    record, bytes of 0xFF.

    Args:
        places: int64 [P], see `locate_reference`.
        out: uint8 [P, W], contiguous.
    """
    part = slice(start, start + out.shape[1])
    for row, place in enumerate(places.tolist()):
        if place < 0:
            out[row] = 0xFF
        else:
            out[row] = hot[place, part] if place < num_hot else ram[place - num_hot, part]
