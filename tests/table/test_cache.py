"""The row cache against a model of it, from several threads, and when batches end badly."""

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from random_tables import make_table
from reading import Expected, open_reader_by

from lookup_experts.errors import TableError
from lookup_experts.table.batch import FillingFromStore, SlotBatch
from lookup_experts.table.cache import Arrival, RowCache, Taken
from lookup_experts.table.reading_thread import ThreadedRead

pytestmark = pytest.mark.timeout(60)

STRIDE, CACHED, WORKING, NUM_IDS = 64, 3, 6, 12


def pattern(id_: int) -> int:
    """What the record of an id is full of."""
    return 100 + id_


class Outcome:
    """A `PendingRead` that has ended: well, or badly."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def wait(self) -> None:
        if self.error is not None:
            raise self.error


# ------------------------------------------------------------------------ one step at a time


class Entry:
    """An id in the model: how many batches hold it, and whether its record is there."""

    def __init__(self, reader: "Batch") -> None:
        self.holders = 1
        self.reader: Batch | None = reader


class Batch:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.entries: dict[int, Entry] = {}
        self.missing: list[int] = []
        self.taken: Taken | None = None


class CacheAgainstItsModel(RuleBasedStateMachine):
    """Every step is made by a `RowCache` and by plain lists, which must agree on everything."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = RowCache(STRIDE, CACHED * STRIDE + STRIDE - 1, WORKING)
        self.batches: list[Batch] = []
        self.held: dict[int, Entry] = {}
        self.idle: list[int] = []  # least recently used first

    def pick(self, number: int, state: str) -> "Batch | None":
        """Some batch that is still reading, or that isn't."""
        fitting = [batch for batch in self.batches if bool(batch.missing) == (state == "reading")]
        return fitting[number % len(fitting)] if fitting else None

    @rule(ids=st.lists(st.integers(0, NUM_IDS - 1), max_size=WORKING + 2, unique=True))
    def take(self, ids: list[int]) -> None:
        batch = Batch(ids)
        misses = [id_ for id_ in ids if id_ not in self.held and id_ not in self.idle]
        kept = [id_ for id_ in self.idle if id_ not in ids]
        free = CACHED + WORKING - len(self.held) - len(self.idle)
        batch.taken = self.cache.take(ids)
        assert (batch.taken is None) == (len(misses) > free + len(kept))
        if batch.taken is None:
            return
        for id_ in ids:
            self._hold(batch, id_)
        self.idle = kept[max(0, len(misses) - free) :]
        assert [id_ for id_, _ in batch.taken.entries] == ids
        assert [id_ for id_, _ in batch.taken.missing] == misses == batch.missing
        waits_for = {batch.entries[id_].reader for id_ in ids if id_ not in misses} - {None}
        assert batch.taken.under_way == {other.taken.arrival for other in waits_for}
        self.batches.append(batch)

    def _hold(self, batch: Batch, id_: int) -> None:
        if id_ in self.held:
            self.held[id_].holders += 1
        else:
            self.held[id_] = Entry(batch)
            if id_ in self.idle:
                self.held[id_].reader = None
            else:
                batch.missing.append(id_)
        batch.entries[id_] = self.held[id_]

    @rule(number=st.integers(0, 99))
    def arrive(self, number: int) -> None:
        batch = self.pick(number, "reading")
        if batch is None:
            return
        for id_, slot in batch.taken.missing:
            self.cache.memory[slot.number] = pattern(id_)
        self.cache.arrived(batch.taken)
        for id_ in batch.missing:
            batch.entries[id_].reader = None
        batch.missing = []

    @rule(number=st.integers(0, 99))
    def fail(self, number: int) -> None:
        """The read fails; those who wait for it fail as well, and all let go."""
        batch = self.pick(number, "reading")
        if batch is None:
            return
        self.cache.forget(batch.taken)
        for id_ in batch.missing:
            del self.held[id_]
        failed = [
            other
            for other in self.batches
            if any(entry.reader is batch for entry in other.entries.values())
        ]
        for other in failed:
            for id_ in [id_ for id_, entry in other.entries.items() if entry.reader is batch]:
                del other.entries[id_]
        batch.missing = []
        self._release(batch)

    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        batch = self.pick(number, "done")
        if batch is not None:
            self._release(batch)

    def _release(self, batch: Batch) -> None:
        self.cache.release(batch.taken)
        for id_, entry in batch.entries.items():
            entry.holders -= 1
            if entry.holders == 0:
                del self.held[id_]
                self.idle.append(id_)
        self.idle = self.idle[max(0, len(self.idle) - CACHED) :]
        self.batches.remove(batch)
        self.cache.release(batch.taken)  # once more changes nothing

    @invariant()
    def the_same_ids_are_held_and_kept(self) -> None:
        assert list(self.cache._idle) == self.idle
        assert {id_: slot.holders for id_, slot in self.cache._held.items()} == {
            id_: entry.holders for id_, entry in self.held.items()
        }
        assert len(self.idle) <= CACHED

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        owners = [slot.number for slot in (*self.cache._held.values(), *self.cache._idle.values())]
        assert sorted(owners + self.cache._free) == list(range(CACHED + WORKING))

    @invariant()
    def records_that_are_there_are_right(self) -> None:
        for batch in self.batches:
            for id_, slot in batch.taken.entries:
                if id_ in batch.entries and batch.entries[id_].reader is None:
                    assert (self.cache.memory[slot.number] == pattern(id_)).all()

    @precondition(lambda self: not self.batches)
    @rule()
    def nothing_is_held_in_the_end(self) -> None:
        assert not self.cache._held


