"""Stores: the same bytes from each, in every order; what can't be had or read is said."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from random_tables import flip_bit, make_table

from lookup_experts.errors import TableError, UserError
from lookup_experts.table import direct, in_memory, uring
from lookup_experts.table.direct import ThreadedReads
from lookup_experts.table.host_memory import aligned_buffer, available_memory_bytes
from lookup_experts.table.shard_writer import ShardWriter
from lookup_experts.table.store_choice import STORES, open_store
from lookup_experts.table.uring import Ring

pytestmark = pytest.mark.timeout(60)

SMALL = {"row_size": 20, "encoding": "nf3"}
ONE_BLOCK = {"row_size": 512, "encoding": "float16"}
LARGE = {"row_size": 1280, "num_experts": 4, "encoding": "bfloat16"}
"""Whole blocks, 20,480 bytes."""
DENSE = {"row_size": 1700, "num_experts": 3, "encoding": "bfloat16"}
"""20,400 bytes, which begin anywhere in a block."""
NARROW = {"row_size": 96, "num_layers": 12, "num_experts": 1, "encoding": "nf4"}
"""600 bytes."""
SIZES = {
    "48": SMALL,
    "608": NARROW,
    "4096": ONE_BLOCK,
    "20400": DENSE,
    "20480": LARGE,
    "64, version 1": {**SMALL, "version": 1},
    "1024, version 1": {**NARROW, "version": 1},
    "20480, version 1": {**DENSE, "version": 1},
}


def silent(_message: str) -> None:
    """For tests that don't look at the messages."""


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def refuse_ring(monkeypatch, code: int = errno.EPERM) -> None:
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(uring, "_syscall", refuse)


def refuse_direct(monkeypatch) -> None:
    real = os.open

    def without_direct(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", without_direct)


def has_ring() -> bool:
    try:
        Ring(2).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=["io_uring", "threads", "buffered"])
def direct_backend(request, monkeypatch):
    """Each way the direct store may read."""
    if request.param == "io_uring" and not has_ring():
        pytest.skip("no io_uring here")
    if request.param == "threads":
        refuse_ring(monkeypatch)
    if request.param == "buffered":
        refuse_direct(monkeypatch)
    return request.param


def out_for(ids: np.ndarray, stride: int, shift: int = 0) -> np.ndarray:
    """A buffer for these records, `shift` bytes off the alignment, filled with rubbish."""
    buffer = aligned_buffer(len(ids) * stride + shift)[shift:].reshape(len(ids), stride)
    buffer[:] = 0xAA
    return buffer


def check(store, records: np.ndarray, ids: np.ndarray, shift: int = 0) -> None:
    """Read and compare with plain indexing."""
    out = out_for(ids, records.shape[1], shift)
    store.read(ids, out)
    assert (out == records[ids]).all()


def batches(vocab_size: int) -> list[np.ndarray]:
    """No id, one, the last, a few, and all; sorted or not."""
    order = np.random.default_rng(0).permutation(vocab_size)
    few = order[:17]
    every = np.arange(vocab_size)
    return [order[:0], order[:1], every[-1:], few, np.sort(few), every, order]


# -------------------------------------------------------------------------------- right bytes


@pytest.mark.parametrize("kind", ["memory", "mmap"])
@pytest.mark.parametrize("ids_per_shard", [None, 33])
@pytest.mark.parametrize("verify_checksums", [False, True])
def test_every_batch(tmp_path, size, kind, ids_per_shard, verify_checksums):
    table, records = make_table(tmp_path, vocab_size=100, ids_per_shard=ids_per_shard, **size)
    with open_store(table, kind, verify_checksums=verify_checksums, notify=silent) as store:
        assert store.name == kind
        for ids in batches(100):
            check(store, records, ids)
            check(store, records, ids, shift=1)


