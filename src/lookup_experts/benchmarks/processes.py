"""Work in a process of its own, which nothing before has touched and whose end is its own; and what
the kernel tells of a process: its memory, and what it had brought from a disk.

`in_own_process` runs anything and tells how its process ended, `in_own_processes` several things at
the same time; `in_fresh_process` is for a
measurement without which nothing else makes sense.
"""

import _thread
import ctypes
import errno
import multiprocessing
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lookup_experts.errors import UserError

Answer = TypeVar("Answer")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProcessFailedError(Exception):
    """A process ended without an answer, or says that it can't go on; why, in a few words."""


@contextmanager
def lack_of_memory_told() -> Iterator[None]:
    """Raise a `ProcessFailedError` where memory runs out; other errors pass."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ProcessFailedError("out of memory") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch has no class for it."""
    import torch  # not for every process

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = str(error).lower()
    said = "not enough memory" in words or "can't allocate memory" in words
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def in_fresh_process(what: str, measure: Callable[..., Answer], *arguments: Any) -> Answer:
    """What a function of some module gives in a new process.

    Args:
        what: is measured; for the message, should it fail.

    Raises:
        UserError: the process was killed. Exceptions of `measure` pass.
    """
    try:
        return in_own_process(measure, *arguments)
    except ProcessFailedError as error:
        raise UserError(
            f"{what} can't be measured: its process was killed, as when memory runs out. "
            "Measure a smaller case, or leave this out."
        ) from error


def in_own_process(work: Callable[..., Answer], *arguments: Any) -> Answer:
    """What a function of some module gives in a new process, which doesn't outlive this one.

    A SIGINT or SIGTERM that comes meanwhile is a SIGINT there, and `work` says how it stops. To be
    called in the main thread, which alone may have handlers of signals.

    Raises:
        ProcessFailedError: the process ended without an answer, as when it is killed.
        KeyboardInterrupt: a signal came. Exceptions of `work` pass, also one of this class.
    """
    ((_, answer),) = list(in_own_processes(work, [arguments]))
    if isinstance(answer, ProcessFailedError):
        raise answer
    return answer


def in_own_processes(
    work: Callable[..., Answer],
    calls: Sequence[tuple[Any, ...]],
    jobs: int = 1,
    begin: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[int, Answer | ProcessFailedError]]:
    """`in_own_process` for several arguments, up to `jobs` of them at the same time.

    Args:
        calls: the arguments of each.
        begin: called with the number of a call before its process starts.

    Yields:
        The number of a call that has ended, and its answer or how its process failed.

    Raises:
        KeyboardInterrupt, and exceptions of `work`: as `in_own_process`, once the processes under
            way have ended, which were interrupted.
    """
    waiting = list(range(len(calls)))[::-1]
    under_way: dict[Connection, tuple[int, Any]] = {}
    stopped_by: BaseException | None = None
    with _passing_on_signals(under_way) as received:
        try:
            while under_way or (waiting and not received and stopped_by is None):
                while waiting and len(under_way) < jobs and not received and stopped_by is None:
                    number = waiting.pop()
                    begin(number)
                    pipe, process = _start(work, calls[number])
                    under_way[pipe] = number, process
                for ready in wait(list(under_way)):
                    assert isinstance(ready, Connection)
                    number, process = under_way.pop(ready)
                    answer, error = _end(ready, process)
                    if error is None:
                        yield number, answer
                    elif isinstance(error, ProcessFailedError):
                        yield number, error
                    else:
                        stopped_by = stopped_by or error
                        _interrupt(under_way)
        finally:  # also where whoever asked has stopped asking
            _interrupt(under_way)
            for _, process in under_way.values():
                process.join()
    if received and not isinstance(stopped_by, KeyboardInterrupt):
        raise KeyboardInterrupt
    if stopped_by is not None:
        raise stopped_by


def _start(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Connection, Any]:
    """Our end of the pipe to a new process that does the work, and the process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_answer, args=(theirs, work, arguments)
    )
    with signals_blocked():
        process.start()
    theirs.close()
    return ours, process


def _end(pipe: Connection, process: Any) -> tuple[Any, BaseException | None]:
    """What a process that has an answer, or has ended, says: (answer, None) or (None, error)."""
    try:
        answer, error = pipe.recv()
    except (EOFError, OSError):
        answer, error = None, ProcessFailedError()
    process.join()
    pipe.close()
    if isinstance(error, ProcessFailedError) and not error.args:
        error = ProcessFailedError(ending(process.exitcode))
    return answer, error


def _interrupt(pipes: Iterable[Connection]) -> None:
    """Interrupt the processes at the other ends."""
    for pipe in list(pipes):
        with suppress(OSError):  # it has ended
            pipe.send(signal.SIGINT)


def ending(code: int | None) -> str:
    """How a process ended, by its exit code."""
    # The kernel kills (signal 9) who takes the machine's last memory.
    if code == -signal.SIGKILL:
        return "killed, as when memory runs out"
    return f"ended with code {code}"


@contextmanager
def _passing_on_signals(pipes: Iterable[Connection]) -> Iterator[list[int]]:
    """Interrupt the processes at the other ends of the pipes, those that there are by then, at
    every signal; gives the signals that came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _interrupt(pipes)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Have a process that is started here begin, and stay, with the signals blocked.

    A terminal and a service manager send them to all processes, and it would get them twice: from
    there and from us. Twice means at once.
    """
    resource_tracker.ensure_running()  # it unblocks them where it is started later
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _answer(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: send (answer, None), or (None, exception)."""
    # Where the parent ignores it, a new process does, too, and there is no handler to call.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=_listen, args=(pipe,), daemon=True).start()
        pipe.send((work(*arguments), None))
    except BaseException as error:  # an interruption is the parent's to tell, as all else
        error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
        pipe.send((None, error))


def _listen(pipe: Connection) -> None:
    """Interrupt the main thread whenever the parent says so; end with the parent."""
    while True:
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        _thread.interrupt_main()


def free_port() -> int:
    """A port of this machine on which nobody listens, for a server that can't choose one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


# ------------------------------------------------------------------------- what the kernel tells


def proportional_set_size() -> int:
    """Bytes of memory that this process holds; shared pages count by their share."""
    return _figure("smaps_rollup", "Pss") * 1024


def proportional_set_size_of_family(process: int) -> int:
    """Bytes of memory that a process, by its number, and all that descend from it hold."""
    family, held = [process], 0
    for member in family:
        with suppress(OSError):  # it has ended
            held += _figure("smaps_rollup", "Pss", member) * 1024
            for thread in Path(f"/proc/{member}/task").iterdir():
                family += map(int, (thread / "children").read_text().split())
    return held


def resident_bytes() -> int:
    """Bytes of memory that this process holds, without what the C library keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return _figure("smaps_rollup", "Rss") * 1024


def high_water_mark() -> int:
    """Bytes that this process held at most. Not `ru_maxrss`: a child inherits its parent's."""
    return _figure("status", "VmHWM") * 1024


def reset_high_water_mark() -> int:
    """Forget what this process held at most; gives the bytes that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _figure("status", "VmRSS") * 1024


class DiskCounter:
    """Bytes that this process had brought from a disk, by the kernel's own count.

    A read that the page cache answers isn't in it, so it tells whether a benchmark really read
    the disk.
    """

    def __init__(self) -> None:
        self._before = _figure("io", "read_bytes")

    def bytes_read(self) -> int:
        """Since it was made."""
        return _figure("io", "read_bytes") - self._before


def _figure(file: str, name: str, process: int | str = "self") -> int:
    path = Path(f"/proc/{process}/{file}")
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no line {name}")
