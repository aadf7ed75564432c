"""Runs `prepare` again and again and kills it, until a run is let finish.

    python kill_prepare.py TEXT TOKENIZER OUT

Imports once and forks a process for every run, before any thread is started. Prints what happened
as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lookup_experts.training import sections
from lookup_experts.training.prepare import prepare
from lookup_experts.training.tokenizer import load_tokenizer

PATIENCE_SECONDS = 20


def children_of(process: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def num_pieces(out: Path) -> int:
    return len(list((out / "pieces").glob("*.safetensors")))


def wait_until(process: int, condition: Callable[[], bool]) -> None:
    """Wait for the condition, or for the end of the process."""
    while is_running(process) and not condition():
        time.sleep(0.0005)


def wait_for_end(processes: list[int]) -> list[int]:
    """Give them time to end; those that didn't."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while any(map(is_running, processes)) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return [process for process in processes if is_running(process)]


def start(text: str, tokenizer: str, out: Path) -> int:
    process = os.fork()
    if process == 0:
        exit_code = 1
        try:
            sections.PIECE_CHARACTERS, sections.SECTION_CHARACTERS = 3000, 1000
            prepare([text], tokenizer=tokenizer, out=out, num_workers=2)
            exit_code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(exit_code)  # and never go on as a second driver
    return process


def kill(process: int) -> list[int]:
    """Kill it, if it hasn't ended by itself; gives the workers that it left."""
    workers = children_of(process) if is_running(process) else []
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return workers


def main(text: str, tokenizer: str, out: Path) -> None:
    load_tokenizer(tokenizer)  # imports what every run needs
    chance = random.Random()
    workers = []
    unfinished = 0
    for more_pieces in (0, 1, 5, 10, None):  # None: while the shards are written
        goal = num_pieces(out) + (more_pieces or 0)
        process = start(text, tokenizer, out)
        if more_pieces is None:
            wait_until(process, (out / "pieces" / "num_pieces").exists)
        else:
            wait_until(process, lambda goal=goal: num_pieces(out) >= goal)
            time.sleep(chance.uniform(0, 0.02))
        workers += kill(process)
        unfinished += not (out / "manifest.json").exists()
    _, status = os.waitpid(start(text, tokenizer, out), 0)
    left = wait_for_end(workers)
    report = {"unfinished": unfinished, "workers": len(workers), "workers_left": left}
    print(json.dumps(report))  # noqa: T201
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