@pytest.mark.parametrize("ids_per_shard", [None, 33])
def test_every_batch_from_the_disk(tmp_path, size, direct_backend, ids_per_shard):
    table, records = make_table(tmp_path, vocab_size=600, ids_per_shard=ids_per_shard, **size)
    with open_store(table, "direct", verify_checksums=True, notify=silent) as store:
        for ids in batches(600):
            check(store, records, ids)
            check(store, records, ids, shift=1)


def test_batches_larger_than_the_bounce_buffer(tmp_path, monkeypatch, direct_backend):
    monkeypatch.setattr(direct, "_BOUNCE_BYTES", 5 * 4096)
    table, records = make_table(tmp_path, vocab_size=600, **SMALL)
    with open_store(table, "direct", notify=silent) as store:
        check(store, records, np.arange(600))


def test_only_memory_has_the_whole(tmp_path):
    table, records = make_table(tmp_path, ids_per_shard=7)
    for kind in STORES:
        with open_store(table, kind, notify=silent) as store:
            whole = store.whole()
            assert (whole is not None) == (kind == "memory")
            assert whole is None or (whole == records).all()


def test_counters(tmp_path):
    table, records = make_table(tmp_path, **ONE_BLOCK)
    for kind in STORES:
        with open_store(table, kind, notify=silent) as store:
            for ids in batches(40):
                check(store, records, ids)
            assert store.reads == 6
            assert store.bytes_read == (1 + 1 + 17 + 17 + 40 + 40) * 4096
            assert 0 < store.seconds_reading < 10


# --------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_an_id_outside_the_table(tmp_path, kind, wrong):
    table, _ = make_table(tmp_path)
    ids = np.array([3, wrong, 5])
    with (
        open_store(table, kind, notify=silent) as store,
        pytest.raises(TableError, match=f"id {wrong} is not in the table.*0 to 39"),
    ):
        store.read(ids, out_for(ids, table.layout.stride))


@pytest.mark.parametrize("kind", STORES)
def test_a_wrong_buffer(tmp_path, kind):
    table, _ = make_table(tmp_path)
    ids, stride = np.array([3, 5]), table.layout.stride
    with open_store(table, kind, notify=silent) as store:
        for wrong in (
            np.zeros((3, stride), np.uint8),
            np.zeros((2, stride), np.int8),
            np.zeros((2, 2 * stride), np.uint8)[:, ::2],
        ):
            with pytest.raises(ValueError, match="Expected contiguous uint8"):
                store.read(ids, wrong)


@pytest.mark.parametrize("kind", STORES)
def test_a_closed_store(tmp_path, kind):
    table, _ = make_table(tmp_path)
    store = open_store(table, kind, notify=silent)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.read(np.array([1]), out_for(np.array([1]), table.layout.stride))


def test_an_unknown_kind(tmp_path):
    table, _ = make_table(tmp_path)
    with pytest.raises(UserError, match=r"Unknown store 'disk'.*auto, direct, memory, mmap"):
        open_store(table, "disk", notify=silent)
    with pytest.raises(UserError, match="Unknown store 'memory:8GB'"):
        open_store(table, "memory:8GB", notify=silent)
    with pytest.raises(UserError, match="'much' is no size in bytes"):
        open_store(table, "auto:much", notify=silent)


# ------------------------------------------------------------------------------- what is chosen


def test_auto_takes_what_fits_and_says_so(tmp_path):
    table, records = make_table(tmp_path)
    for words, kind in (
        ("auto:2560", "memory"),
        ("auto:2.559kB", "direct"),
        ("auto:0", "direct"),
        ("auto", "memory"),
    ):
        messages: list[str] = []
        with open_store(table, words, notify=messages.append) as store:
            assert store.name == kind
            check(store, records, np.arange(40))
        assert messages[0].startswith(f"Store: {kind}, because the table (2.56 kB)")


