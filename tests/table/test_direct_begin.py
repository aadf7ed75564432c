"""Reads that were begun: right records whoever waits, however often, and whatever interrupts."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from random_tables import make_table
from reading import empty_slots, needs_ring, open_by, open_files, ways_here

from lookup_experts.errors import TableError, UserError
from lookup_experts.table import uring
from lookup_experts.table.format import DATA_START
from lookup_experts.table.uring import ENTER, Ring

pytestmark = pytest.mark.timeout(30)

SIZES = {
    "small": {"row_size": 20, "encoding": "nf3"},
    "whole blocks": {"row_size": 1280, "num_experts": 4, "encoding": "bfloat16"},
    "straddling": {"row_size": 1700, "num_experts": 3, "encoding": "bfloat16"},
}
"""Records of 48, 20,480 and 20,400 bytes."""
RUBBISH = 0xAA


@pytest.fixture(params=ways_here())
def way(request):
    return request.param


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A table of each size, and its records. Don't change them."""
    return {
        name: make_table(
            tmp_path_factory.mktemp("table"), vocab_size=200, ids_per_shard=70, **SIZES[name]
        )
        for name in SIZES
    }


@pytest.fixture(scope="module")
def small(tables):
    return tables["small"]


@pytest.fixture(scope="module", params=["whole blocks", "straddling"])
def large(request, tables):
    return tables[request.param]


@pytest.fixture
def ring_store(large):
    with open_by("io_uring", large[0]) as store:
        yield store


def drawn(num_ids: int, num_slots: int, vocab_size: int = 200, seed: int = 0):
    """Ids and where to put them."""
    random = np.random.default_rng(seed)
    return random.permutation(vocab_size)[:num_ids], random.permutation(num_slots)[:num_ids]


def assert_there(memory, records, ids, slots) -> None:
    """Whether the slots hold the records, and nothing else was touched."""
    assert (memory[slots] == records[ids]).all()
    assert (np.delete(memory, slots, axis=0) == RUBBISH).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_ids", [1, 2, 16, 63, 64, 65, 200])
def test_any_number_of_ids_from_any_store(tables, way, size, num_ids):
    """Up to the depth of the ring, beyond it, and records smaller than a block."""
    table, records = tables[size]
    memory = empty_slots(220, table.layout.stride)
    ids, slots = drawn(num_ids, 220)
    with open_by(way, table, verify_checksums=num_ids % 2 == 0) as store:
        read = store.begin(ids, memory, slots)
        read.wait()
        assert_there(memory, records, ids, slots)
        memory[slots] = RUBBISH
        read.wait()  # once more: over is over
        assert (memory == RUBBISH).all()
        assert store.reads == 1


def test_nothing_to_read(large, way):
    with open_by(way, large[0]) as store:
        none = np.array([], np.int64)
        store.begin(none, empty_slots(1, large[0].layout.stride), none).wait()


def test_many_begun_before_the_first_is_waited_for(large, way):
    table, records = large
    memory = empty_slots(200, table.layout.stride)
    ids, slots = drawn(200, 200)
    with open_by(way, table) as store:
        parts = [slice(first, first + 20) for first in range(0, 200, 20)]
        reads = [store.begin(ids[part], memory, slots[part]) for part in parts]
        for read in reversed(reads):
            read.wait()
        assert_there(memory, records, ids, slots)


def test_two_threads_wait_for_one_read(large, way):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    with open_by(way, table) as store, ThreadPoolExecutor(2) as threads:
        for seed in range(20):
            memory[:] = RUBBISH
            ids, slots = drawn(20, 30, seed=seed)
            read = store.begin(ids, memory, slots)
            for waiting in [threads.submit(read.wait) for _ in range(2)]:
                waiting.result(10)
            assert_there(memory, records, ids, slots)


def test_threads_begin_and_wait_on_one_store(large, way):
    table, records = large

    def read_often(seed: int) -> None:
        memory = empty_slots(40, table.layout.stride)
        for step in range(15):
            memory[:] = RUBBISH
            ids, slots = drawn(1 + (seed + step) % 33, 40, seed=100 * seed + step)
            store.begin(ids, memory, slots).wait()
            assert_there(memory, records, ids, slots)

    with open_by(way, table) as store, ThreadPoolExecutor(5) as threads:
        list(threads.map(read_often, range(5)))
        assert store.reads == 75


@pytest.mark.parametrize("wrong", [-1, 200])
def test_an_id_outside_the_table(large, way, wrong):
    memory = empty_slots(2, large[0].layout.stride)
    with (
        open_by(way, large[0]) as store,
        pytest.raises(TableError, match=f"id {wrong} is not in the table"),
    ):
        store.begin(np.array([3, wrong]), memory, np.arange(2)).wait()


# ---------------------------------------------------------------------------- never waited for