TestCacheAgainstItsModel = CacheAgainstItsModel.TestCase
TestCacheAgainstItsModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_budget_of_nothing_keeps_nothing():
    cache = RowCache(STRIDE, STRIDE - 1, WORKING)
    for _ in range(3):
        taken = cache.take([1, 2])
        assert len(taken.missing) == 2
        cache.arrived(taken)
        cache.release(taken)
    assert len(cache._free) == WORKING == len(cache.memory)


# -------------------------------------------------------------------------- several threads


class SlowStore:
    """Fills slots with the pattern of their id in a thread, a little later; may fail instead."""

    def __init__(self, failures: float = 0.0) -> None:
        self.threads = ThreadPoolExecutor(4)
        self.random = random.Random(0)
        self.failures = failures

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> ThreadedRead:
        return ThreadedRead(
            self.threads.submit(self._fill, ids, memory, slots, self.random.random())
        )

    def _fill(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray, luck: float) -> None:
        memory[slots] = 0xAA
        time.sleep(0.002 * self.random.random())
        if luck < self.failures:
            raise TableError("bad luck")
        memory[slots] = pattern(ids)[:, None]


def use(cache: RowCache, store: SlowStore, ids: list[int]) -> bool | None:
    """A batch from beginning to end: whether it got its records; None without enough slots."""
    taken = cache.take(ids)
    if taken is None:
        return None
    batch = SlotBatch(FillingFromStore(store, cache.memory), cache, taken)
    try:
        batch.begin()
        batch.wait()
    except TableError:
        with pytest.raises(TableError):
            batch.wait()
        return False
    else:
        for _ in range(3):
            for id_, slot in zip(ids, batch.slots(), strict=True):
                assert (cache.memory[slot] == pattern(id_)).all()
            time.sleep(0)
        return True
    finally:
        batch.release()


@pytest.mark.parametrize("failures", [0.0, 0.2])
@pytest.mark.parametrize("cached", [0, 3])
def test_threads_with_the_same_ids(failures, cached):
    cache, store = RowCache(STRIDE, cached * STRIDE, 10), SlowStore(failures)

    def use_often(seed: int) -> list[bool | None]:
        own = random.Random(seed)
        return [use(cache, store, own.sample(range(NUM_IDS), own.randint(1, 5))) for _ in range(60)]

    with ThreadPoolExecutor(5) as threads:
        outcomes = [one for some in threads.map(use_often, range(5)) for one in some]
    store.threads.shutdown()
    assert outcomes.count(True) > 60
    assert (False in outcomes) == (failures > 0)
    assert not cache._held and len(cache._idle) <= cached
    assert len(cache._free) + len(cache._idle) == 10 + cached


def test_an_arrival_between_two_looks(monkeypatch):
    """While one batch asks for a slot, the read that it would wait for ends in another thread."""
    cache = RowCache(STRIDE, 0, WORKING)
    first = cache.take([1])
    started = threading.Event()

    def arrive() -> None:
        started.set()
        cache.arrived(first)

    thread = threading.Thread(target=arrive)
    real = cache._hold

    def hold(id_):
        if not thread.is_alive():
            thread.start()
            started.wait()
            time.sleep(0.02)
        return real(id_)

    monkeypatch.setattr(cache, "_hold", hold)
    second = cache.take([1])
    thread.join()
    assert second.under_way == {first.arrival}


# ------------------------------------------------------------------------- batches that end badly


def test_who_waits_for_a_read_that_never_began_is_told():
    def refuse():
        raise TableError("no such disk")

    failed, abandoned = Arrival(), Arrival()
    with pytest.raises(TableError, match="no such disk"):
        failed.begin(refuse)
    with pytest.raises(TableError, match="no such disk"):
        failed.wait()
    abandoned.abandon()
    with pytest.raises(TableError, match="interrupted before it began"):
        abandoned.wait()


