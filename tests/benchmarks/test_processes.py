"""Measurements in processes of their own."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lookup_experts.benchmarks.processes import ProcessFailedError, in_fresh_process, in_own_process
from lookup_experts.errors import UserError


def be_killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


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


def signal_parent_and_wait(number: int) -> None:
    """What a service manager does: the signal goes to all processes."""
    os.kill(os.getpid(), number)
    os.kill(os.getppid(), number)
    interruptions = 0
    ends_at = time.monotonic() + 1
    while time.monotonic() < ends_at:
        try:
            time.sleep(0.01)
        except KeyboardInterrupt:
            interruptions += 1
    raise KeyboardInterrupt(f"{interruptions} in {os.getpid()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_the_process_once_however_often_it_is_sent(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"^1 in "):
        in_own_process(signal_parent_and_wait, number)
    assert signal.getsignal(number) is before


WAIT = """
from lookup_experts.benchmarks.processes import in_own_process
from test_processes import say_who_and_wait

in_own_process(say_who_and_wait)
"""


def say_who_and_wait() -> None:
    os.write(sys.stdout.fileno(), f"{os.getpid()}\n".encode())
    threading.Event().wait()


def test_a_process_does_not_outlive_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # it ends when the last process that writes there has ended
    assert not Path(f"/proc/{number}/exe").exists()
