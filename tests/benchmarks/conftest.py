"""What the benchmarks' tests share: a shape and a stream of ids small enough for a test."""

from pathlib import Path

import numpy as np
import pytest

from lookup_experts import allocation
from lookup_experts.model import gateless_llama


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    monkeypatch.setitem(gateless_llama.SHAPES, "tiny", shape)


@pytest.fixture(autouse=True)
def other_tests_keep_their_allocator(monkeypatch):
    """Commands run in this process, which goes on with other tests."""
    monkeypatch.setattr(allocation, "keep_freed_memory", lambda: None)


@pytest.fixture
def ids(tmp_path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).zipf(1.3, 20_000) % 5000)
    return path
