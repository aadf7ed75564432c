"""`mole bench prefill` for real, on a shape small enough for a test."""

import json

import pytest
import torch
from benches import bench
from result_rows import result_rows
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import machine, prefill
from lookup_experts.benchmarks.models import Case, dense_model

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr(machine, "MATRIX_SIZE", 256)


def test_prefill(tmp_path, ids):
    results = bench(tmp_path, "prefill", "--ids", ids, "--tokens", "300", "--pairs", 2)["results"]
    assert [result["tokens"] for result in results] == [300, 300]
    assert results[1]["bytes_per_step"] > 0
    assert all(result["share_of_matmul_flops"] > 0 for result in results)
    assert [row["prompt"] for row in result_rows("prefill", results)] == ["300 tokens"]


def test_a_prompt_multiplies_every_weight_but_the_embedding():
    model = dense_model(Case("tiny"))
    prompt = torch.arange(20).reshape(1, -1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        model(prompt, logits_to_keep=1)
    products = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert prefill.prompt_flops(model, 20) == products


def test_a_run_that_is_broken_off_keeps_the_sizes_it_has(tmp_path, ids, monkeypatch):
    measure = prefill.measure_prefill

    def broken_off_at_200(models, windows, tokens, *rest):
        if tokens == 200:
            raise KeyboardInterrupt
        return measure(models, windows, tokens, *rest)

    monkeypatch.setattr(prefill, "measure_prefill", broken_off_at_200)
    out = tmp_path / "prefill.json"
    common = ["--shape", "tiny", "--work", str(tmp_path / "work"), "--json", str(out)]
    sizes = ["--ids", str(ids), "--tokens", "100,200", "--pairs", "2"]
    assert run(cli.app, ["bench", "prefill", *common, *sizes]).exit_code != 0
    assert not out.exists()
    kept = tmp_path / "prefill.json.partial"
    assert [result["tokens"] for result in json.loads(kept.read_text())["results"]] == [100, 100]
    monkeypatch.setattr(prefill, "measure_prefill", measure)
    assert run(cli.app, ["bench", "prefill", *common, *sizes]).exit_code == 0
    assert len(json.loads(out.read_text())["results"]) == 4 and not kept.exists()
