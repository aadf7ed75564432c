"""Buffers for disks and devices."""

from pathlib import Path

import pytest

from lookup_experts.table.host_memory import aligned_buffer

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="no huge pages here")
def test_huge_pages_are_asked_for_where_all_will_be_filled():
    for asked in (False, True):
        buffer = aligned_buffer(8 * 2**20, huge_pages=asked)
        assert buffer.ctypes.data % 4096 == 0 and not buffer.any()
        assert ("hg" in flags_of(buffer.ctypes.data)) == asked


def flags_of(address: int) -> list[str]:
    """What the kernel notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            begin, _, end = words[0].partition("-")
            inside = int(begin, 16) <= address < int(end, 16)
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError("no such mapping")
