"""`mole bench read` for real, on a shape small enough for a test."""

import sys

import pytest
from benches import bench
from result_rows import result_rows

from lookup_experts.benchmarks import machine, read

WAY = ("under_way", "busy_thread", "switch_interval_ms")


def test_read(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "LARGE_READ", 2**20)
    monkeypatch.setattr(read, "DISK_SAMPLE_BYTES", 4 * 2**20)
    monkeypatch.setattr(read, "SECONDS", 0.1)
    plot = tmp_path / "read.png"
    results = bench(tmp_path, "read", "--batch", "4", "--plot", plot)["results"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [read.ReadingWay(*map(result.get, WAY)) for result in results] == [*read.WAYS]
    assert sys.getswitchinterval() == pytest.approx(5e-3)
    for result in results:
        share = result["gb_per_second"] / result["disk_gb_per_second"]
        assert result["share_of_disk_bandwidth"] == pytest.approx(share, rel=2)
        assert result["plain_gb_per_second"] > 0 and result["share_of_plain_reads"] > 0
    rows = result_rows("read", results)
    assert [row["batches under way"] for row in rows] == ["1", "8", "1", "1", "8"]
    large = bench(tmp_path, "read", "--batch", "65")["results"]
    assert [result["under_way"] for result in large] == [1, 1, 1]
