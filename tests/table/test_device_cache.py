"""Records of a table on disk within reach of a device, by the kernels' references: with the worker
in a thread, and as the process that it is. The kernels are in `test_device_cache_kernels.py`."""

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from miss_worker_here import CPU, SlowWords, fetched, open_here
from random_tables import flip_bit, make_table
from reading import open_files

from lookup_experts.errors import TableError, UserError
from lookup_experts.table import device_cache, miss_process
from lookup_experts.table.counts import keep_counts
from lookup_experts.table.device_cache import CachedRecords
from lookup_experts.table.encoding import ENCODINGS
from lookup_experts.table.miss_messages import BROKEN, MOST_POSITIONS
from lookup_experts.table.opening import open_table

VOCAB = 300


@pytest.fixture(scope="module")
def table_of_300(tmp_path_factory):
    """(table, its records): 300 ids in three shards, records of a block."""
    folder = tmp_path_factory.mktemp("device-cache") / "table"
    return make_table(folder, vocab_size=VOCAB, row_size=512, ids_per_shard=100)


@contextmanager
def open_records(table, hot=0, ram=0, **options):
    """With a process, as it is used."""
    stride = table.layout.stride
    records = CachedRecords(table, CPU, hot * stride, ram * stride, **options)
    try:
        yield records
    finally:
        records.close()


def random_steps(count, seed=0, vocab_size=VOCAB):
    """Ids of steps of all sizes, some with duplicates, some of few frequent ids, with both ends."""
    generator = random.Random(seed)
    for number in range(count):
        size = generator.choice([1, 1, 2, 8, 31, 32, MOST_POSITIONS])
        few = generator.random() < 0.5
        ids = [generator.randrange(min(vocab_size, 40) if few else vocab_size) for _ in range(size)]
        if number % 5 == 0:
            ids[0] = 0
            ids[-1] = vocab_size - 1
        yield ids


def await_worker(cache):
    """Until it has seen the last step."""
    ends_at = time.monotonic() + 20
    while cache._process.worker._handled != int(cache._counts[0]):
        assert time.monotonic() < ends_at
        time.sleep(0.001)


def assert_steps_are_right(cache, records, steps):
    for ids in steps:
        assert np.array_equal(fetched(cache, ids), records[ids]), ids
        cache.check()


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_records_are_the_tables(tmp_path, encoding):
    """Of every encoding, whose strides differ; hardly any is whole blocks."""
    table, records = make_table(
        tmp_path / "table", vocab_size=VOCAB, encoding=encoding, ids_per_shard=77, row_size=24
    )
    with open_here(table, hot=7, ram=MOST_POSITIONS) as cache:
        assert_steps_are_right(cache, records, random_steps(60))


@pytest.mark.parametrize("hot", [0, 1, 40, VOCAB - 1])
def test_any_split_between_device_and_ram(table_of_300, hot):
    table, records = table_of_300
    with open_here(table, hot=hot, ram=70) as cache:
        assert (cache.num_hot, cache.num_ram) == (hot, 70 if hot < 230 else MOST_POSITIONS)
        assert_steps_are_right(cache, records, random_steps(60, seed=hot))
        counts = cache.counts()
        num_ids = sum(map(len, random_steps(60, seed=hot)))
        assert counts.ids == num_ids
        assert counts.bytes_read == counts.records_read * table.layout.stride
        assert counts.hot_hits + counts.ram_hits + counts.records_read <= num_ids


def test_a_version_1_table(tmp_path):
    table, records = make_table(tmp_path / "table", vocab_size=50, version=1)
    with open_here(table, hot=3) as cache:
        assert cache.num_ram == 50  # more never is of use
        assert_steps_are_right(cache, records, random_steps(20, vocab_size=50))


def test_parts_of_records(table_of_300):
    table, records = table_of_300
    with open_here(table, hot=2) as cache:
        ids = [0, 299, 5, 0]
        for start, width in ((0, 16), (16, 2048), (4080, 16), (0, 4096)):
            expected = records[ids, start : start + width]
            assert np.array_equal(fetched(cache, ids, start, width), expected)
        for start, width in ((8, 16), (0, 24), (4096, 16), (-16, 32)):
            with pytest.raises(ValueError, match="multiples of 16"):
                fetched(cache, ids, start, width)


