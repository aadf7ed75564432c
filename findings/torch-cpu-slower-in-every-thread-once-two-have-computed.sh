#!/usr/bin/env bash
# torch 2.13.0 for processors (with the OpenMP runtime that its wheel brings, GNU's): once two
# threads of a process have each run one parallel operation, and both still live, such operations
# take three to five times as long in either of them, even while the other only waits.
#
# Each thread that computes gets a team of helpers, which stays until that thread ends. With more
# threads in teams than there are processors the runtime lets helpers sleep between operations
# instead of spinning, and waking one takes longer than a small operation does. So a server that
# loads (or only fills a tensor) in its main thread and computes in another is slower at every step
# than a script is, and nothing says so. What only one thread is to do, a thread that ends should do.
#
# Output seen (two processors; an addition of 100,000 numbers, microseconds):
#   one thread has computed: 7.6
#   two have, and both live: 28 to 41
#   the second has ended:    7.6
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0
env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT -u OMP_NUM_THREADS env/bin/python -W ignore - <<'PYTHON'
import os
import threading
import time

import torch

torch.set_num_threads(len(os.sched_getaffinity(0)))
numbers = torch.ones(50_000 * torch.get_num_threads())
total = torch.empty_like(numbers)


def microseconds() -> float:
    taken = []
    for _ in range(5000):
        begin = time.perf_counter()
        torch.add(numbers, numbers, out=total)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2] * 1e6


def compute_once_and_wait() -> None:
    torch.add(numbers, numbers)
    computed.set()
    leave.wait()


microseconds()
ratios = []
for _ in range(5):
    alone = microseconds()
    computed, leave = threading.Event(), threading.Event()
    other = threading.Thread(target=compute_once_and_wait)
    other.start()
    computed.wait()
    beside = microseconds()
    leave.set()
    other.join()
    after = microseconds()
    print(f"one thread: {alone:.1f}; two, one waiting: {beside:.1f}; it has ended: {after:.1f}")
    ratios.append((beside / alone, after / alone))
middle = [sorted(column)[2] for column in zip(*ratios)]
assert middle[0] > 1.7, "two threads that have computed don't slow each other down any more"
assert middle[1] < 1.4, "the end of the second thread doesn't end it any more"
PYTHON