def test_a_read_that_was_dropped_writes_into_memory_that_is_still_there(large, way):
    """Whatever becomes of the slots meanwhile, the next reads are right."""
    table, records = large
    with open_by(way, table) as store:
        for seed in range(5):
            ids, slots = drawn(20, 30, seed=seed)
            store.begin(ids, empty_slots(30, table.layout.stride), slots)
            others = [empty_slots(30, table.layout.stride) for _ in range(3)]
            time.sleep(0.002)
            assert all((other == RUBBISH).all() for other in others)
            store.begin(ids, others[0], slots).wait()
            assert_there(others[0], records, ids, slots)


@needs_ring
def test_a_ring_that_is_closed_has_no_read_under_way(large, monkeypatch):
    """A store that is dropped unclosed closes its rings: the kernel must not write after that."""
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    ended: list[int] = []
    real = Ring._drain

    def drain(self):
        real(self)
        ended.append(self._distance(self._cq_head, self._sq_tail))

    with open_by("io_uring", table) as store:
        read = store.begin(ids, memory, slots)
        monkeypatch.setattr(Ring, "_drain", drain)
        read._taken.ring.close()
        assert ended == [0]
        if not read._copies:
            assert_there(memory, records, ids, slots)
        store.under_way.clear()


def test_closing_ends_what_was_begun(large, way):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    before = open_files()
    with open_by(way, table) as store:
        read = store.begin(ids, memory, slots)
    assert_there(memory, records, ids, slots)
    read.wait()
    assert open_files() == before
    with pytest.raises(ValueError, match="is closed"):
        store.begin(ids, memory, slots)


def test_closing_at_once_does_not_hang(small, way):
    """The thread of `begin` may need a lock that closing holds."""
    table, records = small
    memory = empty_slots(200, table.layout.stride)
    for _ in range(20):
        with open_by(way, table) as store:
            parts = [np.arange(first, 200, 4) for first in range(2)]
            reads = [store.begin(part, memory, part) for part in parts]
        for read in reads:
            read.wait()
    assert (memory[::4] == records[::4]).all()


@needs_ring
def test_a_fork_leaves_the_read_to_its_parent(large, ring_store):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    read = ring_store.begin(ids, memory, slots)
    child = os.fork()
    if child == 0:
        try:
            read.wait()
        except UserError as error:
            ring_store.close()
            os._exit(7 if "after a fork" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    read.wait()
    assert_there(memory, records, ids, slots)
    ring_store.begin(ids, memory, slots).wait()


# -------------------------------------------------------------------------------- interrupted


@needs_ring
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("after_the_answers", [False, True])
def test_ctrl_c_in_a_wait_leaves_the_read_to_the_next_wait(
    large, ring_store, monkeypatch, times, after_the_answers
):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    read = ring_store.begin(ids, memory, slots)
    real = Ring._collect_answers

    def interrupted(self):
        if after_the_answers:
            time.sleep(0.01)
            real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ring, "_collect_answers", interrupted)
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                read.wait()
    other = empty_slots(30, table.layout.stride)
    ring_store.begin(ids[::-1].copy(), other, slots).wait()  # takes another ring
    assert_there(other, records, ids[::-1], slots)
    read.wait()
    assert_there(memory, records, ids, slots)
    assert not ring_store.under_way and len(ring_store._idle_rings) == 2


@needs_ring
def test_ctrl_c_while_reads_are_handed_over_leaves_none_under_way(large, ring_store, monkeypatch):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    real = uring._syscall

    def submit_then_interrupt(number, *arguments):
        monkeypatch.setattr(uring, "_syscall", real)
        ring_store._idle_rings or real(number, *arguments)
        raise KeyboardInterrupt

    ring_store.begin(ids, memory, slots).wait()
    memory[:] = RUBBISH
    monkeypatch.setattr(uring, "_syscall", submit_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        ring_store.begin(ids, memory, slots)
    ring_store.settle()
    memory[:] = RUBBISH
    assert len(ring_store._idle_rings) == 1 and not ring_store.under_way
    ring_store.begin(ids[:5], memory, slots[:5]).wait()
    assert_there(memory, records, ids[:5], slots[:5])


# --------------------------------------------------------------------- what the kernel may answer


def change_answers(monkeypatch, change) -> None:
    """Have rings come back with other results, once."""
    real = Ring.finish

    def changed(self):
        monkeypatch.setattr(Ring, "finish", real)
        answers = real(self)
        change(answers)
        return answers

    monkeypatch.setattr(Ring, "finish", changed)


@needs_ring
@pytest.mark.parametrize("count", [-errno.EINTR, -errno.EAGAIN, 0, 1000, 4096, 20479])
def test_a_read_that_came_back_short_is_completed(large, ring_store, monkeypatch, count):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)

    def short(answers):
        start = read._reads.targets[7]
        read._buffer[start + max(0, count) : start + read._reads.lengths[7]] = RUBBISH
        answers[7] = count

    change_answers(monkeypatch, short)
    read = ring_store.begin(ids, memory, slots)
    read.wait()
    assert_there(memory, records, ids, slots)


