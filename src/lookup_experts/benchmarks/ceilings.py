"""The physical ceilings: what disk, memory and cores reach at best; whether the disk was read."""

import os
import time
from pathlib import Path

import torch

from lookup_experts.table.host_memory import aligned_buffer

LARGE_READ = 8 * 2**20
MEMORY_SAMPLE_BYTES = 2**28
"""Well beyond the caches of a processor."""
MATRIX_SIZE = 4096
PASSES = 5


def disk_bytes_per_second(path: Path, num_bytes: int = 2**29, start: int = 0) -> float:
    """Reading a file from end to end past the page cache, in large blocks.

    Args:
        path: a file on the disk in question.
        num_bytes: how much of it to read.
        start: where to begin, a multiple of 4096.
    """
    buffer = aligned_buffer(LARGE_READ).data
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        end = min(os.fstat(fd).st_size, start + num_bytes) - LARGE_READ
        started_at, offset = time.perf_counter(), start
        while offset <= end:
            offset += os.preadv(fd, [buffer], offset)
        return (offset - start) / (time.perf_counter() - started_at)
    finally:
        os.close(fd)


def memory_bytes_per_second(device: torch.device | str = "cpu") -> float:
    """Reading a device's memory from end to end, on all cores: the best of a few passes."""
    numbers = torch.ones(MEMORY_SAMPLE_BYTES // 4, device=device)
    fastest = float("inf")
    for _ in range(PASSES):
        started_at = time.perf_counter()
        numbers.sum().item()  # which a GPU must have finished
        fastest = min(fastest, time.perf_counter() - started_at)
    return MEMORY_SAMPLE_BYTES / fastest


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """A product of two large square matrices, on all cores: the best of a few passes."""
    matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=device)
    fastest = float("inf")
    for _ in range(1 + PASSES):  # the first prepares the library's kernels
        started_at = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # which a GPU must have finished
        fastest = min(fastest, time.perf_counter() - started_at)
    return 2 * MATRIX_SIZE**3 / fastest


class DiskCounter:
    """Bytes that this process had brought from a disk, by the kernel's own count.

    A read that the page cache answers isn't in it, so it tells whether a benchmark really read
    the disk.
    """

    def __init__(self) -> None:
        self._before = _read_bytes()

    def bytes_read(self) -> int:
        """Since it was made."""
        return _read_bytes() - self._before


def _read_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0