@pytest.mark.parametrize("seed", range(4))
def test_late_words_and_late_reads(table_of_300, seed):
    """Whatever is written late on either side, nothing is lost, and nothing is read too early."""
    table, records = table_of_300
    with open_here(table, hot=5, ram=MOST_POSITIONS, slow=0.003, seed=seed) as cache:
        requests, counts, replies = cache._shared
        cache._shared = (SlowWords(requests, seed, 0.002), counts, replies)
        pauses = random.Random(seed)
        for ids in random_steps(25, seed):
            time.sleep(pauses.choice([0, 0, 0.001, 0.01]))
            assert np.array_equal(fetched(cache, ids), records[ids])


def test_slots_go_to_the_first_and_the_most_recent(table_of_300):
    table, records = table_of_300
    with open_here(table, hot=2, ram=MOST_POSITIONS) as cache:
        fetched(cache, [10, 11])  # on the device from now on
        fetched(cache, list(range(100, 164)))  # all of RAM
        fetched(cache, [100])  # so 101 was used least recently
        await_worker(cache)  # it may miss a step of hits alone
        fetched(cache, [10, 11, 200])
        before = cache.counts()
        assert np.array_equal(
            fetched(cache, [10, 11, 100, 102, 200]), records[[10, 11, 100, 102, 200]]
        )
        after = cache.counts()
        assert after.records_read == before.records_read
        assert after.hot_hits - before.hot_hits == 2
        assert after.ram_hits - before.ram_hits == 3
        fetched(cache, [101])
        assert cache.counts().records_read == before.records_read + 1


def test_a_step_never_evicts_what_it_reads(table_of_300):
    """As many slots as positions: everything else goes, and what the step uses stays."""
    table, records = table_of_300
    with open_here(table, ram=MOST_POSITIONS) as cache:
        fetched(cache, list(range(64)))
        for first in range(1, 200, 7):
            ids = [*range(first, first + 63), 0]
            read = cache.counts().records_read
            assert np.array_equal(fetched(cache, ids), records[ids])
            assert cache.counts().records_read - read <= 7


def test_an_id_that_a_step_has_often_is_read_once(table_of_300):
    table, records = table_of_300
    with open_here(table, hot=1) as cache:
        assert np.array_equal(fetched(cache, [7] * 64), records[[7] * 64])
        assert cache.counts().records_read == 1
        fetched(cache, [8, 7, 8])
        counts = cache.counts()
        assert (counts.records_read, counts.hot_hits, counts.ram_hits) == (2, 1, 0)


def test_ids_outside_of_the_table(table_of_300):
    table, records = table_of_300
    with open_here(table, hot=2) as cache:
        for wrong in (-1, VOCAB, 2**62, -(2**62)):
            found = fetched(cache, [3, wrong, 299])
            assert np.array_equal(found[[0, 2]], records[[3, 299]])
            assert (found[1] == 0xFF).all()
            with pytest.raises(TableError, match=f"Token id {wrong} is outside"):
                cache.check()
            cache.check()  # told once
        assert_steps_are_right(cache, records, random_steps(10))


def test_places_of_an_earlier_step(table_of_300):
    with open_here(table_of_300[0]) as cache:
        places = cache.locate(torch.tensor([1, 2]))
        out = torch.zeros((2, 4096), dtype=torch.uint8)
        cache.gather(places, 0, out)
        cache.locate(torch.tensor([3, 4]))
        with pytest.raises(ValueError, match="the last call of `locate`"):
            cache.gather(places, 0, out)


def test_more_than_a_step(table_of_300):
    with open_here(table_of_300[0]) as cache:
        with pytest.raises(ValueError, match="at most 64"):
            cache.locate(torch.zeros(65, dtype=torch.int64))
        with pytest.raises(ValueError, match="int64"):
            cache.locate(torch.zeros(2, dtype=torch.int32))
        assert len(cache.locate(torch.zeros(0, dtype=torch.int64))) == 0


def test_a_record_that_is_damaged_for_a_while(tmp_path):
    table, records = make_table(tmp_path / "table", vocab_size=VOCAB, row_size=512)
    path = table.path(table.shards[0])
    with open_here(table, hot=3, ram=MOST_POSITIONS, verify_checksums=True) as cache:
        fetched(cache, [1, 2])
        for _ in range(3):
            flip_bit(path, table.layout.record_offset(17) + 5)
            found = fetched(cache, [16, 17, 18, 17, 1])
            assert np.array_equal(found[[0, 2, 4]], records[[16, 18, 1]])
            assert (found[[1, 3]] == 0xFF).all()
            with pytest.raises(TableError, match=f"{path}: the record of id 17 is damaged"):
                cache.check()
            assert (fetched(cache, [17]) == 0xFF).all()  # tried again
            with pytest.raises(TableError, match="id 17"):
                cache.check()
            flip_bit(path, table.layout.record_offset(17) + 5)
            assert np.array_equal(fetched(cache, [17]), records[[17]])
            assert_steps_are_right(cache, records, random_steps(10))
            fetched(cache, list(range(100, 164)))  # evicts it, if it came to RAM