def test_a_table_larger_than_memory(tmp_path, monkeypatch):
    table, _ = make_table(tmp_path)
    monkeypatch.setattr(in_memory, "available_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"2\.56 kB.*'direct' or 'mmap'"):
        open_store(table, "memory", notify=silent)


def test_available_memory_is_below_what_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory_bytes() <= total


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_without_io_uring_threads_read_and_it_is_said(tmp_path, monkeypatch, code):
    table, records = make_table(tmp_path)
    refuse_ring(monkeypatch, code)
    messages: list[str] = []
    with open_store(table, "direct", notify=messages.append) as store:
        assert store.backend == "preadv x8 threads"
        check(store, records, np.arange(40))
    assert messages == [f"No io_uring here ({os.strerror(code)}): reading with 8 threads."]


def test_a_ring_that_can_not_read_is_not_taken(tmp_path, monkeypatch):
    def refused(self, fds, offsets, lengths, buffer, targets):
        return np.full(len(targets), -errno.EINVAL)

    table, records = make_table(tmp_path)
    if not has_ring():
        pytest.skip("no io_uring here")
    monkeypatch.setattr(Ring, "read", refused)
    before = open_files()
    with open_store(table, "direct", notify=silent) as store:
        assert store.backend == "preadv x8 threads"
        check(store, records, np.arange(40))
    assert open_files() == before


@pytest.mark.parametrize("at", ["open", "first read"])
def test_without_direct_reads_the_page_cache_is_used_and_it_is_said(tmp_path, monkeypatch, at):
    table, records = make_table(tmp_path, ids_per_shard=9)
    if at == "open":
        refuse_direct(monkeypatch)
    else:
        real = os.preadv

        def fail_once(*arguments):
            monkeypatch.setattr(os, "preadv", real)
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "preadv", fail_once)
    messages: list[str] = []
    before = open_files()
    with open_store(table, "direct", notify=messages.append) as store:
        assert store.backend.endswith("through the page cache")
        check(store, records, np.arange(40))
    assert "no direct reads (O_DIRECT)" in messages[0]
    assert open_files() == before


# ---------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("kind", STORES)
def test_a_flipped_bit_is_found_with_checksums(tmp_path, kind):
    table, records = make_table(tmp_path, ids_per_shard=20)
    flip_bit(table.path(table.shards[1]), table.layout.record_offset(7) + 5)
    message = r"table-00002-of-00002.*id 27 is damaged: its checksum"
    if kind == "memory":
        with pytest.raises(TableError, match=message):
            open_store(table, kind, verify_checksums=True, notify=silent)
        return
    with open_store(table, kind, verify_checksums=True, notify=silent) as store:
        check(store, records, np.delete(np.arange(40), 27))
        with pytest.raises(TableError, match=message):
            check(store, records, np.arange(40))


@pytest.mark.parametrize("verify_checksums", [False, True])
@pytest.mark.parametrize("kind", STORES)
def test_a_scale_that_is_not_finite_is_found(tmp_path, kind, verify_checksums):
    table, records = make_table(tmp_path, encoding="nf4")
    end = table.layout.record_bytes
    records[4, end - 2 : end] = np.array([np.nan], np.float16).view(np.uint8)
    with ShardWriter(
        table.path(table.shards[0]), table.layout, table.shards[0], "a fingerprint"
    ) as w:
        w.write(4, records[4:5])
    with (
        pytest.raises(TableError, match="id 4 is damaged: a number or scale"),
        open_store(table, kind, verify_checksums=verify_checksums, notify=silent) as store,
    ):
        check(store, records, np.delete(np.arange(40), 4))
        check(store, records, np.arange(40))


def test_truncated_while_open_from_the_disk(tmp_path, size, direct_backend):
    table, records = make_table(tmp_path, vocab_size=300, ids_per_shard=150, **size)
    with open_store(table, "direct", notify=silent) as store:
        path = table.path(table.shards[1])
        os.truncate(path, table.layout.record_offset(75) - 1)
        check(store, records, np.arange(150))
        with pytest.raises(
            TableError, match=rf"{path.name}: can't read the record of id \d+ at \d+: truncated"
        ):
            check(store, records, np.arange(300))
        check(store, records, np.arange(150))


