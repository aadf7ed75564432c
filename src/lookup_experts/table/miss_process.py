"""Starting, watching and ending the process that reads for a device (`miss_worker.py`)."""

import json
import mmap
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

from lookup_experts.errors import TableError, UserError
from lookup_experts.table.files import say_why
from lookup_experts.table.miss_messages import (
    ERRORS,
    ERRORS_SEEN,
    MESSAGE_BYTES,
    NEVER,
    STOP,
    Messages,
)
from lookup_experts.table.miss_worker import Task
from lookup_experts.table.opening import Table
from lookup_experts.table.store import Notify

_PROGRAM = "from lookup_experts.table.miss_worker import main; main()"
_PATIENCE = 10.0
"""Seconds for a worker to end that was told to."""


class MissProcess:
    """A worker and the memory shared with it.

    Args:
        table: what it reads.
        verify_checksums: whether it compares whole records with their checksums.
        num_slots: slots in RAM.
        num_hot: slots in the device's memory.
        notify: told how it reads, where that isn't the usual way.

    Raises:
        TableError: the table can't be opened there.
        UserError: it can't be started, or can't read.
    """

    def __init__(
        self, table: Table, verify_checksums: bool, num_slots: int, num_hot: int, notify: Notify
    ) -> None:
        stride = table.layout.stride
        self._memory_fd, mapping = _shared_memory("records", num_slots * stride)
        try:
            self._messages_fd, message_mapping = _shared_memory("messages", MESSAGE_BYTES)
        except BaseException:
            os.close(self._memory_fd)
            raise
        self.slots = np.frombuffer(mapping, np.uint8, num_slots * stride).reshape(-1, stride)
        """uint8 [num_slots, stride]."""
        self.message_bytes = np.frombuffer(message_mapping, np.uint8)
        """All of `messages`, for the device."""
        self.messages = Messages(message_mapping)
        try:
            self._process = _start(
                Task(
                    replace(table, folder=table.folder.absolute()),
                    verify_checksums,
                    self._memory_fd,
                    self._messages_fd,
                    num_slots,
                    num_hot,
                    os.getpid(),
                )
            )
        except OSError as error:
            raise UserError(
                f"The process that reads the table can't be started: {say_why(error)}"
            ) from error
        finally:
            os.close(self._memory_fd)
            os.close(self._messages_fd)
        self._ended = threading.Event()
        self._hearing = threading.Lock()
        self._started_by = os.getpid()
        self._watcher = threading.Thread(
            target=_watch,
            args=(self._process, self.messages, self._ended),
            name="table-worker-watch",
            daemon=True,
        )
        self._watcher.start()
        self._end = finalize(
            self, _end, self._process, self.messages, self._watcher, self._started_by
        )
        self._end.atexit = False  # the worker notices by itself
        started = self._hear()
        if "error" in started:
            self.close()
            raise (TableError if started["of_table"] else UserError)(started["error"])
        self.backend: str = started["backend"]
        """What does the reading, see `Store.backend`."""
        for notice in started["notices"]:
            notify(notice)

    def _hear(self) -> dict[str, Any]:
        """The next line from the worker."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._watcher.join()
            raise self.death()
        content: dict[str, Any] = json.loads(line)
        return content

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def is_ours(self) -> bool:
        """Whether this process started it: false after a fork."""
        return os.getpid() == self._started_by

    @property
    def has_died(self) -> bool:
        """Whether it has ended of itself: no step that waits is answered any more."""
        return self._ended.is_set() and self._end.alive

    def death(self) -> TableError:
        """The error for a worker that has ended of itself."""
        return TableError(
            "The process that reads the table for the device has ended (exit code "
            f"{self._process.returncode}). Load the model again."
        )

    def check(self) -> None:
        """Raise the error that reading met since the last call, if any, as a `TableError`."""
        controls = self.messages.controls
        if not self._end.alive or controls[ERRORS] == controls[ERRORS_SEEN]:
            return
        with self._hearing:
            if controls[ERRORS] != controls[ERRORS_SEEN]:
                problem = self._hear()["error"]  # it said so before it counted, so it is there
                controls[ERRORS_SEEN] = controls[ERRORS]
                raise TableError(problem)

    def close(self) -> None:
        """End the worker; what it is reading is read to its end. Nothing may wait for it."""
        self._end()


def _shared_memory(name: str, num_bytes: int) -> tuple[int, mmap.mmap]:
    """Memory that a process with the descriptor can map as well; without a name in any folder, so
    nothing is left behind."""
    fd = os.memfd_create(f"lookup-experts-{name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, num_bytes)
        mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED)
    except BaseException:
        os.close(fd)
        raise
    with suppress(OSError):  # a kernel without them for such memory
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return fd, mapping


def _start(task: Task) -> "subprocess.Popen[bytes]":
    """The worker as a program of its own: multiprocessing would run the parent's main module
    anew, and a fork would take the parent's CUDA context along."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(task.memory_fd, task.messages_fd),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        process_group=0,  # Ctrl-C is for the parent
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # it has ended, as its first line will tell
        process.stdin.write(pickle.dumps(task))
    return process


def _watch(process: "subprocess.Popen[bytes]", messages: Messages, ended: threading.Event) -> None:
    """End the waiting of all steps when the worker has ended, however that was."""
    process.wait()
    for place in range(len(messages.replies)):
        messages.replies[place] = NEVER
    ended.set()


def _end(
    process: "subprocess.Popen[bytes]",
    messages: Messages,
    watcher: threading.Thread,
    started_by: int,
) -> None:
    if os.getpid() != started_by:
        return
    messages.controls[STOP] = 1
    watcher.join(_PATIENCE)
    if watcher.is_alive():
        process.kill()
        watcher.join()
    assert process.stdout is not None
    process.stdout.close()
