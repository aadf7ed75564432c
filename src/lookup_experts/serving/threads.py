"""Threads for torch on a machine that others use too.

Between two operations torch's threads spin for milliseconds, in case there is more to do. Beside
another job the thread that is waited for may have lost its core, and then all that spinning only
keeps it from getting it back: two threads took ten times as long as one. So threads spin shortly
and then sleep, which costs nothing measurable on an idle machine.

Each thread that calls torch gets helpers of its own, for as long as it lives, and where all of them
together are more than there are cores, libgomp lets none of them spin. So whatever computes before
the engine does runs in a thread that ends: while the helpers that had loaded the model were still
there, a step of SmolLM2 with a table took 1.4 times as long.
"""

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")

SPINS = 2000
"""Some 25 µs, about the time between two operations of a step."""


def sleep_soon() -> None:
    """Let torch's threads sleep soon; has an effect only before torch is imported, and none where
    the environment says otherwise."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def use_threads(number: int | None) -> None:
    """Let torch use so many threads, or as many as are of use here: its own choice, but no more
    than there are usable cores."""
    import torch

    torch.set_num_threads(
        min(torch.get_num_threads(), usable_cores()) if number is None else number
    )


def in_passing_thread(work: Callable[[], Result]) -> Result:
    """What `work` gives, called in a thread that is gone when this returns, as are its helpers.

    Ctrl-C ends the work as it would have in the caller's thread, and then reaches the caller: with
    work under way the process couldn't end in good order.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed on, whatever it is
            future.set_exception(error)

    thread = Thread(target=run, name="passing", daemon=True)
    try:
        thread.start()
        return future.result()
    except KeyboardInterrupt:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        raise
    finally:
        if thread.ident is not None:
            thread.join()


def usable_cores(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's share
    of time. torch knows only of the former.

    Args:
        cgroups: where control groups (version 2) are mounted.
        own: tells the process's own group.
    """
    shares = [float(len(os.sched_getaffinity(0)))]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    path = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), "")
    for group in (cgroups / path, *(cgroups / path).parents):
        if not group.is_relative_to(cgroups):
            break
        try:
            quota, period = (group / "cpu.max").read_text().split()
            shares.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass  # no limit: "max"
    return max(1, math.ceil(min(shares)))