def test_records_that_can_never_be_read_cost_no_slot(table_of_300, tmp_path):
    table, records = make_table(tmp_path / "table", vocab_size=VOCAB, row_size=512)
    with open_here(table, hot=3, ram=MOST_POSITIONS) as cache:
        with table.path(table.shards[0]).open("r+b") as file:
            file.truncate(table.layout.record_offset(200))
        for first in range(0, 128, 4):
            ids = [first, 200 + first % 100, first + 1, 299]
            found = fetched(cache, ids)
            assert np.array_equal(found[::2], records[ids[::2]])
            assert (found[1::2] == 0xFF).all()
            with pytest.raises(TableError, match=r"can't read the record of id .* truncated"):
                cache.check()
        while True:
            try:
                cache.check()
                break
            except TableError:
                pass
        ids = list(range(64))
        fetched(cache, ids)
        read = cache.counts().records_read
        assert np.array_equal(fetched(cache, ids), records[ids])
        assert cache.counts().records_read == read  # all slots are in use


def test_a_worker_that_ends_between_words(table_of_300):
    """Some of a step's words were written: none is believed, and no step afterwards reads by a map
    that may be wrong."""
    with open_here(table_of_300[0], hot=2, ram=MOST_POSITIONS, slow=0.2) as cache:
        ids = list(range(64))
        found = []
        step = threading.Thread(target=lambda: found.append(fetched(cache, ids)))
        step.start()
        time.sleep(0.4)
        # In its last words, as if it were dead.
        cache._process.messages.replies[63] = -1
        step.join(30)
        assert (found[0] == 0xFF).all()
        assert cache._process.messages.counts[BROKEN] == 1
        with pytest.raises(TableError, match="doesn't answer"):
            cache.check()
        assert (fetched(cache, [1]) == 0xFF).all()


def test_a_worker_that_is_too_late(table_of_300, monkeypatch):
    """The step was given up; what is answered afterwards changes nothing."""
    monkeypatch.setattr(device_cache, "MOST_LOOKS", 50)
    table, _ = table_of_300
    with open_here(table, hot=2, slow=0.5, seed=3) as cache:
        assert (fetched(cache, list(range(20))) == 0xFF).all()
        with pytest.raises(TableError, match=r"doesn't answer\. Is the disk of"):
            cache.check()
        time.sleep(0.6)
        assert (fetched(cache, [0, 1, 2]) == 0xFF).all()
        with pytest.raises(TableError, match="doesn't answer"):
            cache.check()


def test_step_numbers_begin_anew(table_of_300):
    table, records = table_of_300
    with open_here(table, hot=2, ram=MOST_POSITIONS) as cache:
        cache._counts[0] = 2**31 - 6
        assert_steps_are_right(cache, records, random_steps(20))
        assert 0 < cache._counts[0] < 20


def test_hot_records_by_the_tables_counts(tmp_path):
    table, records = make_table(tmp_path / "table", vocab_size=VOCAB, row_size=512)
    counts = np.zeros(VOCAB, np.int64)
    counts[[250, 3, 77, 5, 6]] = [90, 80, 70, 60, 50]
    keep_counts(table.folder, counts, VOCAB)
    with open_here(table, hot=3, ram=MOST_POSITIONS) as cache:
        assert cache.counts().records_read == 3
        assert np.array_equal(fetched(cache, [250, 3, 77]), records[[250, 3, 77]])
        assert cache.counts().hot_hits == 3
        assert cache.fill() == 5
        before = cache.counts()
        assert np.array_equal(fetched(cache, [5, 6]), records[[5, 6]])
        assert cache.counts().ram_hits == before.ram_hits + 2


def test_a_table_that_fits_the_device(table_of_300):
    table, records = table_of_300
    with open_here(table, hot=10**6) as cache:
        assert cache.num_hot == VOCAB
        assert cache.device_bytes < table.layout.table_bytes + 4 * VOCAB + 2**10
        read = cache.counts().records_read
        assert read == VOCAB
        assert not cache._process._thread.is_alive()  # nobody needs it any more
        assert_steps_are_right(cache, records, random_steps(30))
        assert cache.counts().records_read == read