def test_ctrl_c_while_a_read_begins_is_for_that_thread_alone():
    def interrupt():
        raise KeyboardInterrupt

    arrival = Arrival()
    with pytest.raises(KeyboardInterrupt):
        arrival.begin(interrupt)
    with pytest.raises(TableError, match="interrupted"):
        arrival.wait()


@pytest.mark.parametrize("moment", range(1, 9))
def test_ctrl_c_while_slots_are_taken(monkeypatch, moment):
    """Nobody may later wait for a read that nobody will begin."""
    cache = RowCache(STRIDE, 0, 20)
    calls = []

    def interrupted(real):
        def call(*arguments):
            calls.append(real)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_hold", interrupted(cache._hold))
        patch.setattr(cache, "_free_slot", interrupted(cache._free_slot))
        with pytest.raises(KeyboardInterrupt):
            cache.take([1, 2, 3, 4])
    assert not cache._held
    assert len(cache.take([1, 2, 3, 4]).missing) == 4


class Gate:
    """A store whose reads end when `open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.thread = ThreadPoolExecutor(1)

    def begin(self, ids: np.ndarray, memory: np.ndarray, slots: np.ndarray) -> ThreadedRead:
        def fill() -> None:
            self.open.wait(10)
            memory[slots] = pattern(ids)[:, None]

        return ThreadedRead(self.thread.submit(fill))


def test_a_wait_that_is_interrupted_keeps_its_slots(monkeypatch):
    """The read goes on: other batches wait for it, and nobody else may use the slots until then."""
    cache, store = RowCache(STRIDE, 0, 4), Gate()
    filling = FillingFromStore(store, cache.memory)
    first = SlotBatch(filling, cache, cache.take([1, 2]))
    first.begin()
    second = SlotBatch(filling, cache, cache.take([1, 2]))
    with monkeypatch.context() as patch:
        patch.setattr(ThreadedRead, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            first.wait()
    slots = set(second.slots())
    third = SlotBatch(filling, cache, cache.take([3, 4]))
    assert not slots & set(third.slots())
    assert cache.take([5]) is None
    store.open.set()
    first.release()
    second.wait()
    assert [int(cache.memory[slot, 0]) for slot in second.slots()] == [pattern(1), pattern(2)]
    second.release()
    third.begin()
    third.release()
    assert not cache._held


def test_a_batch_that_nobody_waited_for_is_read_before_its_slots_are_given_back():
    cache, store = RowCache(STRIDE, 0, 2), Gate()
    batch = SlotBatch(FillingFromStore(store, cache.memory), cache, cache.take([1, 2]))
    batch.begin()
    with ThreadPoolExecutor(1) as other:
        releasing = other.submit(batch.release)
        assert not wait([releasing], timeout=0.05).done
        assert cache.take([3]) is None
        store.open.set()
        releasing.result(10)
    assert len(cache._free) == 2


def test_rows_may_be_collected_while_a_lock_is_held(tmp_path):
    """The garbage collector runs at any moment, in any thread: it must never wait for a lock."""
    table, records = make_table(tmp_path)
    with open_reader_by("mmap", table, cache_bytes=64 * 5) as reader, torch.no_grad():
        rows = reader.rows(torch.arange(9).view(1, -1))

        class Cycle:
            pass

        cycle = Cycle()
        cycle.own, cycle.rows = cycle, rows
        del cycle, rows
        collected = threading.Thread(target=gc.collect, daemon=True)
        with reader._cache._lock, reader._store._count_lock, reader._lock:
            collected.start()
            collected.join(10)
            assert not collected.is_alive()
        assert len(reader._cache._held) == 9
        ids = torch.arange(9, 20).view(1, -1)
        Expected(table, records).assert_right(reader.rows(ids), ids)
        assert len(reader._cache._held) == 11


def test_slots_of_a_batch_that_failed_are_given_back(tmp_path, monkeypatch):
    """Those of its hits too: the error must not keep the rows that it passed through alive."""
    table, records = make_table(tmp_path)
    ids = torch.arange(6).view(1, -1)
    with (
        open_reader_by("mmap", table, cache_bytes=40 * table.layout.stride) as reader,
        torch.no_grad(),
    ):
        Expected(table, records).assert_right(reader.rows(ids[:, :3]), ids[:, :3])
        with monkeypatch.context() as patch:

            def fail(*_):
                raise TableError("the disk is gone")

            patch.setattr(reader._store, "_fetch", fail)
            with pytest.raises(TableError, match="the disk is gone"):
                reader.rows(ids).mix(0, torch.rand(6, 2).half())
        gc.collect()
        reader._release_dropped()
        assert not reader._cache._held
        Expected(table, records).assert_right(reader.rows(ids), ids)
