"""What tests run in fresh processes, which import this module; so it imports little."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lookup_experts.benchmarks.processes import proportional_set_size


def be_killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


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


def say_who_and_wait() -> None:
    os.write(sys.stdout.fileno(), f"{os.getpid()}\n".encode())
    threading.Event().wait()


def growth_by_an_array(num_bytes: int) -> int:
    before = proportional_set_size()
    held = np.ones(num_bytes, np.uint8)
    return proportional_set_size() - before + int(held[0]) - 1


def peak_of_prompt(
    folder: Path, shape: dict[str, int], vocab_size: int, prompt: np.ndarray
) -> tuple[int, Any]:
    """`memory.peak_of_prompt` of a shape that only a test knows, from an nf4 table."""
    from lookup_experts.benchmarks import memory
    from lookup_experts.benchmarks.models import Case, random_table
    from lookup_experts.model import gateless_llama

    gateless_llama.SHAPES["of a test"], gateless_llama.PAPER_VOCAB_SIZE = shape, vocab_size
    case = Case("of a test", 4, "nf4")
    return memory.peak_of_prompt(case, random_table(case, folder).folder, "auto:0", prompt)


def meet(folder: Path, wanted: int, seconds: float = 0, signals_parent: bool = False) -> int:
    """How many processes are here, once there are as many as wanted; stays for some seconds."""
    (folder / str(os.getpid())).touch()
    while (here := len(list(folder.iterdir()))) < wanted:
        time.sleep(0.01)
    if signals_parent:
        os.kill(os.getppid(), signal.SIGINT)
    _sleep(seconds)
    return here


def _sleep(seconds: float) -> None:
    """In pieces: an interruption by another thread wakes nobody."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        time.sleep(0.01)


def be_alone(folder: Path) -> str:
    """Fails where another process is here."""
    (folder / "held").mkdir()
    time.sleep(0.05)
    (folder / "held").rmdir()
    return "alone"


def exit_or_answer(code: int) -> str:
    if code:
        os._exit(code)
    return "answer"


def wait_or_divide(by: int) -> None:
    if by:
        _sleep(60)
    _ = 1 / by
