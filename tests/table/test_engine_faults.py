"""The whole engine under stress: faults are errors that pass, memory stays as asked, no hangs."""

import errno
import gc
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from random_tables import flip_bit, make_table
from reading import Expected, needs_ring, open_files, open_reader_by, resident_bytes, ways_here

from lookup_experts.errors import TableError
from lookup_experts.table import reader as reader_module
from lookup_experts.table import store as store_module
from lookup_experts.table import uring
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape, plan_shards
from lookup_experts.table.manifest import TableManifest, write_manifest
from lookup_experts.table.opening import open_table
from lookup_experts.table.reader import GROUP_BYTES, SLOT_BATCH, TableReader
from lookup_experts.table.shard_writer import ShardWriter
from lookup_experts.table.store import RecordStore
from lookup_experts.table.store_choice import open_store
from lookup_experts.table.uring import Ring

pytestmark = pytest.mark.timeout(60)

VOCAB = 200
READING = [way for way in ways_here() if way != "memory"]
DIRECT = [way for way in ("io_uring", "threads") if way in ways_here()]
STEP = torch.tensor([[3, 150, 3, 7, 42]])
PROMPT = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).view(1, -1)
BATCHES = {"step": STEP, "prompt": PROMPT}


@pytest.fixture(scope="module", params=[512, 500], ids=["whole blocks", "straddling"])
def never_changed(request, tmp_path_factory):
    """A table of records of 12,288 or 12,000 bytes in three layers, and its records."""
    folder = tmp_path_factory.mktemp("table")
    return make_table(folder, **{**TABLE, "row_size": request.param})


TABLE = {
    "vocab_size": VOCAB,
    "num_layers": 3,
    "num_experts": 4,
    "row_size": 512,
    "encoding": "bfloat16",
    "ids_per_shard": 70,
}


def assert_fails(reader: TableReader, ids: torch.Tensor, message: str) -> None:
    """A batch fails in every layer, each time that it is asked for, and so does the next."""
    for _ in range(2):
        rows = None
        with pytest.raises(TableError, match=message):
            rows = reader.rows(ids)
            rows.mix(0, torch.rand(ids.numel(), 4).bfloat16())
        for layer in (0, 1, 2, 0):
            if rows is not None:
                with pytest.raises(TableError, match=message):
                    rows.mix(layer, torch.rand(ids.numel(), 4).bfloat16())
                with pytest.raises(TableError, match=message):
                    rows.layer(layer)


def everything_is_right(reader: TableReader, expected: Expected) -> None:
    for ids in (STEP, PROMPT, STEP.flip(1), PROMPT[:, :60]):
        expected.assert_right(reader.rows(ids), ids)


