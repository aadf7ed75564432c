"""Measurements in processes of their own."""

import os
import signal

import pytest

from lookup_experts.benchmarks.processes import in_fresh_process
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