def test_too_little_memory(table_of_300, monkeypatch):
    monkeypatch.setattr(device_cache, "available_memory_bytes", lambda: 10**5)
    with pytest.raises(UserError, match=r"in RAM takes 410 kB, and 100 kB are available"):
        CachedRecords(table_of_300[0], CPU, 0, 100 * 4096)


def test_too_little_memory_on_the_device(table_of_300, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    with pytest.raises(UserError, match=r"on the GPU takes 410 kB, and 1 MB are free"):
        CachedRecords(table_of_300[0], CPU, 100 * 4096, 0)


def test_another_processor(table_of_300, monkeypatch):
    monkeypatch.setattr(device_cache.platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match="this is aarch64"):
        CachedRecords(table_of_300[0], CPU, 0, 0)


# With the process.


@pytest.fixture(scope="module")
def opened(table_of_300):
    """(records with a process, the table's records); several tests use it one after the other."""
    table, records = table_of_300
    with open_records(table, hot=9, ram=MOST_POSITIONS) as cache:
        yield cache, records


def test_a_process_reads(opened):
    cache, records = opened
    assert cache.backend.startswith(("io_uring", "preadv"))
    assert_steps_are_right(cache, records, random_steps(100, seed=5))
    counts = cache.counts()
    assert counts.bytes_read == counts.records_read * 4096 > 0
    assert counts.read_seconds > 0


def test_it_needs_nothing_of_this_interpreter(table_of_300):
    """A thread keeps the GIL; the process is not held up, so the step takes little longer."""
    table, records = table_of_300
    # Of its own, and without slots on the device: the test writes the device's words itself, and
    # would have to copy records there as well.
    with open_records(table, ram=MOST_POSITIONS) as cache:
        step_by_hand(cache)
        assert_steps_are_right(cache, records, random_steps(20, seed=6))


def step_by_hand(cache):
    """What the kernel does for one missing id, with this thread away while the worker answers."""
    interval = sys.getswitchinterval()
    is_over = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(is_over.is_set, True)])
    sys.setswitchinterval(0.2)
    try:
        requests = cache._shared[0]
        replies = cache._shared[2]
        missing = int((cache._where < 0).nonzero()[0])
        step = int(cache._counts[0]) + 1
        for position in range(1, MOST_POSITIONS):
            requests[position] = step << 32
        requests[0] = step << 32 | 2 << 30 | missing
        time.sleep(1)  # within which nothing of this process runs but this sleep
        assert int(replies[0]) >> 32 == step
        busy.start()
        time.sleep(0.1)
    finally:
        is_over.set()
        sys.setswitchinterval(interval)
        busy.join()
    place, source, evicted = (int(replies[part * 64]) & (2**32 - 1) for part in range(3))
    assert not source and not evicted
    cache._where[missing] = place
    cache._counts[0] = step


def test_signals_are_for_the_parent(opened):
    cache, records = opened
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(cache._process.pid, number)
    time.sleep(0.1)
    assert_steps_are_right(cache, records, random_steps(20, seed=7))
    cache.check()


def test_a_fork_can_not_use_it_and_leaves_it_alone(opened):
    cache, records = opened
    child = os.fork()
    if not child:
        try:
            cache.locate(torch.zeros(1, dtype=torch.int64))
        except UserError as error:
            cache.close()
            cache._process.close()
            gc.collect()
            os._exit("fork" not in str(error))
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert_steps_are_right(cache, records, random_steps(10, seed=8))


def test_it_is_not_copied(opened):
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(UserError, match="can't be pickled"):
            attempt(opened[0])


def test_an_idle_worker_hardly_takes_the_processor(opened):
    cache, _ = opened
    fetched(cache, [0])
    time.sleep(0.2)
    before = processor_seconds(cache._process.pid)
    time.sleep(2)
    assert processor_seconds(cache._process.pid) - before < 0.2


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_end(pid):
    ends_at = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < ends_at:
        time.sleep(0.02)
    assert not is_running(pid)