# ---------------------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("cached", [0, 5, 500])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", DIRECT)
def test_a_disk_error_passes(never_changed, monkeypatch, way, batch, cached):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def broken_read(self, fds, offsets, lengths, buffer, targets):
        return np.full(len(targets), -errno.EIO)

    table, records = never_changed
    expected = Expected(table, records)
    with (
        open_reader_by(way, table, cache_bytes=cached * table.layout.stride) as reader,
        torch.no_grad(),
    ):
        some = torch.tensor([[3, 9]])  # one of them is asked for again below
        expected.assert_right(reader.rows(some), some)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            patch.setattr(Ring, "read", broken_read)
            patch.setattr(Ring, "finish", lambda self: [-errno.EIO] * len(self._answers))
            assert_fails(reader, BATCHES[batch], "Input/output error")
        everything_is_right(reader, expected)
        assert len(reader._cache._held) <= SLOT_BATCH


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", READING)
def test_a_shard_truncated_while_open_and_mended(tmp_path, way, batch):
    table, records = make_table(tmp_path, **TABLE)
    expected = Expected(table, records)
    path = table.path(table.shards[2])
    content = path.read_bytes()
    with open_reader_by(way, table) as reader, torch.no_grad():
        everything_is_right(reader, expected)
        os.truncate(path, 4096 + 5 * table.layout.stride - 100)
        assert_fails(reader, BATCHES[batch], "00003-of-00003.*truncated while open")
        untouched = torch.tensor([[0, 5, 69]])
        expected.assert_right(reader.rows(untouched), untouched)
        with path.open("r+b") as file:  # the same file, not another of its name
            file.write(content)
        everything_is_right(reader, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", READING)
def test_a_flipped_bit_is_found_with_checksums(tmp_path, way, batch):
    table, records = make_table(tmp_path, **TABLE)
    expected = Expected(table, records)
    shard = table.shards[2]
    place = table.path(shard), table.layout.record_offset(150 - shard.first_id) + 9000
    flip_bit(*place)
    with (
        open_reader_by(way, table, cache_bytes=10**6, verify_checksums=True) as reader,
        torch.no_grad(),
    ):
        assert_fails(reader, BATCHES[batch], "id 150 is damaged: its checksum")
        untouched = torch.tensor([[3, 7, 149, 151]])
        expected.assert_right(reader.rows(untouched), untouched)
        assert_fails(reader, BATCHES[batch], "id 150 is damaged: its checksum")
        flip_bit(*place)
        everything_is_right(reader, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", READING)
def test_a_scale_that_is_not_finite_is_found(tmp_path, way, batch):
    table, records = make_table(tmp_path, **{**TABLE, "encoding": "nf4"})
    end, shard = table.layout.record_bytes, table.shards[2]
    records[150, end - 2 : end] = np.array([np.nan], np.float16).view(np.uint8)
    with ShardWriter(table.path(shard), table.layout, shard, "a fingerprint") as writer:
        writer.write(150 - shard.first_id, records[150:151])
    with open_reader_by(way, table) as reader, torch.no_grad():
        assert_fails_of_any_type(reader, BATCHES[batch], "id 150 is damaged: a number or scale")
        others = torch.tensor([[3, 7, 149, 151]])
        Expected(table, records).assert_right(reader.rows(others), others)


def test_a_long_prompt_is_checked_before_its_parts_are_read(tmp_path, monkeypatch):
    """Prompts that are read in parts: the damage is in the last layer's part of a record."""
    monkeypatch.setattr(reader_module, "GROUP_BYTES", 2**20)
    monkeypatch.setattr(store_module, "_CHECKED_BYTES", 2**20)
    table, records = make_table(tmp_path, **TABLE)
    shard = table.shards[2]
    place = table.path(shard), table.layout.record_offset(150 - shard.first_id) + 12_000
    for way in READING:
        with (
            open_reader_by(way, table, verify_checksums=True) as reader,
            torch.no_grad(),
        ):
            Expected(table, records).assert_right(reader.rows(PROMPT), PROMPT)
            assert len(reader.rows(PROMPT)._groups) == 3
            flip_bit(*place)
            with pytest.raises(TableError, match="id 150 is damaged: its checksum"):
                reader.rows(PROMPT).mix(0, torch.ones(VOCAB, 4).bfloat16())
            flip_bit(*place)


def assert_fails_of_any_type(reader: TableReader, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(TableError, match=message):
        reader.rows(ids).layer(0)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_without_io_uring(never_changed, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    table, records = never_changed
    monkeypatch.setattr(uring, "_syscall", refuse)
    with open_store(table, "direct", notify=lambda message: None) as store, torch.no_grad():
        reader = TableReader(table, store, torch.bfloat16)
        everything_is_right(reader, Expected(table, records))
        assert reader.stats().backend == "preadv x8 threads"
        reader.close()


@pytest.mark.skipif("io_uring" not in DIRECT, reason="no io_uring here")
def test_no_file_left_for_another_ring(never_changed, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    table, records = never_changed
    with open_reader_by("io_uring", table) as reader, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(uring, "_syscall", refuse)
            with pytest.raises(TableError, match=r"Too many open files\. Raise the limit"):
                reader.rows(STEP)
        everything_is_right(reader, Expected(table, records))


GONE = r"The thread that reads the table has ended \(RuntimeError: cannot schedule"


@pytest.mark.parametrize("way", ways_here())
@pytest.mark.parametrize("whose", ["reader", "store"])
def test_threads_that_are_gone(never_changed, way, whose):
    """An error at once: nobody waits for a thread that is not there."""
    table, records = never_changed
    expected = Expected(table, records)
    with open_reader_by(way, table) as reader, torch.no_grad():
        everything_is_right(reader, expected)
        owner = reader if whose == "reader" else reader._store
        owner._thread = owner._thread or ThreadPoolExecutor(1)
        owner._thread.shutdown()
        for ids, reads_it in ((STEP, "store"), (PROMPT, "reader")):
            if whose == reads_it and needs_a_thread(reader, ids):
                assert_fails(reader, ids, GONE)
            else:
                expected.assert_right(reader.rows(ids), ids)
        owner._thread = ThreadPoolExecutor(1)
        everything_is_right(reader, expected)
        assert_slots_are_given_back(reader)


@pytest.mark.parametrize("batch", BATCHES)
def test_threads_of_a_slice_that_are_gone(never_changed, batch):
    table, records = never_changed
    with open_reader_by("threads", table) as reader, torch.no_grad():
        backend = reader._store._backend
        backend.close()
        assert_fails(reader, BATCHES[batch], GONE)
        backend._threads = ThreadPoolExecutor(8)
        everything_is_right(reader, Expected(table, records))
        assert_slots_are_given_back(reader)


def needs_a_thread(reader: TableReader, ids: torch.Tensor) -> bool:
    """Not where all records are in memory, nor for a step, which io_uring reads by itself."""
    step_by_itself = isinstance(getattr(reader._store, "_backend", None), Ring)
    return reader._store.name != "memory" and not (step_by_itself and ids is STEP)


def assert_slots_are_given_back(reader: TableReader) -> None:
    gc.collect()
    reader._release_dropped()
    cache = reader._cache
    assert not cache._held
    assert len(cache._free) + len(cache._idle) == len(cache.memory)


ENDED = r"The thread that reads the table has ended \(SystemExit"


@pytest.mark.parametrize("cached", [0, 500])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", READING)
def test_a_thread_that_ends_while_it_reads(never_changed, monkeypatch, way, batch, cached):
    """It is an error of the batch, not the end of the model's thread."""
    table, records = never_changed
    expected = Expected(table, records)
    ids = BATCHES[batch]
    with (
        open_reader_by(way, table, cache_bytes=cached * table.layout.stride) as reader,
        torch.no_grad(),
    ):
        store = reader._store
        fetch = store._fetch

        def fetch_half(ids: np.ndarray, out: np.ndarray, start: int) -> int:
            half = len(ids) // 2
            fetch(ids[:half], out[:half], start)
            raise SystemExit

        def end(*arguments: object) -> None:  # whole blocks go straight into their slots
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(store, "_fetch", fetch_half)
            patch.setattr(store, "_read_into", end)
            if needs_a_thread(reader, ids):
                assert_fails(reader, ids, ENDED)
            else:
                expected.assert_right(reader.rows(ids), ids)
            with torch.enable_grad():
                assert_fails(reader, ids, ENDED)
        everything_is_right(reader, expected)
        assert_slots_are_given_back(reader)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_thread_that_ends_while_it_reads_a_slice(never_changed, monkeypatch, batch):
    real = os.preadv

    def end(*arguments):
        done = real(*arguments)
        if threading.current_thread().name.startswith("table-read_"):
            raise SystemExit
        return done

    table, records = never_changed
    with open_reader_by("threads", table) as reader, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", end)
            assert_fails(reader, BATCHES[batch], ENDED)
        everything_is_right(reader, Expected(table, records))
        assert_slots_are_given_back(reader)


@pytest.mark.parametrize("way", ways_here())
def test_a_closed_reader(never_changed, way):
    table, records = never_changed
    with open_reader_by(way, table) as reader, torch.no_grad():
        begun = reader.rows(STEP)
        reader.close()
        Expected(table, records).assert_right(begun, STEP)
        for ids in (STEP, PROMPT):
            with pytest.raises(ValueError, match="is closed"):
                reader.rows(ids)
            with torch.enable_grad(), pytest.raises(ValueError, match="is closed"):
                reader.rows(ids)


@pytest.mark.parametrize("way", ways_here())
def test_ctrl_c_while_a_model_waits(never_changed, monkeypatch, way):
    """In a notebook the same reader goes on afterwards; ids that were under way are right."""
    table, records = never_changed
    expected = Expected(table, records)

    def interrupted(self, pending):
        raise KeyboardInterrupt

    with open_reader_by(way, table, cache_bytes=10**5) as reader, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(reader_module.WaitClock, "wait", interrupted)
            for ids in (STEP, PROMPT, STEP + 1):
                rows = reader.rows(ids)
                try:
                    rows.layer(0)
                except KeyboardInterrupt:
                    del rows
        everything_is_right(reader, expected)
        expected.assert_right(reader.rows(STEP + 1), STEP + 1)


@pytest.mark.parametrize("way", READING)
def test_ctrl_c_just_after_a_read_began(never_changed, monkeypatch, way):
    """Nobody holds what was begun, so its slots are free only when it is over."""
    table, records = never_changed

    def begin_then_interrupt(real):
        def begin(*arguments):
            real(*arguments)
            raise KeyboardInterrupt

        return begin

    with open_reader_by(way, table) as reader, torch.no_grad():
        store, memory = reader._store, reader._cache.memory
        some = torch.arange(60)[None]
        with monkeypatch.context() as patch:
            patch.setattr(store, "begin", begin_then_interrupt(store.begin))
            slow_reads(patch, store)
            with pytest.raises(KeyboardInterrupt):
                reader.rows(some)
        memory[:] = 0xAA
        time.sleep(0.1)
        assert (memory == 0xAA).all()
        everything_is_right(reader, Expected(table, records))
        assert_slots_are_given_back(reader)


def slow_reads(patch: pytest.MonkeyPatch, store: RecordStore) -> None:
    """Where a thread of ours reads; the kernel takes its own time."""
    fetch = store._fetch

    def late(*arguments):
        time.sleep(0.05)
        return fetch(*arguments)

    patch.setattr(store, "_fetch", late)


@needs_ring
def test_ctrl_c_between_the_kernel_and_the_reader(never_changed, monkeypatch):
    """As above, where the ring has handed the read over and the store hasn't noted it."""
    table, records = never_changed
    start = Ring.start

    def start_then_interrupt(self, *arguments):
        start(self, *arguments)
        raise KeyboardInterrupt

    with open_reader_by("io_uring", table) as reader, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(Ring, "start", start_then_interrupt)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    reader.rows(STEP)
        assert not reader._store.under_way
        (taken,) = reader._store._idle_rings
        ring = taken.ring
        assert ring._distance(ring._cq_head, ring._sq_tail) == 0
        everything_is_right(reader, Expected(table, records))
        assert_slots_are_given_back(reader)


# ------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("cached", [0, 20])
@pytest.mark.parametrize("way", ways_here())
def test_threads_share_a_reader(never_changed, way, cached):
    """Steps and prompts over the same few ids; some are dropped before their rows are there."""
    table, records = never_changed
    expected = Expected(table, records)
    with (
        open_reader_by(way, table, cache_bytes=cached * table.layout.stride) as reader,
        ThreadPoolExecutor(4) as threads,
    ):

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            for step in range(12):
                length = (1, 3, 40, 90)[(seed + step) % 4]
                ids = torch.randint(0, VOCAB // 2, (1, length), generator=generator)
                with torch.inference_mode():
                    rows = reader.rows(ids)
                    if step % 5:
                        expected.assert_right(rows, ids)

        for working in [threads.submit(work, seed) for seed in range(4)]:
            working.result(50)
        with torch.no_grad():
            everything_is_right(reader, expected)


def read_in_a_process(folder: Path, way: str, seed: int) -> None:
    torch.set_num_threads(1)
    table = open_table(folder)
    records = np.load(folder / "records.npy")
    generator = torch.Generator().manual_seed(seed)
    with open_reader_by(way, table, cache_bytes=10**6) as reader, torch.no_grad():
        for step in range(20):
            ids = torch.randint(0, VOCAB, (1, 5 if step % 2 else 100), generator=generator)
            Expected(table, records).assert_right(reader.rows(ids), ids)


def test_processes_share_a_table(tmp_path):
    _, records = make_table(tmp_path, **TABLE)
    np.save(tmp_path / "records.npy", records)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2) as pool:
        tasks = [(tmp_path, way, seed) for seed, way in enumerate(ways_here())]
        pool.starmap_async(read_in_a_process, tasks, chunksize=1).get(50)


# ----------------------------------------------------------------------------- reading ahead


class SlowReads:
    """Makes the reads of a store slow, and notes what is done when."""

    def __init__(self, store, seconds: float) -> None:
        self.events: list[tuple[str, int]] = []
        self.in_use: int | None = None
        """Address of the buffer that is in use."""
        self.spoiled = False
        self._seconds, self._read = seconds, store.read
        store.read = self.read

    def read(self, ids: np.ndarray, out: np.ndarray, start: int = 0) -> None:
        self.events.append(("begin", start))
        time.sleep(self._seconds)
        self.spoiled |= self.in_use == out.ctypes.data
        self._read(ids, out, start)
        self.events.append(("end", start))


def test_groups_are_read_while_others_are_used(tmp_path, monkeypatch):
    layers, group = 6, 4096 * 2
    table, records = make_table(
        tmp_path, **{**TABLE, "num_layers": layers, "num_experts": 2, "row_size": 4096 // 2}
    )
    assert table.layout.layer_bytes == group
    monkeypatch.setattr(reader_module, "GROUP_BYTES", 1)
    expected = Expected(table, records)
    ids = PROMPT
    with open_reader_by("mmap", table) as reader, torch.no_grad():
        slow = SlowReads(reader._store, 0.03)
        rows = reader.rows(ids)
        for layer in range(layers):
            buffer = rows._codes(layer).untyped_storage().data_ptr()
            slow.in_use = buffer
            slow.events.append(("use", layer * group))
            expected.assert_right(rows, ids, [layer])
            time.sleep(0.02)
            slow.events.append(("used", layer * group))
            slow.in_use = None
    assert not slow.spoiled

    def when(what: str, layer: int) -> int:
        return slow.events.index((what, layer * group))

    for layer in range(layers):
        assert when("end", layer) < when("use", layer)
        if layer + 1 < layers:
            assert when("use", layer) < when("end", layer + 1)  # it didn't wait for the next
            assert when("begin", layer + 1) < when("used", layer)  # which was under way
        if layer + 2 < layers:
            assert when("used", layer) < when("begin", layer + 2)  # in the same buffer


# ------------------------------------------------------------------------- memory and descriptors


@pytest.mark.parametrize("cached", [0, 50])
@pytest.mark.parametrize("way", READING)
def test_ten_thousand_steps_leave_nothing_behind(tmp_path, way, cached):
    table, _ = make_table(tmp_path, vocab_size=100, num_layers=1, row_size=1024)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 100, (5000, 1, 1), generator=generator).unbind()
    weights = torch.rand(1, 2).half()
    with (
        open_reader_by(way, table, cache_bytes=cached * table.layout.stride) as reader,
        torch.inference_mode(),
    ):

        def run(steps) -> None:
            for number, ids in enumerate(steps):
                rows = reader.rows(ids)
                if number % 9:  # now and then a forward pass fails before it needs rows
                    rows.mix(0, weights)

        run(steps[:1000])
        before = open_files(), threading.active_count(), resident_bytes()
        run(steps)
        run(steps)
        assert (open_files(), threading.active_count()) == before[:2]
        assert resident_bytes() - before[2] < 2_000_000


def zero_table(folder: Path, shape: TableShape):
    """A table of zeros, made without writing them."""
    folder.mkdir(exist_ok=True)
    layout = RecordLayout(shape, get_encoding("float16"))
    shards = plan_shards(layout)
    for shard in shards:
        ShardWriter(folder / shard.file, layout, shard, "a fingerprint").close()
    write_manifest(folder, TableManifest(layout, tuple(shards), "a fingerprint", None, None, "us"))
    return open_table(folder)


TAKEN = """
import sys
from pathlib import Path
import torch
from reading import open_reader_by, resident_bytes
from lookup_experts.table.opening import open_table

table = open_table(Path(sys.argv[1]))
ids = torch.arange(table.layout.shape.vocab_size).unbind()
with open_reader_by(sys.argv[2], table, cache_bytes=table.layout.table_bytes) as reader:
    begun = resident_bytes()
    reader.take_cache_memory()
    taken = resident_bytes()
    with torch.inference_mode():
        for id_ in ids:
            reader.rows(id_.view(1, 1)).mix(0, torch.ones(1, 4).half())
        reader.take_cache_memory()  # with records in it nothing happens
        first_read = reader.stats().bytes_read
        for id_ in ids:
            reader.rows(id_.view(1, 1)).mix(0, torch.ones(1, 4).half())
        assert reader.stats().bytes_read == first_read == table.layout.table_bytes
    print(taken - begun, resident_bytes() - taken)
"""

MEASURE = """
import json, sys
from pathlib import Path
import torch
from reading import open_reader_by, resident_bytes
from lookup_experts.table.opening import open_table

torch.set_num_threads(1)

def grown(folder, way, cache_bytes, length, verify_checksums=False):
    table = open_table(Path(folder))
    shape = table.layout.shape
    opened = open_reader_by(way, table, None, cache_bytes, verify_checksums)
    with opened as reader:
        before = most = 0
        for first in (None, *range(0, shape.vocab_size, length)):
            ids = torch.zeros(1, 300 if length > 64 else 1, dtype=torch.int64)
            if first is not None:
                ids = torch.arange(first, min(shape.vocab_size, first + length)).view(1, -1)
            rows = None  # as a model does: the slots of a batch are free before the next
            rows = reader.rows(ids)
            for layer in range(shape.num_layers):
                rows.mix(layer, torch.rand(ids.numel(), shape.num_experts).half())
                if length > 64:
                    most = max(most, resident_bytes())
            before = before or resident_bytes()
        return max(most, resident_bytes()) - before

with torch.inference_mode():
    print(json.dumps([grown(*case) for case in json.loads(sys.argv[1])]))
"""

SLACK = 3_000_000
"""For Python objects, and pages of libraries touched for the first time."""


def test_memory_stays_as_asked(tmp_path, run_python):
    """What a fresh process gains by reading a whole table: the cache's budget and, beside it, the
    slots of the batch under way, or, for a prompt, two buffers; not the table, nor the page cache.
    """
    way, stride, budget = DIRECT[0], 2**16, 40 * 2**20
    steps, prompts = tmp_path / "steps", tmp_path / "prompts"
    assert zero_table(steps, TableShape(1200, 4, 4, 2048)).layout.stride == stride
    assert zero_table(prompts, TableShape(2000, 24, 4, 1024)).layout.table_bytes > 390_000_000
    straddling = tmp_path / "straddling"
    assert zero_table(straddling, TableShape(1200, 4, 4, 2040)).layout.stride == 65_280
    cases = [
        (str(steps), way, 0, 1),
        (str(steps), way, 0, SLOT_BATCH),
        (str(steps), way, budget, 1),
        (str(steps), way, budget, SLOT_BATCH),
        (str(prompts), way, 0, 2000),
        (str(straddling), way, 0, SLOT_BATCH),
    ]
    code, out, err = run_python(MEASURE, json.dumps(cases))
    assert code == 0, err
    single, batches, cached, cached_batches, prompt, with_blocks = json.loads(out)
    assert single < 2 * stride + SLACK
    assert batches < SLOT_BATCH * stride + SLACK
    assert with_blocks < 2 * SLOT_BATCH * stride + SLACK  # and what they are copied from
    assert 0.98 * budget < cached < 1.05 * budget + 2 * stride
    assert 0.98 * budget < cached_batches < budget + SLOT_BATCH * stride + SLACK
    mixed = 2000 * 1024 * (4 + 2)  # a layer's sums in float32, and rounded
    assert prompt < 2 * GROUP_BYTES + 2 * mixed + SLACK


def test_memory_of_a_prompt_is_bounded_with_checksums_too(tmp_path, run_python):
    """Records are checked whole, a few at a time, before they are read in parts."""
    shape = {"vocab_size": 1000, "num_layers": 12, "num_experts": 4, "row_size": 1024}
    table, _ = make_table(tmp_path, **shape)
    checked = 2**24
    mixed = 1000 * 1024 * (4 + 2)
    bound = 2 * GROUP_BYTES + checked + 2 * mixed + SLACK
    assert table.layout.table_bytes > 1.4 * bound
    code, out, err = run_python(MEASURE, json.dumps([(str(tmp_path), DIRECT[0], 0, 1000, True)]))
    assert code == 0, err
    assert json.loads(out)[0] < bound


def test_a_server_takes_the_memory_of_its_cache_at_once(tmp_path, run_python):
    table = zero_table(tmp_path, TableShape(600, 4, 4, 2048))
    code, out, err = run_python(TAKEN, str(tmp_path), DIRECT[0])
    assert code == 0, err
    taken, later = map(int, out.split())
    budget = table.layout.table_bytes
    assert budget <= taken < 1.05 * budget + SLACK + SLOT_BATCH * table.layout.stride
    assert later < SLACK


def test_a_long_prompt_takes_two_buffers(tmp_path):
    table = zero_table(tmp_path, TableShape(2000, 24, 4, 1024))
    with open_reader_by(DIRECT[-1], table) as reader, torch.no_grad():
        rows = reader.rows(torch.arange(2000).view(1, -1))
        sizes = [len(buffer) for buffer in rows._buffers]
    assert len(sizes) == 2
    assert max(sizes) <= max(GROUP_BYTES, 2000 * table.layout.layer_bytes)


def test_a_budget_beyond_the_table_costs_nothing(never_changed):
    table, records = never_changed
    with open_reader_by("mmap", table, cache_bytes=2**50) as reader, torch.no_grad():
        assert len(reader._cache.memory) == VOCAB + SLOT_BATCH
        everything_is_right(reader, Expected(table, records))
