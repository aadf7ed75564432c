"""`mole bench --peers` with the vLLM of this environment; with programs in its place it is in
tests/benchmarks/test_peers.py."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from lookup_experts.benchmarks.models import Case
from lookup_experts.benchmarks.peers import VllmBench, write_configuration
from lookup_experts.model import gateless_llama

pytestmark = pytest.mark.timeout(600)


def test_vllm_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(gateless_llama.SHAPES, "tiny", shape)
    peer = VllmBench(write_configuration(Case("tiny"), tmp_path), "float32")
    assert peer.prefill(32)["tokens_per_second"] > 0
