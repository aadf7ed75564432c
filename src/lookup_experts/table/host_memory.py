"""Memory of this machine: how much there is, and buffers that disks and devices can use."""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np


def available_memory_bytes() -> int:
    """What can be allocated without swapping, within the machine and the control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return min([free, *_cgroup_headroom()])


def _cgroup_headroom() -> Iterator[int]:
    """What each control group (version 2) above this process still allows; page cache is free."""
    entry = Path("/proc/self/cgroup").read_text().splitlines()[-1]
    own = Path("/sys/fs/cgroup") / entry.rpartition(":")[2].lstrip("/")
    for group in (own, *own.parents):
        limit = group / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield max(0, int(text) - used + int(stat.get("inactive_file", 0)))


def aligned_buffer(num_bytes: int, huge_pages: bool = False) -> np.ndarray:
    """Zeros, uint8 [num_bytes], at a multiple of 4096; the kernel takes it back when unused.

    Args:
        huge_pages: ask for pages of megabytes where there are any, for memory that will be filled:
            a device that reads a table in RAM, or locks it there, has fewer pages to look up.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, num_bytes), flags=flags)
    if huge_pages:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, num_bytes)