@needs_ring
def test_a_disk_error_names_the_id_and_stays_an_error(large, ring_store, monkeypatch):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    change_answers(monkeypatch, lambda answers: answers.__setitem__(7, -errno.EIO))
    read = ring_store.begin(ids, memory, slots)
    shard, offset = read._reads.shards[7], read._reads.offsets[7]
    first = table.shards[shard].first_id + (offset - DATA_START) // table.layout.stride
    named = min(ids[ids >= first])
    for _ in range(3):
        with pytest.raises(TableError, match=rf"0000\d.*id {named} at \d+: Input/output error"):
            read.wait()
    ring_store.begin(ids, memory, slots).wait()
    assert_there(memory, records, ids, slots)


@needs_ring
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
def test_a_kernel_that_takes_nothing(large, ring_store, monkeypatch, code):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    ring_store.begin(ids, memory, slots).wait()

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(uring, "_syscall", refuse)
        with pytest.raises(TableError, match=os.strerror(code)):
            ring_store.begin(ids, memory, slots).wait()
    memory[:] = RUBBISH
    ring_store.begin(ids, memory, slots).wait()
    assert_there(memory, records, ids, slots)


@needs_ring
def test_a_kernel_that_gives_up_leaves_no_read_under_way(large, ring_store, monkeypatch):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    read = ring_store.begin(ids, memory, slots)
    real_enter, real_collect = Ring._enter, Ring._collect_answers

    def give_up(self, wait_for):
        monkeypatch.setattr(Ring, "_enter", real_enter)
        monkeypatch.setattr(Ring, "_collect_answers", real_collect)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(Ring, "_enter", give_up)
    monkeypatch.setattr(Ring, "_collect_answers", lambda self: None)
    with pytest.raises(TableError, match="Cannot allocate memory"):
        read.wait()
    (taken,) = ring_store._idle_rings
    ring = taken.ring
    assert ring._distance(ring._cq_head, ring._sq_tail) == 0
    memory[:] = RUBBISH
    ring_store.begin(ids[:5], memory, slots[:5]).wait()
    assert_there(memory, records, ids[:5], slots[:5])


@needs_ring
def test_a_kernel_that_takes_some_now_and_some_later(large, ring_store, monkeypatch):
    table, records = large
    memory = empty_slots(70, table.layout.stride)
    ids, slots = drawn(64, 70)
    real = uring._syscall

    def take_three(number, *arguments):
        if number == ENTER and arguments[1] > 3:
            fd, _, _, flags = arguments
            return real(number, fd, 3, 0, flags)
        return real(number, *arguments)

    monkeypatch.setattr(uring, "_syscall", take_three)
    ring_store.begin(ids, memory, slots).wait()
    assert_there(memory, records, ids, slots)


@needs_ring
def test_no_file_left_for_a_second_ring(large, ring_store, monkeypatch):
    table, records = large
    memory = empty_slots(30, table.layout.stride)
    ids, slots = drawn(20, 30)
    first = ring_store.begin(ids, memory, slots)

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Ring, "__init__", refuse)
        with pytest.raises(TableError, match=r"Too many open files\. Raise the limit"):
            ring_store.begin(ids, memory, slots)
    first.wait()
    assert_there(memory, records, ids, slots)


# -------------------------------------------------------------------------------- few system calls


@needs_ring
def test_beside_a_busy_thread(tmp_path, monkeypatch):
    """A decoding step's batch gives up the interpreter twice, whoever else wants it."""
    table, records = make_table(tmp_path, vocab_size=32, num_layers=4, num_experts=4, row_size=2048)
    assert table.layout.stride == 2**16
    memory = empty_slots(16, table.layout.stride)
    ids, slots = drawn(16, 16, vocab_size=32)
    calls: list[int] = []
    real = uring._syscall
    stop = threading.Event()

    def be_busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    def counted(number, *arguments):
        calls.append(number)
        return real(number, *arguments)

    busy = threading.Thread(target=be_busy)
    with open_by("io_uring", table) as store:
        store.begin(ids, memory, slots).wait()
        monkeypatch.setattr(uring, "_syscall", counted)
        busy.start()
        try:
            seconds, begun = [], []
            for _ in range(15):
                calls.clear()
                started_at = time.perf_counter()
                read = store.begin(ids, memory, slots)
                begun.append(len(calls))
                read.wait()
                seconds.append(time.perf_counter() - started_at)
                assert len(calls) <= 4
        finally:
            stop.set()
            busy.join()
    assert_there(memory, records, ids, slots)
    assert begun == [1] * 15
    assert np.median(seconds) < 0.04
