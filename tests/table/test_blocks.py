"""Records that lie densely in the blocks of the disk: right bytes from few reads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_tables import make_table
from reading import empty_slots, needs_ring, open_by, ways_here

from lookup_experts.table import blocks
from lookup_experts.table.blocks import most_blocks, plan_blocks
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.format import BLOCK, DATA_START
from lookup_experts.table.layout import RecordLayout, TableShape
from lookup_experts.table.store import RecordStore

pytestmark = pytest.mark.timeout(100)

BYTES = {"num_layers": 1, "num_experts": 1, "encoding": "int8"}
"""A record of `row_size` + 4 bytes."""


# --------------------------------------------------------------------------------- the plan


@st.composite
def requests(draw):
    """A layout, the first ids of its shards, ids, and the part of their records that is wanted."""
    row_size = draw(st.integers(1, 70) | st.integers(1000, 5000) | st.sampled_from([4092, 8188]))
    vocab_size = draw(st.integers(1, 300))
    layout = RecordLayout(TableShape(vocab_size, 1, 1, row_size), get_encoding("int8"))
    first_ids = sorted({0, *draw(st.lists(st.integers(0, vocab_size - 1), max_size=3))})
    ids = draw(st.lists(st.integers(0, vocab_size - 1), unique=True, max_size=100))
    if draw(st.booleans()):
        ids = sorted(ids)
    start = draw(st.integers(0, layout.stride - 1))
    width = draw(st.integers(1, layout.stride - start) | st.just(layout.stride - start))
    return layout, first_ids, ids, start, width


@settings(max_examples=400, deadline=None)
@given(requests(), st.sampled_from([BLOCK, 3 * BLOCK, blocks.MOST_MERGED_BYTES]))
def test_every_wanted_byte_is_read_and_every_block_once(request, most_merged):
    layout, first_ids, ids, start, width = request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MOST_MERGED_BYTES", most_merged)
        plan = plan_blocks(layout, first_ids, ids, start, width)
    content: dict[int, tuple[int, int]] = {}  # byte of the buffer -> shard, byte of the file
    read: set[tuple[int, int]] = set()
    columns = (plan.shards, plan.offsets, plan.lengths, plan.needed, plan.targets)
    target_of_next = 0
    for shard, offset, length, needed, target in zip(*columns, strict=True):
        assert offset % BLOCK == length % BLOCK == 0 < length
        assert target == target_of_next  # nothing is left out of the buffer
        assert 0 < needed <= length
        target_of_next = target + length
        numbers = {(shard, block) for block in range(offset // BLOCK, (offset + length) // BLOCK)}
        assert not numbers & read
        read |= numbers
        for block in range(0, length, BLOCK):
            content[target + block] = shard, offset + block
    assert plan.num_bytes == target_of_next == len(read) * BLOCK
    wanted: set[tuple[int, int]] = set()
    for token_id, place in zip(ids, plan.places, strict=True):
        shard = max(number for number, first in enumerate(first_ids) if first <= token_id)
        begin = DATA_START + (token_id - first_ids[shard]) * layout.stride + start
        for byte in (0, width - 1, *range(0, width, BLOCK)):  # one in each block, and the ends
            at = place + byte
            of_file = content[at // BLOCK * BLOCK]
            assert (of_file[0], of_file[1] + at % BLOCK) == (shard, begin + byte)
        wanted |= {
            (shard, block) for block in range(begin // BLOCK, (begin + width - 1) // BLOCK + 1)
        }
    assert wanted == read


@settings(max_examples=200, deadline=None)
@given(requests())
def test_neighbouring_blocks_come_with_one_read(request):
    layout, first_ids, ids, start, width = request
    plan = plan_blocks(layout, first_ids, ids, start, width)
    ends = {
        (shard, offset + length)
        for shard, offset, length in zip(plan.shards, plan.offsets, plan.lengths, strict=True)
        if length < blocks.MOST_MERGED_BYTES
    }
    assert not ends & set(zip(plan.shards, plan.offsets, strict=True))


@settings(max_examples=200, deadline=None)
@given(requests())
def test_no_more_is_needed_than_is_wanted(request):
    """The file may end behind the last wanted byte."""
    layout, first_ids, ids, start, width = request
    plan = plan_blocks(layout, first_ids, ids, start, width)
    for shard in set(plan.shards):
        last = max(
            token_id
            for token_id in ids
            if max(n for n, first in enumerate(first_ids) if first <= token_id) == shard
        )
        end = DATA_START + (last - first_ids[shard]) * layout.stride + start + width
        ends = [
            offset + needed
            for number, offset, needed in zip(plan.shards, plan.offsets, plan.needed, strict=True)
            if number == shard
        ]
        assert max(ends) == end


@given(st.integers(1, 20_000), st.integers(0, 20_000))
def test_the_most_blocks_that_bytes_may_touch(width, begin):
    assert (begin + width - 1) // BLOCK - begin // BLOCK + 1 <= most_blocks(width)
    worst = BLOCK - 1
    assert (worst + width - 1) // BLOCK - worst // BLOCK + 1 == most_blocks(width)


# ------------------------------------------------------------------------------- the right bytes


@st.composite
def shapes(draw):
    """Keywords of `make_table`, with records of a few bytes to some blocks."""
    return {
        "vocab_size": draw(st.sampled_from([1, 2, 40, 130])),
        "num_layers": draw(st.integers(1, 5)),
        "num_experts": draw(st.integers(1, 4)),
        "row_size": draw(st.integers(1, 40) | st.sampled_from([64, 127, 1000, 1999, 4096])),
        "encoding": draw(st.sampled_from(sorted(ENCODINGS))),
        "ids_per_shard": draw(st.sampled_from([None, 1, 7, 33])),
        "version": draw(st.sampled_from([2, 2, 2, 1])),
    }


@settings(max_examples=40, deadline=None)
@given(st.data(), shapes())
@example(None, {"vocab_size": 3, **BYTES, "row_size": 1, "ids_per_shard": 1})
@example(None, {"vocab_size": 3, **BYTES, "row_size": 4092, "ids_per_shard": None})
@example(None, {"vocab_size": 3, **BYTES, "row_size": 4093, "ids_per_shard": 2})
def test_any_part_of_any_records_from_any_store(tmp_path_factory, data, shape):
    folder = tmp_path_factory.mktemp("table")
    table, records = make_table(folder, **shape)
    vocab_size, stride = records.shape
    random = np.random.default_rng(0)
    every = np.arange(vocab_size)
    several = [every, every[-1:], random.permutation(vocab_size)[: max(1, vocab_size // 3)]]
    parts = [(0, stride), (stride - 1, 1), (0, 1)]
    if data is not None:
        start = data.draw(st.integers(0, stride - 1), "start")
        parts.append((start, data.draw(st.integers(1, stride - start), "width")))
    verify = data is not None and data.draw(st.booleans(), "verify")
    for way in ways_here():
        with open_by(way, table, verify) as store:
            for ids in several:
                for start, width in parts:
                    out = np.full((len(ids), width), 0xAA, np.uint8)
                    store.read(ids, out, start)
                    assert (out == records[ids, start : start + width]).all()
                memory = empty_slots(vocab_size + 3, stride)
                slots = random.permutation(vocab_size + 3)[: len(ids)]
                store.begin(ids, memory, slots).wait()
                assert (memory[slots] == records[ids]).all()
                assert (np.delete(memory, slots, axis=0) == 0xAA).all()


@pytest.mark.parametrize("row_size", [1, 600, 4092, 4093, 9000])
def test_threads_read_from_shared_blocks(tmp_path, row_size):
    table, records = make_table(
        tmp_path, vocab_size=200, ids_per_shard=70, **{**BYTES, "row_size": row_size}
    )
    stride = table.layout.stride

    def read_often(store: RecordStore, seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            ids = random.permutation(200)[: random.integers(1, 64)]
            memory = empty_slots(64, stride)
            read = store.begin(ids, memory, np.arange(len(ids)))
            out = np.zeros((len(ids), stride), np.uint8)
            store.read(ids, out)
            read.wait()
            assert (out == records[ids]).all() and (memory[: len(ids)] == records[ids]).all()

    for way in ways_here():
        with open_by(way, table) as store, ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda seed, store=store: read_often(store, seed), range(6)))


# ----------------------------------------------------------------------------------- few reads


def reads_of(way: str, table, ids: list[int]) -> tuple[int, int]:
    """Bytes that a step and a longer read each bring."""
    memory = empty_slots(len(ids), table.layout.stride)
    with open_by(way, table) as store:
        store.begin(np.array(ids), memory, np.arange(len(ids))).wait()
        step = store.bytes_read
        store.read(np.array(ids), memory)
        return step, store.bytes_read - step


@pytest.mark.parametrize("way", [way for way in ("io_uring", "threads") if way in ways_here()])
def test_a_block_is_read_once_for_all_its_records(tmp_path, way):
    """Records of 512 bytes, eight to a block."""
    table, _ = make_table(tmp_path, vocab_size=100, **{**BYTES, "row_size": 508})
    for ids, num_blocks in (
        ([3], 1),
        ([7, 0, 3, 5], 1),
        ([7, 8], 2),
        ([0, 16, 8], 3),
        ([0, 40], 2),
        (list(range(64)), 8),
    ):
        assert reads_of(way, table, ids) == (num_blocks * BLOCK, num_blocks * BLOCK)


@needs_ring
def test_neighbouring_records_are_one_read(tmp_path, monkeypatch):
    table, records = make_table(tmp_path, vocab_size=100, **{**BYTES, "row_size": 3000})
    started: list[list[int]] = []
    with open_by("io_uring", table) as store:
        real = type(store._backend).start

        def start(self, fds, offsets, addresses, lengths):
            started.append(lengths)
            real(self, fds, offsets, addresses, lengths)

        monkeypatch.setattr(type(store._backend), "start", start)
        memory = empty_slots(4, table.layout.stride)
        store.begin(np.array([51, 50, 52, 10]), memory, np.arange(4)).wait()
    assert (memory == records[[51, 50, 52, 10]]).all()
    assert len(started[0]) == 2