def test_errors_come_from_the_process(tmp_path):
    table, records = make_table(tmp_path / "table", vocab_size=VOCAB, row_size=512)
    with open_records(table, hot=2, verify_checksums=True) as cache:
        path = table.path(table.shards[0])
        flip_bit(path, table.layout.record_offset(17))
        flip_bit(path, table.layout.record_offset(18))
        found = fetched(cache, [16, 17, 18])
        assert np.array_equal(found[0], records[16])
        assert (found[1:] == 0xFF).all()
        with pytest.raises(TableError, match=f"{path}: the record of id 17 is damaged"):
            cache.check()  # the first; there are as many as steps, so more are not kept
        cache.check()
        fetched(cache, [18])
        with pytest.raises(TableError, match="id 18"):
            cache.check()
        flip_bit(path, table.layout.record_offset(17))
        assert_steps_are_right(cache, records, [[17, 16]])


@pytest.mark.parametrize("moment", ["idle", "stopped", "reading"])
def test_a_process_that_is_killed(table_of_300, moment):
    table, records = table_of_300
    with open_records(table, hot=2) as cache:
        pid = cache._process.pid
        assert_steps_are_right(cache, records, [[1, 2, 3]])
        found = []
        step = threading.Thread(
            target=lambda: [found.append(fetched(cache, range(n, n + 64))) for n in range(200)]
        )
        if moment == "stopped":
            os.kill(pid, signal.SIGSTOP)
        if moment != "idle":
            step.start()
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        if moment == "idle":
            step.start()
        step.join(60)
        assert not step.is_alive()
        for number, rows in enumerate(found):  # all right, or no numbers; never others
            right = records[number : number + 64]
            assert np.array_equal(rows, right) or (rows == 0xFF).all()
        assert (found[-1] == 0xFF).all()
        for _ in range(2):
            with pytest.raises(TableError, match=r"has ended \(exit code -9\). Load"):
                cache.check()
    assert not is_running(pid)


def test_a_process_that_dies_at_once(table_of_300, monkeypatch):
    monkeypatch.setattr(miss_process, "_PROGRAM", "import os; os._exit(7)")
    with pytest.raises(TableError, match=r"has ended \(exit code 7\)"):
        CachedRecords(table_of_300[0], CPU, 0, 0)


def test_a_process_that_can_not_be_started(table_of_300, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="can't be started: No such file"):
        CachedRecords(table_of_300[0], CPU, 0, 0)


def test_a_table_that_went_away(tmp_path):
    table, _ = make_table(tmp_path / "table")
    table.path(table.shards[0]).unlink()
    with pytest.raises(TableError, match=r"missing, though table\.json lists it"):
        CachedRecords(table, CPU, 0, 0)


def test_it_ends_while_a_step_waits(table_of_300):
    table, records = table_of_300
    with open_records(table) as cache:
        pid = cache._process.pid
        found = []
        os.kill(pid, signal.SIGSTOP)
        step = threading.Thread(target=lambda: found.append(fetched(cache, [4, 5])))
        step.start()
        time.sleep(0.1)
        closing = threading.Thread(target=cache.close)
        closing.start()
        time.sleep(0.1)
        assert closing.is_alive() and step.is_alive()
        os.kill(pid, signal.SIGCONT)
        step.join(30)
        closing.join(30)
        assert np.array_equal(found[0], records[[4, 5]])
        with pytest.raises(ValueError, match="closed"):
            cache.locate(torch.zeros(1, dtype=torch.int64))
    await_end(pid)


def test_it_ends_with_records_that_are_dropped(table_of_300):
    table, _ = table_of_300
    stride = table.layout.stride
    cache = CachedRecords(table, CPU, 2 * stride, 0)
    pid = cache._process.pid
    descriptors = open_files()
    del cache
    gc.collect()
    await_end(pid)
    assert open_files() < descriptors


OPENED = """
import sys, time, torch
from lookup_experts.table.device_cache import CachedRecords
from lookup_experts.table.opening import open_table
cache = CachedRecords(open_table(sys.argv[1]), torch.device("cpu"), 0, 0)
print(cache._process.pid, flush=True)
time.sleep(100)
"""


def test_it_ends_with_its_parent(table_of_300):
    parent = subprocess.Popen(
        [sys.executable, "-c", OPENED, str(table_of_300[0].folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    assert parent.stdout is not None
    with parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    await_end(pid)


def test_a_relative_folder(table_of_300, monkeypatch):
    table, records = table_of_300
    monkeypatch.chdir(table.folder.parent)
    with open_records(open_table(table.folder.name)) as cache:
        assert_steps_are_right(cache, records, [[0, 299]])
