"""The ring alone: right bytes, few system calls, and every interruption the kernel may cause."""

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from lookup_experts.table import uring
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.uring import ENTER, Ring

pytestmark = pytest.mark.timeout(30)
ROW = 4096
NUM_ROWS = 300


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def file(tmp_path):
    """An open file of rows, and what is in it."""
    content = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, ROW), np.uint8)
    (tmp_path / "rows").write_bytes(content.tobytes())
    fd = os.open(tmp_path / "rows", os.O_RDONLY)
    yield fd, content
    os.close(fd)


@pytest.fixture
def ring():
    try:
        ring = Ring(16)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    with ring:
        yield ring


@pytest.fixture
def system_calls(monkeypatch):
    """The arguments of each io_uring_enter; a test may replace `.through` to interfere."""

    class Recorder(list):
        through = staticmethod(uring._syscall)

    calls = Recorder()

    def record(number, *arguments):
        if number == ENTER:
            calls.append(arguments)
        return calls.through(number, *arguments)

    monkeypatch.setattr(uring, "_syscall", record)
    return calls


def read_rows(ring, fds, offsets, target):
    """A row of `target` from each place."""
    starts = np.arange(len(target)) * ROW
    return ring.read(fds, offsets, np.full(len(target), ROW), target.reshape(-1), starts)


def read(ring, file, rows):
    """Read these rows and check every byte."""
    fd, content = file
    target = aligned_buffer(len(rows) * ROW).reshape(len(rows), ROW)
    results = read_rows(ring, np.full(len(rows), fd, np.int32), np.array(rows) * ROW, target)
    assert (results == ROW).all()
    assert (target == content[rows]).all()


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 33, 300])
def test_batches_of_any_size(ring, file, num_rows):
    read(ring, file, np.random.default_rng(num_rows).permutation(NUM_ROWS)[:num_rows])


def test_an_empty_batch(ring, file):
    read(ring, file, np.array([], np.int64))


@pytest.mark.parametrize("started", [False, True])
def test_reads_of_many_lengths(ring, file, started):
    fd, content = file
    lengths, offsets = [1, 5000, ROW, 3 * ROW + 7], [3, 10 * ROW - 1, 0, 100]
    buffer = aligned_buffer(8 * ROW)
    targets = [2, 10, 2 * ROW, 3 * ROW + 1]
    if started:
        address = buffer.ctypes.data
        ring.start([fd] * 4, offsets, [address + target for target in targets], lengths)
        assert ring.finish() == lengths
    else:
        assert ring.read([fd] * 4, offsets, lengths, buffer, targets).tolist() == lengths
    expected = np.zeros(8 * ROW, np.uint8)
    for length, offset, target in zip(lengths, offsets, targets, strict=True):
        expected[target : target + length] = content.reshape(-1)[offset : offset + length]
    assert (buffer == expected).all()


@pytest.mark.parametrize("num_rows", [1, 16])
def test_one_system_call_for_a_batch(ring, file, system_calls, num_rows):
    read(ring, file, np.arange(num_rows))
    assert [call[1:3] for call in system_calls] == [(num_rows, num_rows)]


def test_counters_that_wrap(ring, file):
    for _ in range(50):
        read(ring, file, np.arange(11))
    # The kernel keeps its own copies of the heads, so 2^32 can't be set; distances are checked.
    assert ring._distance(np.array([2**32 - 3]), np.array([4])) == 7


def test_errors_come_back_with_their_row(ring, file):
    fd, content = file
    target = aligned_buffer(3 * ROW).reshape(3, ROW)
    fds = np.array([fd, 10_000, fd], np.int32)
    results = read_rows(ring, fds, np.array([0, 0, NUM_ROWS * ROW - 100]), target)
    assert results.tolist() == [ROW, -errno.EBADF, 100]
    assert (target[0] == content[0]).all()


def test_an_interrupted_wait_is_taken_up_again(ring, file, system_calls):
    through = system_calls.through

    def interrupt_every_other(number, *arguments):
        if len(system_calls) % 2:
            raise InterruptedError(errno.EINTR, "signal")
        return through(number, *arguments)

    system_calls.through = interrupt_every_other
    read(ring, file, np.arange(40))


def test_an_interruption_after_submitting(ring, file, system_calls):
    through = system_calls.through

    def submit_without_waiting(number, fd, to_submit, wait_for, flags):
        return through(number, fd, to_submit, 0 if to_submit else wait_for, flags)

    system_calls.through = submit_without_waiting
    read(ring, file, np.arange(40))


def test_a_partial_submission(ring, file, system_calls):
    through = system_calls.through

    def submit_at_most_three(number, fd, to_submit, wait_for, flags):
        few = min(3, to_submit)
        return through(number, fd, few, min(wait_for, few) if few else wait_for, flags)

    system_calls.through = submit_at_most_three
    read(ring, file, np.arange(60))


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY])
def test_a_kernel_short_of_memory_finishes_first(ring, file, system_calls, code):
    through = system_calls.through

    def take_three_and_refuse(number, fd, to_submit, wait_for, flags):
        if to_submit > 3:
            through(number, fd, 3, 0, flags)
            raise OSError(code, os.strerror(code))
        return through(number, fd, to_submit, wait_for, flags)

    system_calls.through = take_three_and_refuse
    read(ring, file, np.arange(60))


def test_a_kernel_that_refuses_everything(ring, file, system_calls):
    def refuse(*_):
        raise OSError(errno.EAGAIN, "busy")

    through, system_calls.through = system_calls.through, refuse
    with pytest.raises(OSError, match="busy"):
        read(ring, file, np.arange(5))
    system_calls.through = through
    read(ring, file, np.arange(16))


def test_ctrl_c_leaves_no_read_under_way(ring, file, system_calls):
    through = system_calls.through

    def submit_then_interrupt(number, fd, to_submit, wait_for, flags):
        through(number, fd, to_submit, 0, flags)
        system_calls.through = through
        raise KeyboardInterrupt

    system_calls.through = submit_then_interrupt
    with pytest.raises(KeyboardInterrupt):
        read(ring, file, np.arange(10))
    assert ring._distance(ring._cq_head, ring._sq_tail) == 0
    read(ring, file, np.arange(100, 120))


def test_machines_that_reorder_loads(ring, file, monkeypatch):
    monkeypatch.setattr(uring, "_STRONGLY_ORDERED", False)
    read(ring, file, np.arange(40))


def test_a_ring_gives_everything_back(file):
    before = open_files()
    for _ in range(20):
        try:
            with Ring(8) as ring:
                read(ring, file, np.arange(8))
            ring.close()
        except OSError as error:
            pytest.skip(f"no io_uring here: {error}")
    assert open_files() == before


def test_a_kernel_too_old_is_refused_without_a_leak(monkeypatch):
    def old_kernel(number, depth, address):
        (ctypes.c_uint32 * 30).from_address(address)[5] = 0
        return os.open("/dev/null", os.O_RDONLY)

    before = open_files()
    monkeypatch.setattr(uring, "_syscall", old_kernel)
    with pytest.raises(OSError, match="too old"):
        Ring(8)
    assert open_files() == before
