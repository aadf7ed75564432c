"""Memory that is freed and taken again costs no page faults once it is kept."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from lookup_experts.allocation import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    return [np.ones(20 * 2**20, np.uint8) for _ in range(3)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    command = [sys.executable, "-c", FAULTS, way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_kept_memory_is_not_faulted_in_again():
    kept, given_back = faults("keep"), faults("")
    assert kept * 10 < given_back
