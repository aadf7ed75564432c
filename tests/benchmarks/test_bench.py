"""`mole bench` for real, on a shape small enough for a test."""

import json
import sys

import numpy as np
import pytest
import torch
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import allocation, cli
from lookup_experts.benchmarks import ceilings, reading, speed
from lookup_experts.errors import UserError
from lookup_experts.model import gateless_llama

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    monkeypatch.setitem(gateless_llama.SHAPES, "tiny", shape)
    monkeypatch.setattr(speed, "SEQUENCE_STEPS", 12)
    monkeypatch.setattr(speed, "CACHE_WARM_UP_TOKENS", 640)
    monkeypatch.setattr(ceilings, "MATRIX_SIZE", 256)


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).zipf(1.3, 20_000) % 5000)
    return path


@pytest.fixture(autouse=True)
def other_tests_keep_their_allocator(monkeypatch):
    """These commands run in this process, where other tests measure memory."""
    monkeypatch.setattr(allocation, "keep_freed_memory", lambda: None)


def bench(tmp_path, what: str, *arguments: object) -> dict:
    out = tmp_path / f"{what}.json"
    common = ["--shape", "tiny", "--work", str(tmp_path / "work"), "--json", str(out)]
    done = run(cli.app, ["bench", what, *common, *map(str, arguments)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] >= 1
    return report


@pytest.mark.parametrize("encoding", ["bfloat16", "nf4"])
def test_decode(tmp_path, ids, encoding):
    plot = tmp_path / "plot.png"
    arguments = ("--ids", ids, "--batch", "1,3", "--pairs", 6, "--encoding", encoding)
    report = bench(tmp_path, "decode", *arguments, "--cache", "1MB", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    dense, mole, _, larger = report["results"]
    assert (dense["system"], mole["system"]) == ("dense", "mole")
    assert mole["encoding"] == encoding and mole["cache_bytes"] == 1_000_000
    assert mole["pairs"] >= 6 and larger["batch"] == 3
    assert mole["ratio_to_dense"] > 0 and mole["spread"][0] <= mole["spread"][1]
    assert 0 < mole["hit_rate"] <= 1
    assert dense["share_of_memory_bandwidth"] > 0 and mole["share_of_disk_bandwidth"] > 0
    assert "entrance_ms" not in dense
    assert 0 < mole["entrance_ms"] + mole["blocks_ms"] < mole["ms_per_step"]
    rows = result_rows("decode", report["results"])
    assert [row["batch"] for row in rows] == ["1", "3"]
    assert rows[0]["× dense"] == f"{mole['ratio_to_dense']:.3f}"


def test_a_step_reads_every_weight_but_the_embedding_of_absent_tokens():
    from lookup_experts.benchmarks.models import Case, dense_model

    model = dense_model(Case("tiny"))
    embedding = model.get_input_embeddings().weight
    whole = sum(weight.numel() for weight in model.parameters()) * 2
    assert speed.weight_bytes(model, 3) == whole - embedding.numel() * 2 + 3 * 64 * 2
    model.lm_head.weight = embedding
    assert speed.weight_bytes(model, 3) == whole - embedding.numel() * 2


def test_a_prompt_multiplies_every_weight_but_the_embedding():
    from torch.utils.flop_counter import FlopCounterMode

    from lookup_experts.benchmarks.models import Case, dense_model

    model = dense_model(Case("tiny"))
    prompt = torch.arange(20).reshape(1, -1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        model(prompt, logits_to_keep=1)
    products = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert speed.prompt_flops(model, 20) == products


def test_without_a_cache_nothing_is_hit(tmp_path, ids):
    arguments = ("--ids", ids, "--batch", "2", "--pairs", 4, "--cache", 0)
    mole = bench(tmp_path, "decode", *arguments)["results"][1]
    assert mole["hit_rate"] == 0
    assert mole["bytes_per_step"] > 0


def test_prefill(tmp_path, ids):
    results = bench(tmp_path, "prefill", "--ids", ids, "--tokens", "300", "--pairs", 2)["results"]
    assert [result["tokens"] for result in results] == [300, 300]
    assert results[1]["bytes_per_step"] > 0
    assert all(result["share_of_matmul_flops"] > 0 for result in results)
    assert [row["prompt"] for row in result_rows("prefill", results)] == ["300 tokens"]


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_a_comparison_asks_for_pairs(what):
    done = run(cli.app, ["bench", what, "--pairs", "0"])
    assert done.exit_code == 2 and "--pairs" in done.output


def test_a_run_that_is_broken_off_keeps_the_sizes_it_has(tmp_path, ids, monkeypatch):
    measure = speed.measure_prefill

    def broken_off_at_200(dense, mole, windows, tokens, *rest):
        if tokens == 200:
            raise KeyboardInterrupt
        return measure(dense, mole, windows, tokens, *rest)

    monkeypatch.setattr(speed, "measure_prefill", broken_off_at_200)
    out = tmp_path / "prefill.json"
    common = ["--shape", "tiny", "--work", str(tmp_path / "work"), "--json", str(out)]
    sizes = ["--ids", str(ids), "--tokens", "100,200", "--pairs", "2"]
    assert run(cli.app, ["bench", "prefill", *common, *sizes]).exit_code != 0
    assert not out.exists()
    kept = tmp_path / "prefill.json.partial"
    assert [result["tokens"] for result in json.loads(kept.read_text())["results"]] == [100, 100]
    monkeypatch.setattr(speed, "measure_prefill", measure)
    assert run(cli.app, ["bench", "prefill", *common, *sizes]).exit_code == 0
    assert len(json.loads(out.read_text())["results"]) == 4 and not kept.exists()


@pytest.mark.parametrize("what", ["decode", "prefill", "read"])
def test_a_page_cache_that_answers_is_noticed(tmp_path, ids, monkeypatch, what):
    monkeypatch.setattr(ceilings.DiskCounter, "bytes_read", lambda self: 0)
    monkeypatch.setattr(ceilings, "LARGE_READ", 2**20)
    monkeypatch.setattr(reading, "DISK_SAMPLE_BYTES", 4 * 2**20)
    monkeypatch.setattr(reading, "SECONDS", 0.02)
    stream = ["--ids", str(ids), "--pairs", "2", "--cache", "0"]
    sizes = {
        "decode": ["--batch", "2", *stream],
        "prefill": ["--tokens", "100", *stream],
        "read": ["--batch", "65"],
    }
    work = ["--shape", "tiny", "--work", str(tmp_path)]
    for store, answered in (("direct", False), ("mmap", None)):
        out = tmp_path / f"{store}.json"
        told = ["--store", store, "--json", str(out)]
        done = run(cli.app, ["bench", what, *work, *sizes[what], *told])
        assert done.exit_code == 0, done.output
        assert ("the page cache answered" in done.output) == (answered is False)
        assert json.loads(out.read_text())["results"][-1].get("page_cache_bypassed") is answered


WAY = ("under_way", "busy_thread", "switch_interval_ms")


def test_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "LARGE_READ", 2**20)
    monkeypatch.setattr(reading, "DISK_SAMPLE_BYTES", 4 * 2**20)
    monkeypatch.setattr(reading, "SECONDS", 0.1)
    plot = tmp_path / "read.png"
    results = bench(tmp_path, "read", "--batch", "4", "--plot", plot)["results"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [reading.ReadingWay(*map(result.get, WAY)) for result in results] == [*reading.WAYS]
    assert sys.getswitchinterval() == pytest.approx(5e-3)
    for result in results:
        share = result["gb_per_second"] / result["disk_gb_per_second"]
        assert result["share_of_disk_bandwidth"] == pytest.approx(share, rel=2)
        assert result["plain_gb_per_second"] > 0 and result["share_of_plain_reads"] > 0
    rows = result_rows("read", results)
    assert [row["batches under way"] for row in rows] == ["1", "8", "1", "1", "8"]
    large = bench(tmp_path, "read", "--batch", "65")["results"]
    assert [result["under_way"] for result in large] == [1, 1, 1]


def test_build_leaves_a_table_that_opens(tmp_path):
    from lookup_experts.table.opening import open_table

    plot = tmp_path / "build.png"
    (result,) = bench(tmp_path, "build", "--plot", plot)["results"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result["seconds"] > 0 and result["ratio_to_matmul"] > 0
    assert result_rows("build", [result])[0]["encoding"] == "bfloat16"
    assert open_table(tmp_path / "work" / "tiny-4e-bfloat16-built").layout.shape.num_layers == 3
    again = run(cli.app, ["bench", "build", "--shape", "tiny", "--work", str(tmp_path / "work")])
    assert isinstance(again.exception, UserError)


def test_cache_policies(tmp_path, ids):
    out = tmp_path / "cache.json"
    sizes = ["--capacity", "16,64", "--streams", "1,4", "--tokens", "4000", "--ids", str(ids)]
    plot = tmp_path / "cache.png"
    done = run(cli.app, ["bench", "cache", *sizes, "--json", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())["results"]
    assert len(results) == 2 * 2 * 5
    expected = {
        "policy",
        "capacity",
        "streams",
        "hit_rate",
        "hit_rate_at_first",
        "reads_per_token",
    }
    assert all(set(result) == expected for result in results)
    rows = result_rows("cache-policies", results)
    assert len(rows) == 2 * 5 and rows[0]["64 records"].endswith("%")
    assert plot.read_bytes().startswith(b"\x89PNG")
    few = run(cli.app, ["bench", "cache", *sizes[:-3], "2", "--ids", str(ids)])
    assert "too few for 4 streams" in str(few.exception)


def test_rows_of_a_prompt_take_less_than_all_layers_at_once(tmp_path, ids):
    from lookup_experts.benchmarks import residency
    from lookup_experts.benchmarks.models import Case, random_table

    shape = {"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 2}
    case = Case("wide", 4, "nf4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gateless_llama.SHAPES, "wide", shape)
        patch.setattr(gateless_llama, "PAPER_VOCAB_SIZE", 1500)
        table = random_table(case, tmp_path)
        prompt = np.arange(3000) % 1500
        peak, reader = residency._peak_of_prompt(case, table.folder, "auto:0", prompt)
    assert reader.store == "direct" and reader.backend
    all_at_once = 1500 * 24 * 4 * 512 * 2
    assert 1500 * 4 * 512 * 2 < peak < all_at_once


def test_memory_tells_how_the_table_was_read(tmp_path, ids, monkeypatch):
    """What was really opened, not what was asked for; in this process, see above."""
    from lookup_experts.benchmarks import residency

    def in_this_process(what, measure, *arguments):
        return measure(*arguments)

    monkeypatch.setattr(residency, "in_fresh_process", in_this_process)
    for store, name, backend in (("auto:0", "direct", None), ("auto:8GB", "memory", "ram")):
        dense, mole = bench(tmp_path, "memory", "--ids", ids, "--store", store)["results"]
        assert "store" not in dense and "backend" not in dense
        assert mole["store"] == name and mole["backend"] == (backend or mole["backend"])
    arguments = ("--ids", ids, "--store", "auto:0", "--prompt", 300)
    (prompt,) = bench(tmp_path, "memory", *arguments)["results"]
    assert prompt["store"] == "direct" and prompt["backend"] in ("io_uring", "preadv x8 threads")


@pytest.mark.timeout(90)
def test_memory_of_real_processes():
    """In this process: a fresh one doesn't know the test's shape."""
    from lookup_experts.benchmarks.residency import proportional_set_size

    before = proportional_set_size()
    held = np.ones(50_000_000, np.uint8)
    assert proportional_set_size() - before > 45_000_000
    assert held[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "numbers like 1,8,32"),
        (["--batch", "0"], "at least 1"),
        (["--encoding", "nf5"], "Unknown encoding 'nf5'"),
        (["--graphs"], "CUDA graphs need a GPU"),
        (["--device", "quantum"], "No device 'quantum' here"),
        (["--shape", "161m"], "Did you mean '160m'"),
        (["--ids", "nowhere.npy"], "expected a .npy file"),
    ],
)
def test_bad_input(tmp_path, arguments, words):
    common = ["bench", "decode", "--shape", "tiny", "--work", str(tmp_path)]
    done = run(cli.app, [*common, *arguments])
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
