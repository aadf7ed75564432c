"""Reads through io_uring, straight over the kernel's interface: no library, no compiler.

A batch of reads goes to the kernel in one system call and is waited for in one, which gives up
the GIL once, where a `preadv` for each record must win it back each time. Interface:
io_uring_setup(2), io_uring_enter(2), and linux/io_uring.h. Which reads, from where to where, is in
`direct.py`.

The ring is two queues in memory shared with the kernel: we put requests at the tail of the
submission queue, the kernel puts results at the tail of the completion queue. Heads and tails
only ever grow (modulo 2^32), and each request gives one result, so the four of them are the whole
state: tail(SQ) - head(SQ) requests wait to be taken, tail(SQ) - head(CQ) have not been answered.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

SETUP, ENTER = 425, 426
"""System call numbers, the same on all architectures but alpha."""
ENTER_GETEVENTS = 1
FEATURE_SINGLE_MMAP = 1
OP_READ = 22
OFFSET_OF_REQUESTS = 0x10000000
COUNTER_MASK = 0xFFFFFFFF

REQUEST = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("priority", "u2"),
        ("fd", "i4"),
        ("offset", "u8"),
        ("address", "u8"),
        ("length", "u4"),
        ("read_flags", "u4"),
        ("user_data", "u8"),
        ("unused", "u8", (3,)),
    ]
)
"""struct io_uring_sqe."""
_REQUEST = struct.Struct("<B3xiQQI4xQ24x")
"""The same for a read: opcode, fd, offset, address, length, user_data; the rest stays zero."""
RESULT = np.dtype([("user_data", "u8"), ("result", "i4"), ("flags", "u4")])
"""struct io_uring_cqe."""
_RESULT = struct.Struct("<Qi4x")
"""The same: user_data and result."""

_STRONGLY_ORDERED = platform.machine() in ("x86_64", "i686", "s390x")


class Ring:
    """A ring that reads from files into memory; for one caller at a time.

    Args:
        depth: the most reads under way at once, a power of two.

    Raises:
        OSError: the kernel doesn't offer io_uring (ENOSYS, EOPNOTSUPP), forbids it (EPERM), or
            has no memory for it (ENOMEM).
    """

    def __init__(self, depth: int) -> None:
        parameters = np.zeros(30, np.uint32)
        self._fd = _syscall(SETUP, depth, parameters.ctypes.data)
        try:
            if not parameters[5] & FEATURE_SINGLE_MMAP:
                raise OSError(errno.EOPNOTSUPP, "io_uring is too old here")
            self._map(parameters[:2].tolist(), parameters[10:20].tolist(), parameters[20:].tolist())
        except BaseException:
            os.close(self._fd)
            raise
        self.depth = int(parameters[0])
        self._process = os.getpid()
        self._answers: list[int] = []

    def _map(self, entries: list[int], sq: list[int], cq: list[int]) -> None:
        """Map the queues; `sq` and `cq` are io_sqring_offsets and io_cqring_offsets."""
        num_bytes = max(sq[6] + 4 * entries[0], cq[5] + RESULT.itemsize * entries[1])
        self._queues = _map_shared(self._fd, num_bytes, 0)
        self._request_memory = _map_shared(
            self._fd, entries[0] * REQUEST.itemsize, OFFSET_OF_REQUESTS
        )

        def counter(offset: int) -> memoryview:
            return memoryview(self._queues)[offset : offset + 4].cast("I")

        self._sq_head, self._sq_tail = counter(sq[0]), counter(sq[1])
        self._cq_head, self._cq_tail = counter(cq[0]), counter(cq[1])
        self._sq_mask, self._cq_mask = counter(sq[2])[0], counter(cq[2])[0]
        self._requests = np.frombuffer(self._request_memory, REQUEST, entries[0])
        self._start_of_results = cq[5]
        self._results = np.frombuffer(self._queues, RESULT, entries[1], cq[5])
        order = np.frombuffer(self._queues, np.uint32, entries[0], sq[6])
        order[:] = np.arange(entries[0])

    def read(
        self,
        fds: ArrayLike,
        offsets: ArrayLike,
        lengths: ArrayLike,
        buffer: np.ndarray,
        targets: ArrayLike,
    ) -> np.ndarray:
        """Read from each (file, offset) into `buffer`, up to `depth` at once.

        Returns when all are answered: with one system call if there are at most `depth`.

        Args:
            fds: [n], open files.
            offsets: [n], bytes.
            lengths: [n], bytes of each read.
            buffer: uint8 [bytes], contiguous; for O_DIRECT files aligned to 4096.
            targets: [n], the byte of `buffer` where each read begins to write.

        Returns:
            int64 [n]: bytes read, or an errno below zero.

        Raises:
            OSError: the kernel refuses to take requests at all.
        """
        self._drain()  # what an interrupted call left behind
        requests = _read_requests(fds, offsets, lengths, buffer, targets)
        results = np.zeros(len(requests), np.int64)
        try:
            self._run(requests, results)
        except BaseException:
            # The kernel must not write into memory that the caller may hand on.
            self._drain()
            raise
        return results

    def start(
        self, fds: list[int], offsets: list[int], addresses: list[int], lengths: list[int]
    ) -> None:
        """Hand over a few reads without waiting for them; `finish` gives their results.

        Written for the fewest instructions: a model's step waits while this runs.

        Args:
            fds, offsets, addresses, lengths: for each read its file, where from, where to, and
                how many bytes; at most `depth`.

        Raises:
            OSError: the kernel refuses to take requests at all.
        """
        if len(fds) > self.depth:
            raise ValueError(f"{len(fds)} reads, at most {self.depth} at once.")
        self._drain()
        tail = self._sq_tail[0]
        for number, read in enumerate(zip(fds, offsets, addresses, lengths, strict=True)):
            slot = (tail + number) & self._sq_mask
            _REQUEST.pack_into(
                self._request_memory, slot * REQUEST.itemsize, OP_READ, *read, number
            )
        self._answers = [0] * len(fds)
        self._sq_tail[0] = (tail + len(fds)) & COUNTER_MASK
        try:
            self._call(len(fds), 0)
        except BlockingIOError:
            pass  # short of memory for more; `finish` hands over the rest
        except BaseException:
            self._drain()
            raise

    def finish(self) -> list[int]:
        """Wait for the reads of `start`: bytes read of each, or an errno below zero.

        An interrupted call (Ctrl-C) leaves the reads under way; the next goes on waiting.

        Raises:
            OSError: the kernel refuses to go on; no read is under way any more.
        """
        self._collect_answers()
        try:
            while waiting := self._distance(self._cq_head, self._sq_tail):
                self._enter(waiting)
                self._collect_answers()
        except OSError:
            self._drain()
            raise
        return self._answers

    def _run(self, requests: np.ndarray, results: np.ndarray) -> None:
        queued = answered = 0
        while answered < len(requests):
            room = self.depth - (queued - answered)
            queued += self._queue(requests[queued : queued + room])
            all_queued = queued == len(requests)
            # Wait for all at the end; before, for half, so that the disk never runs dry.
            self._enter(queued - answered if all_queued else (queued - answered + 1) // 2)
            answered += self._collect(results)

    def _queue(self, requests: np.ndarray) -> int:
        """Put requests in the submission queue; how many."""
        tail = self._sq_tail[0]
        slots = (tail + np.arange(len(requests))) & self._sq_mask
        self._requests[slots] = requests
        self._sq_tail[0] = (tail + len(requests)) & COUNTER_MASK
        return len(requests)

    def _enter(self, wait_for: int) -> None:
        """Hand over what is queued and wait for `wait_for` results; may come back with fewer.

        An interrupted wait or a partial submission leaves its rest in the queues, where the next
        call finds it.
        """
        try:
            self._call(self._distance(self._sq_head, self._sq_tail), wait_for)
        except OSError as error:
            under_way = self._distance(self._cq_head, self._sq_head)
            if error.errno not in (errno.EAGAIN, errno.EBUSY) or not under_way:
                raise
            # The kernel is short of memory for more: let what is under way finish first.
            self._call(0, 1)

    def _call(self, to_submit: int, wait_for: int) -> None:
        try:
            _syscall(ENTER, self._fd, to_submit, wait_for, ENTER_GETEVENTS)
        except InterruptedError:
            return  # by a signal, before anything was taken; the caller looks at the queues

    def _collect(self, results: np.ndarray) -> int:
        """Take what the completion queue holds into `results`; how many."""
        head, count = self._answered()
        found = self._results[(head + np.arange(count)) & self._cq_mask]
        results[found["user_data"].astype(np.int64)] = found["result"]
        self._cq_head[0] = (head + count) & COUNTER_MASK
        return count

    def _collect_answers(self) -> None:
        """The same into the list of a few answers, without arrays."""
        head, count = self._answered()
        for place in range(head, head + count):
            start = self._start_of_results + (place & self._cq_mask) * RESULT.itemsize
            number, result = _RESULT.unpack_from(self._queues, start)
            self._answers[number] = result
        self._cq_head[0] = (head + count) & COUNTER_MASK

    def _answered(self) -> tuple[int, int]:
        """Where in the completion queue results begin, and how many can be loaded now."""
        head, count = self._cq_head[0], self._distance(self._cq_head, self._cq_tail)
        if not _STRONGLY_ORDERED:
            # Between loading the tail and loading results stands an entry into the kernel,
            # which other processors order loads by; there is no fence in Python.
            _syscall(ENTER, self._fd, 0, 0, 0)
        return head, count

    def _drain(self) -> None:
        """Withdraw what the kernel hasn't taken, wait for what it has, and forget the results."""
        self._sq_tail[0] = self._sq_head[0]
        while waiting := self._distance(self._cq_head, self._sq_tail):
            self._enter(waiting)
            self._cq_head[0] = self._cq_tail[0]

    @staticmethod
    def _distance(start: memoryview, end: memoryview) -> int:
        return (end[0] - start[0]) & COUNTER_MASK

    def close(self) -> None:
        """Give the ring back to the kernel; reads under way come to their end first."""
        if self._fd < 0:
            return
        if os.getpid() == self._process:  # after a fork they are the parent's
            self._drain()
        for view in ("_sq_head", "_sq_tail", "_cq_head", "_cq_tail", "_requests", "_results"):
            delattr(self, view)
        self._queues.close()
        self._request_memory.close()
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_requests(
    fds: ArrayLike, offsets: ArrayLike, lengths: ArrayLike, buffer: np.ndarray, targets: ArrayLike
) -> np.ndarray:
    starts = np.asarray(targets, np.uint64)
    requests = np.zeros(len(starts), REQUEST)
    requests["opcode"] = OP_READ
    requests["fd"] = fds
    requests["offset"] = offsets
    requests["address"] = buffer.ctypes.data + starts
    requests["length"] = lengths
    requests["user_data"] = np.arange(len(starts))
    return requests


def _map_shared(fd: int, num_bytes: int, offset: int) -> mmap.mmap:
    populate = getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | populate, offset=offset)


def _syscall_of(library: ctypes.CDLL) -> Callable[..., int]:
    function = library.syscall
    function.restype = ctypes.c_long
    function.argtypes = [ctypes.c_long] * 7
    return function


_waiting_syscall = _syscall_of(ctypes.CDLL(None, use_errno=True))
_quick_syscall = _syscall_of(ctypes.PyDLL(None, use_errno=True))


def _syscall(number: int, *arguments: int) -> int:
    """A system call; its result, or an `OSError`.

    It gives up the GIL only to wait for results: after handing over requests alone, another busy
    thread would make it wait 5 ms, a switching interval, to get the GIL back.
    """
    waits = number == ENTER and arguments[2] > 0
    padded = (*arguments, *([0] * (6 - len(arguments))))
    result = (_waiting_syscall if waits else _quick_syscall)(number, *padded)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
