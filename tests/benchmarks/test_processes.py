"""Measurements in processes of their own."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fresh_processes import (
    be_alone,
    be_killed,
    exit_or_answer,
    growth_by_an_array,
    meet,
    signal_parent_and_wait,
    wait_or_divide,
)

from lookup_experts.benchmarks.processes import (
    ProcessFailedError,
    in_fresh_process,
    in_own_process,
    in_own_processes,
    is_out_of_memory,
)
from lookup_experts.errors import UserError


def test_it_runs_elsewhere():
    assert in_fresh_process("A number", os.getpid) != os.getpid()


def test_one_that_is_killed_is_told_and_nobody_waits_for_it():
    with pytest.raises(UserError, match="Memory can't be measured: its process was killed"):
        in_fresh_process("Memory", be_killed)


def test_exceptions_pass():
    with pytest.raises(ZeroDivisionError):
        in_fresh_process("A quotient", divmod, 1, 0)


def test_exceptions_say_where_they_were_raised():
    with pytest.raises(ZeroDivisionError) as raised:
        in_own_process(divmod, 1, 0)
    assert "in _answer" in raised.value.__notes__[0]


def test_how_a_process_ended_is_told():
    with pytest.raises(ProcessFailedError, match=r"^killed, as when memory runs out$"):
        in_own_process(be_killed)
    with pytest.raises(ProcessFailedError, match=r"^ended with code 3$"):
        in_own_process(os._exit, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_the_process_once_however_often_it_is_sent(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"^1 in "):
        in_own_process(signal_parent_and_wait, number)
    assert signal.getsignal(number) is before


def test_several_at_the_same_time_and_no_more(tmp_path):
    begun = []
    (tmp_path / "many").mkdir()
    found = dict(in_own_processes(meet, [(tmp_path / "many", 3)] * 3, 3, begun.append))
    assert found == {0: 3, 1: 3, 2: 3}  # each has seen the two others
    assert begun == [0, 1, 2]
    found = dict(in_own_processes(be_alone, [(tmp_path,)] * 3, 1))
    assert found == {0: "alone", 1: "alone", 2: "alone"}


def test_one_of_several_that_is_killed_is_told_and_the_others_answer():
    outcomes = dict(in_own_processes(exit_or_answer, [(3,), (0,), (0,)], 2))
    assert str(outcomes.pop(0)) == "ended with code 3"
    assert outcomes == {1: "answer", 2: "answer"}


def test_an_exception_of_one_interrupts_the_others():
    with pytest.raises(ZeroDivisionError):
        list(in_own_processes(wait_or_divide, [(1,), (0,), (1,)], 2))


def test_a_signal_interrupts_all(tmp_path):
    calls = [(tmp_path, 2, 60, True), (tmp_path, 2, 60)]
    begun_at = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(in_own_processes(meet, calls, 2))
    assert time.monotonic() - begun_at < 60


WAIT = """
from lookup_experts.benchmarks.processes import in_own_process
from fresh_processes import say_who_and_wait

in_own_process(say_who_and_wait)
"""


def test_a_process_does_not_outlive_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # it ends when the last process that writes there has ended
    assert not Path(f"/proc/{number}/exe").exists()


@pytest.mark.timeout(300)
def test_memory_is_that_of_the_process():
    assert 45_000_000 < in_own_process(growth_by_an_array, 50_000_000) < 60_000_000


def test_other_errors_are_not_taken_for_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(FileNotFoundError("not enough memory.txt"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
