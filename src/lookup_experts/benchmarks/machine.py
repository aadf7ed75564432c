"""Where and with what a figure was measured; what disk, memory and cores reach there at best."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lookup_experts
from lookup_experts.benchmarks.timing import interleave
from lookup_experts.table.format import BLOCK
from lookup_experts.table.host_memory import aligned_buffer

PROGRAMS = ("torch", "transformers", "lookup-experts")
LARGE_READ = 8 * 2**20
MEMORY_SAMPLE_BYTES = 2**28
"""Well beyond the caches of a processor."""
SMALL_MATRIX, MATRIX_SIZE = 512, 4096
PASS_SECONDS = 1.0
"""Matrices stay smaller where a pass would take longer, as bfloat16 does without AVX-512."""
PASSES = 5


@dataclass(frozen=True)
class Machine:
    """A machine, the programs on it, and the moment."""

    cpu: str
    """The model's name."""
    vector_instructions: str
    """What torch uses of the processor: AVX2, AVX512 ...; without AVX512 it emulates bfloat16."""
    cores: int
    """Those that this process may use."""
    memory_bytes: int
    gpu: str | None
    """The name of the first one that torch can use; None where there is none."""
    system: str
    versions: dict[str, str]
    commit: str | None
    """Of this project's checkout, with `+` where the package was changed since; None outside of
    one."""
    date: str
    """ISO 8601, UTC."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_model(),
        vector_instructions=torch.backends.cpu.get_cpu_capability(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()}",
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in PROGRAMS},
        },
        commit=checkout_commit(Path(lookup_experts.__file__)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cpu_model() -> str:
    """By /proc/cpuinfo; some processors have no name there, then the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def checkout_commit(file: Path) -> str | None:
    """The commit of the git checkout that `file` belongs to; None if it belongs to none.

    With `+` where what lies in or below the folder of `file` was changed since: texts and results
    elsewhere make no other program.
    """
    # A package installed below somebody else's checkout lies in it without being part of it.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or isn't installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------- what it reaches at best


def disk_bytes_per_second(path: Path, num_bytes: int = 2**28, start: int = 0) -> float:
    """Reading a file from end to end past the page cache, in large blocks.

    Args:
        path: a file on the disk in question, of a block at least.
        num_bytes: how much of it to read.
        start: where to begin, a multiple of 4096.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        end = min(os.fstat(fd).st_size, start + num_bytes)
        at_once = min(LARGE_READ, (end - start) // BLOCK * BLOCK)
        buffer = aligned_buffer(at_once).data
        end -= at_once
        started_at, offset = time.perf_counter(), start
        while offset <= end:
            offset += os.preadv(fd, [buffer], offset)
        return (offset - start) / (time.perf_counter() - started_at)
    finally:
        os.close(fd)


def memory_bytes_per_second(device: torch.device | str = "cpu") -> float:
    """Reading a device's memory from end to end, on all cores: the best of a few passes."""
    numbers = torch.ones(MEMORY_SAMPLE_BYTES // 4, device=device)
    return MEMORY_SAMPLE_BYTES / _fastest(lambda: numbers.sum().item())


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """A product of two square matrices, as large as is of use and takes no longer than a moment,
    on all cores: the best of a few passes."""
    size = min(SMALL_MATRIX, MATRIX_SIZE)
    while True:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        seconds = _seconds_of_product(matrix)
        if 2 * size > MATRIX_SIZE or 8 * seconds > PASS_SECONDS:
            return 2 * size**3 / seconds
        size *= 2


def _seconds_of_product(matrix: Tensor) -> float:
    return _fastest(lambda: (matrix @ matrix)[0, 0].item())


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest pass of what also waits for a GPU, as `item` does; the first, which
    prepares the library's kernels, doesn't count."""
    return min(interleave({"": work}, 1 + PASSES)[""][1:])