def test_truncated_while_mapped(tmp_path):
    table, records = make_table(tmp_path, ids_per_shard=20)
    with open_store(table, "mmap", notify=silent) as store:
        os.truncate(table.path(table.shards[1]), 4096)
        check(store, records, np.arange(20))
        with pytest.raises(TableError, match=r"00002.*truncated while open.*found 4096"):
            check(store, records, np.arange(40))


@pytest.mark.parametrize("kind", STORES)
def test_a_replaced_shard_is_read_in_its_old_state(tmp_path, kind):
    table, records = make_table(tmp_path, **ONE_BLOCK)
    with open_store(table, kind, notify=silent) as store:
        (tmp_path / "new").write_bytes(b"something else")
        (tmp_path / "new").rename(table.path(table.shards[0]))
        check(store, records, np.arange(40))


def test_truncated_before_loading(tmp_path):
    table, _ = make_table(tmp_path)
    os.truncate(table.path(table.shards[0]), 5000)
    with pytest.raises(TableError, match="truncated, expected 2560 bytes"):
        open_store(table, "memory", notify=silent)


@pytest.mark.parametrize("kind", ["mmap", "direct"])
def test_truncated_between_checking_and_opening(tmp_path, kind):
    table, records = make_table(tmp_path)
    os.truncate(table.path(table.shards[0]), 5000)
    with (
        pytest.raises(TableError, match=r"00001\.safetensors.*truncated"),
        open_store(table, kind, notify=silent) as store,
    ):
        check(store, records, np.arange(40))


def test_a_shard_that_vanished(tmp_path):
    table, _ = make_table(tmp_path)
    table.path(table.shards[0]).unlink()
    for kind in STORES:
        with pytest.raises(TableError, match="can't be opened: No such file"):
            open_store(table, kind, notify=silent)


def results_changed(monkeypatch, direct_backend, change) -> None:
    """Have the back end of the direct store come back with other results."""
    owner = Ring if direct_backend == "io_uring" else ThreadedReads
    real = owner.read

    def changed(self, fds, offsets, lengths, buffer, targets):
        results = real(self, fds, offsets, lengths, buffer, targets)
        return change(
            results,
            [buffer[target:][:length] for target, length in zip(targets, lengths, strict=True)],
        )

    monkeypatch.setattr(owner, "read", changed)


def two_backends(function):
    return pytest.mark.parametrize("direct_backend", ["io_uring", "threads"], indirect=True)(
        function
    )


@two_backends
def test_a_disk_error_names_file_id_and_offset(tmp_path, monkeypatch, direct_backend):
    def broken(results, target):
        results[5] = -errno.EIO
        return results

    table, records = make_table(tmp_path, ids_per_shard=20, **LARGE)
    with open_store(table, "direct", notify=silent) as store:
        results_changed(monkeypatch, direct_backend, broken)
        with pytest.raises(TableError, match=r"00001-of-00002.*id 5 at 106496: Input/output error"):
            check(store, records, np.arange(40))
        monkeypatch.undo()


@two_backends
@pytest.mark.parametrize("count", [-errno.EINTR, -errno.EAGAIN, 0, 1000, 4096, 8192])
def test_a_read_that_came_back_short_is_completed(tmp_path, monkeypatch, direct_backend, count):
    def short(results, target):
        target[3][max(0, count) :] = 0
        results[3] = count
        return results

    table, records = make_table(tmp_path, **LARGE)
    with open_store(table, "direct", notify=silent) as store:
        results_changed(monkeypatch, direct_backend, short)
        check(store, records, np.arange(40))


