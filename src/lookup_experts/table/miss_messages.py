"""The words that a device and the process that reads for it say to each other, in shared memory.

Every step of the device has a number, and every word carries the number of the step that it belongs
to. So nothing depends on the order in which words become visible: who reads a word with the number
that he waits for has all of it, and no word of another step is taken for it. The device writes all
of `requests` in every step, hits as well: the worker knows by them what was used last, and what the
step under way reads. It answers misses alone.

`device_cache_kernels.py` is the device's side, `miss_worker.py` the worker's.
"""

import mmap
from typing import Any

MOST_POSITIONS = 64
"""Of a step."""
MESSAGE_BYTES = 8192
"""All words, in whole pages."""
STEP_MASK = 2**31 - 1
"""Of the number of a step, the upper half of a word; it begins anew after so many."""
HIT, MISS = 1, 2
"""What became of a position's id; 0 is no position, an id that isn't in the table, or a step that
asks for nothing any more."""
KIND_SHIFT = 30
"""A request is: step, two bits of the kind, 30 of the id."""
ID_MASK = 2**KIND_SHIFT - 1
UNREADABLE = 2**32 - 1
"""In the place of a slot: the record can't be read."""
NEVER = -1
"""All of a word: the worker has ended, and no step will ever be answered."""

# What the device counts, in this order; the host sees it as of the last step that was answered.
NUM_COUNTS = 8
STEPS, BROKEN, IDS, HOT_HITS, RAM_HITS, OUTSIDE, OUTSIDE_ID = range(7)
"""Steps; whether one wasn't answered; positions; those whose records lay in the device's memory,
and in RAM; those with an id outside of the table, and such an id."""

# What the worker counts and is told.
STOP, ERRORS, MISSES, BYTES_READ, NANOSECONDS = range(5)
"""Set by the parent: end; then the worker's: errors told so far, records asked for, bytes read for
them, and the time that this took."""
ERRORS_SEEN = 5
"""The parent's: how many of the errors it has taken. The worker tells the next one then."""
NUM_CONTROLS = 8


class Messages:
    """The words in a mapping of `MESSAGE_BYTES`, as each process has one.

    requests [64] and counts [8] are written by the device; replies [3, 64] by the worker: for each
    position the place of its record, or `UNREADABLE`; for each the RAM slot, counted from 1, that
    the device is to copy from into that place; for each the id, counted from 1, that is no longer
    where it was. 0 is none.

    Words are read and written one by one as plain integers, which are never torn. For the device
    see `parts_of`.

    Args:
        memory: the mapping.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        words = memoryview(memory).cast("q")
        self.requests, self.counts, self.replies = parts_of(words)
        self.controls = words[512 : 512 + NUM_CONTROLS]


def parts_of(words: Any) -> tuple[Any, Any, Any]:
    """Requests, counts and replies as slices of all words, which may be an array or a tensor."""
    return words[:64], words[64:72], words[128:320]
