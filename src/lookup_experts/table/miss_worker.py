"""The process that reads records for steps that wait on a device.

A step that misses a record waits on the device, and the host may at that moment be anywhere: in
Python code that keeps the GIL for 5 ms, or in a call that waits for that very step. So whoever
reads must need nothing of the host's interpreter. This is a process of its own, with an interpreter
of its own: it polls the words that the device writes (`miss_messages.py`), reads through the store
`direct` straight into page-locked slots that both processes map, and writes its answer to where
the device polls.

What else was possible. A thread needs the GIL for each line of Python, and 5 ms to get it from
another busy thread. A thread of compiled code (numba, a library of our own) wouldn't, but is a
compiler or a binary for each platform. A host node in the stream costs 30 to 50 µs in every step,
and Python code in it needs the GIL as well. `cuStreamWaitValue64` waits without a kernel, but for a
value that is fixed when a graph is captured, so flags would have to be reset in every step, and
steps without a miss would pay for it too; it needs another package for the driver's calls.

After a request the worker polls for `SPIN_SECONDS`, longer than a model's step takes: while tokens
are generated it never sleeps, and takes one core. Then it sleeps between looks for a sixteenth of
the pause so far, from 50 µs to 2 ms, so the first miss after a pause waits by as much longer, and
an idle worker takes below 1 % of a core. It ends with its parent, however that ended.

It imports torch, since a table's encodings are written in it: one or two seconds when a table is
opened, and 0.2 GB of memory, but no CUDA context.
"""

import gc
import json
import mmap
import os
import pickle
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lookup_experts.errors import TableError, UserError
from lookup_experts.table.direct import DirectStore
from lookup_experts.table.miss_messages import (
    BYTES_READ,
    ERRORS,
    ERRORS_SEEN,
    HIT,
    ID_MASK,
    KIND_SHIFT,
    MESSAGE_BYTES,
    MISS,
    MISSES,
    MOST_POSITIONS,
    NANOSECONDS,
    STOP,
    UNREADABLE,
    Messages,
)
from lookup_experts.table.opening import Table, reopen_table
from lookup_experts.table.store import RecordStore

SPIN_SECONDS = 0.005
_LOOKS_AT_ONCE = 50
"""Before the core is offered to others, and the parent looked for."""
_SHORTEST_SLEEP, _LONGEST_SLEEP = 50e-6, 2e-3


@dataclass(frozen=True)
class Task:
    """What a worker is started with."""

    table: Table
    verify_checksums: bool
    memory_fd: int
    """Of the RAM slots."""
    messages_fd: int
    num_slots: int
    """In RAM; enough for what one step may ask for."""
    num_hot: int
    """Slots in the device's memory, of which none is taken yet."""
    parent: int
    """Its process id."""


@dataclass(frozen=True)
class _Reading:
    """A missing record: where it is read to, where it will be, and whose record that was."""

    token_id: int
    slot: int
    hot_slot: int | None
    evicted: int | None