@two_backends
@pytest.mark.parametrize("count", [0, 1000, 4096, 20479])
def test_a_read_that_stays_short_is_an_error(tmp_path, monkeypatch, direct_backend, count):
    def short(results, target):
        monkeypatch.setattr(os, "preadv", lambda *_: 0)  # the second attempt finds nothing
        results[3] = count
        return results

    table, records = make_table(tmp_path, **LARGE)
    with open_store(table, "direct", notify=silent) as store:
        results_changed(monkeypatch, direct_backend, short)
        got = count // 4096 * 4096
        with pytest.raises(TableError, match=f"id 3 at 65536: got {got} of 20480 bytes"):
            check(store, records, np.arange(40))


@two_backends
def test_a_disk_error_under_records_that_share_blocks(tmp_path, monkeypatch, direct_backend):
    """The read that fails brings several; the one named is the first that it would have brought."""

    def broken(results, target):
        results[1] = -errno.EIO
        return results

    table, records = make_table(tmp_path, vocab_size=400, ids_per_shard=200, **NARROW)
    ids = np.array([399, 60, 61, 62, 1, 0])
    with open_store(table, "direct", notify=silent) as store:
        results_changed(monkeypatch, direct_backend, broken)
        offset = 4096 + 60 * 608
        with pytest.raises(
            TableError, match=rf"00001-of-00002.*id 60 at {offset}: Input/output error"
        ):
            check(store, records, ids)
        monkeypatch.undo()
        check(store, records, ids)


@two_backends
@pytest.mark.parametrize("count", [-errno.EINTR, -errno.EAGAIN, 0, 1000, 4096, 20000])
def test_a_short_read_of_shared_blocks_is_completed(tmp_path, monkeypatch, direct_backend, count):
    def short(results, target):
        target[1][max(0, count) :] = 0
        results[1] = count
        return results

    table, records = make_table(tmp_path, **DENSE)
    with open_store(table, "direct", notify=silent) as store:
        results_changed(monkeypatch, direct_backend, short)
        check(store, records, np.array([0, 20, 21, 22, 39]))


@two_backends
@pytest.mark.parametrize("got", [0, 8192, 24576])
def test_a_read_of_shared_blocks_that_stays_short(tmp_path, monkeypatch, direct_backend, got):
    def short(results, target):
        monkeypatch.setattr(os, "preadv", lambda *_: 0)  # the second attempt finds nothing
        results[1] = got
        return results

    table, records = make_table(tmp_path, **DENSE)
    begin = 4096 + 20 * 20400
    lost = 20 if begin // 4096 * 4096 + got < begin + 20400 else 21
    with open_store(table, "direct", notify=silent) as store:
        results_changed(monkeypatch, direct_backend, short)
        needed = begin % 4096 + 3 * 20400
        with pytest.raises(TableError, match=f"id {lost} at .*: got {got} of {needed} bytes"):
            check(store, records, np.array([0, 22, 21, 20, 39]))


def test_a_ring_that_fails_while_reading(tmp_path, monkeypatch):
    if not has_ring():
        pytest.skip("no io_uring here")
    table, records = make_table(tmp_path, **LARGE)
    with open_store(table, "direct", notify=silent) as store:
        with monkeypatch.context() as patch:
            refuse_ring(patch, errno.EAGAIN)
            with pytest.raises(TableError, match="Resource temporarily unavailable"):
                check(store, records, np.arange(40))
        check(store, records, np.arange(40))


def test_an_error_in_preadv(tmp_path, monkeypatch):
    table, records = make_table(tmp_path, **LARGE)
    refuse_ring(monkeypatch)
    with open_store(table, "direct", notify=silent) as store:

        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(TableError, match="id 0 at 4096: Input/output error"):
            check(store, records, np.arange(40))


# ------------------------------------------------------------------------------- many at once


@pytest.mark.parametrize("kind", ["memory", "mmap"])
def test_threads_share_a_store(tmp_path, kind):
    share_a_store(tmp_path, kind)


def test_threads_share_a_direct_store(tmp_path, direct_backend):
    share_a_store(tmp_path, "direct")


