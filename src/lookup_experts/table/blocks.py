"""Which blocks of a table's shards hold the records of a batch, and how few reads bring them.

The disk gives blocks; records lie densely in them. Records of a batch that share a block, or lie in
neighbouring ones, come with one read.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lookup_experts.table.format import BLOCK, DATA_START
from lookup_experts.table.layout import RecordLayout

MOST_MERGED_BYTES = 2**20
"""No read grows beyond this by taking another record along: large ones at once are faster."""


@dataclass
class BlockReads:
    """Reads of whole blocks into one buffer, and where the wanted bytes are then."""

    shards: list[int]
    """Of each read, the number of its shard."""
    offsets: list[int]
    """Where it begins in the file."""
    lengths: list[int]
    needed: list[int]
    """How many of its bytes are wanted; a file may end before the last block does."""
    targets: list[int]
    """Where it begins in the buffer."""
    places: list[int]
    """Where in the buffer the wanted bytes of each id begin."""
    num_bytes: int = 0
    """Of the buffer that is needed."""


def plan_blocks(
    layout: RecordLayout,
    first_ids: Sequence[int],
    ids: list[int],
    start: int,
    width: int,
) -> BlockReads:
    """The reads that bring `width` bytes from `start` on of each record.

    In plain Python: it is a microsecond for each id, and mostly there are few.

    Args:
        first_ids: the first id of each shard.
        ids: in any order; each is in the table.
    """
    plan = BlockReads([], [], [], [], [], [0] * len(ids))
    stride, places = layout.stride, plan.places
    shard, first_of_shard, first_of_next = -1, 0, -1
    blocks_end = -1  # of the last read, in its file
    for number in sorted(range(len(ids)), key=ids.__getitem__):
        token_id = ids[number]
        if token_id >= first_of_next:
            shard = bisect_right(first_ids, token_id) - 1
            first_of_shard, blocks_end = first_ids[shard], -1
            is_last = shard + 1 == len(first_ids)
            first_of_next = layout.shape.vocab_size if is_last else first_ids[shard + 1]
        begin = DATA_START + (token_id - first_of_shard) * stride + start
        end = begin + width
        first_block, end_of_blocks = begin & -BLOCK, (end + BLOCK - 1) & -BLOCK
        if first_block > blocks_end:  # nothing in common with the read before
            places[number] = plan.num_bytes + begin - first_block
        else:
            places[number] = plan.num_bytes + begin - blocks_end
            more = end_of_blocks - blocks_end
            if not more or plan.lengths[-1] < MOST_MERGED_BYTES:
                plan.lengths[-1] += more
                plan.needed[-1] = end - plan.offsets[-1]
                plan.num_bytes += more
                blocks_end = end_of_blocks
                continue
            plan.needed[-1] = plan.lengths[-1]  # of which this record may take the last block
            first_block = blocks_end
        plan.shards.append(shard)
        plan.offsets.append(first_block)
        plan.lengths.append(end_of_blocks - first_block)
        plan.needed.append(end - first_block)
        plan.targets.append(plan.num_bytes)
        plan.num_bytes += end_of_blocks - first_block
        blocks_end = end_of_blocks
    return plan


def most_blocks(width: int) -> int:
    """How many blocks so many bytes may touch, wherever they begin."""
    return (width + BLOCK - 2) // BLOCK + 1