class MissWorker:
    """Decides what lies in which slot, and reads what steps miss.

    The slots in the device's memory go to the first records that are asked for, and stay theirs:
    so they are given to the most frequent ones by asking for these first. Of the records in RAM
    the least recently used goes first. What the step under way uses is never evicted, and what
    earlier steps used may be: the device does one after the other. While a step waits its words
    stay; those of a step of hits alone may be overwritten by the next before they are looked at,
    which then counts for nothing but the order of use.

    Args:
        store: where records are read from.
        messages: shared with the device.
        memory: uint8 [R, stride], the slots in RAM; R at least the unique ids of any one step.
        num_hot: slots in the device's memory.
        tell: passes an error's message on to the parent.
    """

    def __init__(
        self,
        store: RecordStore,
        messages: Messages,
        memory: np.ndarray,
        num_hot: int,
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._messages, self._memory = store, messages, memory
        self._tell = tell
        self._num_hot = num_hot
        self._free_hot = list(range(num_hot - 1, -1, -1))
        self._free = list(range(len(memory) - 1, -1, -1))
        self._in_ram: OrderedDict[int, int] = OrderedDict()  # least recently used first
        self._handled = 0

    def run(self, is_over: Callable[[], bool]) -> None:
        """Answer steps until it is over."""
        requests = self._messages.requests
        last_at = time.monotonic()
        while True:
            for _ in range(_LOOKS_AT_ONCE):
                if requests[0] >> 32 != self._handled and self.answer():
                    last_at = time.monotonic()
            if is_over():
                return
            pause = time.monotonic() - last_at
            if pause > SPIN_SECONDS:
                time.sleep(min(max(pause / 16, _SHORTEST_SLEEP), _LONGEST_SLEEP))
            else:
                os.sched_yield()

    def answer(self) -> bool:
        """Answer the step that the requests are of; False where they are still being written."""
        words = self._messages.requests.tolist()
        step = words[0] >> 32
        if min(words) >> 32 != step or max(words) >> 32 != step:
            return False
        nothing = step << 32
        missing: dict[int, list[int]] = {}
        for position, word in enumerate(words):
            if word == nothing:
                continue
            kind, token_id = word >> KIND_SHIFT & 3, word & ID_MASK
            if kind == MISS:
                missing.setdefault(token_id, []).append(position)
            elif kind == HIT and token_id in self._in_ram:
                self._in_ram.move_to_end(token_id)
        self._handled = step
        if missing:
            self._bring(nothing, missing)
        return True

    def _bring(self, step: int, missing: dict[int, list[int]]) -> None:
        started_at = time.perf_counter_ns()
        readings = [self._plan(token_id) for token_id in missing]
        unreadable = self._read(readings)
        for reading in readings:
            is_read = reading.token_id not in unreadable
            self._settle(reading, is_read)
            self._reply(step, reading, is_read, missing[reading.token_id])
        controls = self._messages.controls
        controls[MISSES] += len(readings)
        controls[BYTES_READ] = self._store.bytes_read
        controls[NANOSECONDS] += time.perf_counter_ns() - started_at

    def _plan(self, token_id: int) -> _Reading:
        hot_slot = self._free_hot.pop() if self._free_hot else None
        if self._free:
            return _Reading(token_id, self._free.pop(), hot_slot, None)
        evicted, slot = self._in_ram.popitem(last=False)
        return _Reading(token_id, slot, hot_slot, evicted)

    def _read(self, readings: list[_Reading]) -> set[int]:
        """Read into slots; the ids whose records can't be read."""
        try:
            self._read_together(readings)
            return set()
        except UserError as error:
            if len(readings) == 1:
                self._tell(str(error))
                return {readings[0].token_id}
        # Each by itself: a step's other records are there for the steps to come.
        return set().union(*(self._read([reading]) for reading in readings))

    def _read_together(self, readings: list[_Reading]) -> None:
        ids = np.array([reading.token_id for reading in readings])
        slots = np.array([reading.slot for reading in readings])
        self._store.begin(ids, self._memory, slots).wait()

    def _settle(self, reading: _Reading, is_read: bool) -> None:
        """Note what lies where now. A slot that is given back isn't used before the next step."""
        if reading.hot_slot is None and is_read:
            self._in_ram[reading.token_id] = reading.slot
            return
        self._free.append(reading.slot)
        if reading.hot_slot is not None and not is_read:
            self._free_hot.append(reading.hot_slot)

    def _reply(self, step: int, reading: _Reading, is_read: bool, positions: list[int]) -> None:
        replies = self._messages.replies
        place, source = self._num_hot + reading.slot, 0
        if reading.hot_slot is not None:
            place, source = reading.hot_slot, reading.slot + 1
        if not is_read:
            place, source = UNREADABLE, 0
        evicted = 0 if reading.evicted is None else reading.evicted + 1
        for position in positions:
            replies[2 * MOST_POSITIONS + position] = step | evicted
            replies[MOST_POSITIONS + position] = step | source
            replies[position] = step | place
            source = evicted = 0  # once is enough


def serve(task: Task, open_store: Callable[[Table, list[str]], RecordStore]) -> None:
    """What a worker does from its start to its end; it tells on its standard output, in lines of
    JSON, first how it reads or why it can't, then errors."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, with whom it ends

    def say(content: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    notices: list[str] = []
    try:
        store = open_store(reopen_table(task.table), notices)
    except UserError as error:
        say({"error": str(error), "of_table": isinstance(error, TableError)})
        return
    with store:
        messages = Messages(_mapped(task.messages_fd, MESSAGE_BYTES))
        stride = task.table.layout.stride
        mapping = _mapped(task.memory_fd, task.num_slots * stride)
        memory = np.frombuffer(mapping, np.uint8, task.num_slots * stride)
        controls = messages.controls

        def tell(problem: str) -> None:
            # The parent raises the first one; more would fill a pipe that nobody may be reading.
            if controls[ERRORS] == controls[ERRORS_SEEN]:
                say({"error": problem})
                controls[ERRORS] += 1

        worker = MissWorker(store, messages, memory.reshape(-1, stride), task.num_hot, tell)
        gc.freeze()  # what was imported need not be looked through while a step waits
        say({"backend": store.backend, "notices": notices})
        worker.run(lambda: bool(controls[STOP]) or os.getppid() != task.parent)


def _mapped(fd: int, num_bytes: int) -> mmap.mmap:
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def main() -> None:
    """The worker's program: its task comes on standard input."""
    task: Task = pickle.load(sys.stdin.buffer)
    serve(task, lambda table, notices: DirectStore(table, task.verify_checksums, notices.append))