def share_a_store(folder: Path, kind: str) -> None:
    table, records = make_table(folder, vocab_size=200, ids_per_shard=70, **ONE_BLOCK)
    with open_store(table, kind, notify=silent) as store, ThreadPoolExecutor(6) as threads:

        def read_often(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(25):
                check(store, records, random.permutation(200)[: random.integers(1, 100)], seed % 2)

        list(threads.map(read_often, range(12)))
        assert store.reads == 12 * 25


def test_processes_share_a_table(tmp_path):
    _, records = make_table(tmp_path, vocab_size=200, ids_per_shard=70, **ONE_BLOCK)
    script = """
import sys, zlib
import numpy as np
from lookup_experts.table.opening import open_table
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.store_choice import open_store
table = open_table(sys.argv[1])
out = aligned_buffer(200 * table.layout.stride).reshape(200, -1)
with open_store(table, "direct", notify=print) as store:
    for _ in range(20):
        out[:] = 0
        store.read(np.arange(200), out)
print(zlib.crc32(out))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        output, _ = process.communicate(timeout=50)
        assert process.returncode == 0
        assert output.split()[-1] == str(zlib.crc32(records))


def test_a_direct_store_does_not_survive_a_fork(tmp_path):
    table, records = make_table(tmp_path)
    with open_store(table, "direct", notify=silent) as store:
        child = os.fork()
        if child == 0:
            try:
                check(store, records, np.arange(40))
            except UserError as error:
                os._exit(7 if "after a fork" in str(error) else 8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        check(store, records, np.arange(40))


@two_backends
def test_beside_a_busy_thread(tmp_path, direct_backend):
    """A thread that holds the interpreter makes each return into Python cost milliseconds.

    The ring returns once for a batch, so it may take a few of them; `preadv` returns for each
    record, and must merely come to an end.
    """
    table, records = make_table(tmp_path, **LARGE)
    stop = threading.Event()

    def be_busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    busy = threading.Thread(target=be_busy)
    with open_store(table, "direct", notify=silent) as store:
        ids = np.arange(16)
        out = out_for(ids, table.layout.stride)
        busy.start()
        try:
            seconds = []
            for _ in range(8):
                started_at = time.perf_counter()
                store.read(ids, out)
                seconds.append(time.perf_counter() - started_at)
        finally:
            stop.set()
            busy.join()
        assert (out == records[:16]).all()
        assert min(seconds) < (0.06 if direct_backend == "io_uring" else 2.0)


# ------------------------------------------------------------------------------- given back


def open_files() -> int:
    return len(file_numbers())


def file_numbers() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir()]


@pytest.mark.parametrize("kind", ["memory", "mmap"])
def test_files_stay_few(tmp_path, kind):
    files_stay_few(tmp_path, kind)


def test_files_of_the_direct_store_stay_few(tmp_path, direct_backend):
    files_stay_few(tmp_path, "direct")


def files_stay_few(folder: Path, kind: str) -> None:
    table, records = make_table(folder, ids_per_shard=9)
    before, threads_before = open_files(), threading.active_count()
    for _ in range(20):
        with open_store(table, kind, verify_checksums=True, notify=silent) as store:
            check(store, records, np.arange(40))
    assert open_files() == before
    assert threading.active_count() == threads_before


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("room", [0, 2, 5, 6])
def test_too_many_open_files(tmp_path, kind, room):
    table, records = make_table(tmp_path, ids_per_shard=8)
    before = open_files()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Fill the gaps below the highest number, so that `room` says how many can still be opened.
    fillers = [os.open("/dev/null", os.O_RDONLY) for _ in range(max(file_numbers()) + 2 - before)]
    used = max(file_numbers())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + room, limits[1]))
    try:
        with open_store(table, kind, notify=silent) as store:
            check(store, records, np.arange(40))
    except UserError as error:
        assert "oo many open files" in str(error)
        assert room < 6 or kind == "direct"
    else:
        assert room >= 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)
    assert open_files() == before
