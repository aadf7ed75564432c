"""`mole bench latency` for real: processes that take turns, on a shape small enough for a test."""

import json
import multiprocessing
import os
import signal
from threading import Thread

import numpy as np
import pytest
import torch
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import machine
from lookup_experts.benchmarks.latency import measure, worker
from lookup_experts.benchmarks.latency.systems import (
    Plan,
    System,
    build,
    parse_systems,
    prepare_tables,
)
from lookup_experts.benchmarks.latency.worker import Runner, Worker, serve
from lookup_experts.benchmarks.results import make_report, write_report
from lookup_experts.errors import UserError
from lookup_experts.model import gateless_llama

pytestmark = pytest.mark.timeout(240)
run = CliRunner().invoke

PEERS = ("moe-6e-disk", "moe-6e-ram", "moe-6e-mmap", "moe-6e-accelerate")


def be_killed(connection, system, plan, sizes):
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def be_without_memory(*arguments):
    worker.build = lambda *_: torch.empty(1 << 60)
    serve(*arguments)


@pytest.mark.slow
def test_processes_take_turns_and_go_on_when_others_fail(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(machine, "LARGE_READ", 2**16)
    targets = {"dense": serve, "moe-6e-disk": serve, "moe-5e": be_killed,
               "moe-7e": be_without_memory}  # fmt: skip
    monkeypatch.setattr(
        measure, "Worker", lambda system, plan: Worker(system, plan, targets[system.name])
    )
    out, bars, memory = (tmp_path / name for name in ("out.json", "new/bars.png", "memory.svg"))
    quality = tmp_path / "quality.json"
    entries = [{"system": "dense", "validation_loss": 3.0}, {"system": "mole-2e"},
               {"system": "moe-6e", "validation_loss": 2.9}]  # fmt: skip
    quality.write_text(json.dumps({"results": entries}))
    arguments = ["moe-5e", "moe-7e", "moe-6e-disk", "--shape", "tiny", "--batch", "1,3",
                 "--prompt", "20", "--steps", "4", "--cache", "100kB", "--ids", str(ids),
                 "--work", str(tmp_path / "work"), "--json", str(out), "--plot", str(bars),
                 "--quality", str(quality), "--memory-plot", str(memory)]  # fmt: skip
    # A batch size that was measured before an interruption isn't measured again.
    names = ["dense", *arguments[:3]]
    before = [{"system": name, "batch": 3, "failed": "kept"} for name in names]
    write_report(make_report("bench latency", before), tmp_path / "out.json.partial")
    done = run(cli.app, ["bench", "latency", *arguments])
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.rglob("*.partial"))
    results = json.loads(out.read_text())["results"]
    assert [result["system"] for result in results] == [
        "dense",
        "moe-5e",
        "moe-7e",
        "moe-6e-disk",
    ] * 2
    assert [result["failed"] for result in results[4:]] == ["kept"] * 4
    dense, killed, exhausted, offloaded = results[:4]
    assert dense["ratio_to_dense"] == 1 and dense["beyond_dense_bytes"] == 0
    assert "killed" in killed["failed"] and "failed killed" in done.output
    assert exhausted["failed"] == "out of memory"
    rows = {(row["system"], row["batch"]): row for row in result_rows("latency", results)}
    assert rows["moe-7e", "1"]["ms per step"] == "out of memory"
    assert rows["moe-7e", "1"]["resident"] == ""
    assert rows["moe-6e-disk", "1"]["resident"].endswith("MB")
    by_batch = result_rows("latency-by-batch", results)
    assert [row["batch 1"] for row in by_batch[1:3]] == [killed["failed"], "out of memory"]
    assert by_batch[0]["batch 1"].endswith("(1.00 ×)") and by_batch[0]["batch 3"] == "kept"
    assert offloaded["bytes_per_step"] > 0 and offloaded["steps"] == 6  # two turns that count
    assert offloaded["disk_floor_ms"] > 0
    assert offloaded["paper_loaded_per_layer"] == pytest.approx(2 * (1 - 2 / 6))
    assert 0 < offloaded["experts_loaded_per_layer"] <= offloaded["experts_used_per_layer"] <= 2
    for result in (dense, offloaded):
        assert result["resident_bytes"] > 10**7 and result["prefill_ms"] > 0
    assert bars.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in memory.read_text()


def test_every_way_of_one_model_says_the_same(tmp_path):
    plan = Plan("tiny", 200_000, tmp_path)
    systems = parse_systems(["moe-6e", *PEERS])
    prepare_tables(plan, systems)
    prompt = np.random.default_rng(0).integers(0, 5000, (2, 9))
    runners = {system.name: Runner(build(system, plan), "cpu") for system in systems[1:]}
    passes = {
        name: [runner.prompt(prompt), *(runner.step(prompt[:, [i]]) for i in range(4))]
        for name, runner in runners.items()
    }
    expected = [found.digest for found in passes["moe-6e"]]
    for name in PEERS:
        assert [found.digest for found in passes[name]] == expected, name
        used = sum(found.counts.experts_used for found in passes[name])
        loaded = sum(found.counts.experts_loaded for found in passes[name])
        assert 0 < loaded < used, name
    assert len(set(expected)) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_way_runs_on_a_gpu(tmp_path):
    plan = Plan("tiny", 200_000, tmp_path, "cuda")
    systems = parse_systems(["mole-2e", "moe-6e", *PEERS])
    prepare_tables(plan, systems)
    prompt = np.random.default_rng(0).integers(0, 5000, (2, 9))
    for system in systems:
        built = build(system, plan)
        runner = Runner(built, "cuda")
        for ids in (prompt, prompt[:, :1], prompt[:, 1:2]):
            found = runner.step(ids)
        assert found.seconds > 0 and runner.memory() > 0
        if system.name in PEERS:
            assert found.counts.experts_used > 0
        assert "host_copy_bytes" not in built.facts  # it isn't in the GPU's memory


@pytest.mark.parametrize(
    ("name", "row_bytes"), [("mole-2e", 2 * 64 * 2), ("mole-2e-r16", 2 * 16 * 2), ("meki-r24", 48)]
)
def test_a_table_of_any_form_counts_what_it_reads(tmp_path, name, row_bytes):
    plan, (_, mole) = Plan("tiny", 0, tmp_path), parse_systems([name])
    prepare_tables(plan, [mole])
    built = build(mole, plan)
    assert built.model.expert_source.table.layout.layer_bytes == row_bytes
    found = Runner(built, "cpu").prompt(np.arange(12).reshape(2, 6))
    assert found.counts.bytes_loaded >= 12 * 3 * row_bytes


def test_a_system_without_enough_memory_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "build", lambda *_: torch.empty(1 << 60))
    ours, theirs = multiprocessing.Pipe()
    ours.send(("facts",))
    plan = Plan("tiny", 0, tmp_path)
    thread = Thread(
        target=serve, args=(theirs, System.parse("moe-6e"), plan, gateless_llama.SHAPES["tiny"])
    )
    thread.start()
    assert str(ours.recv()) == "out of memory"
    ours.close()  # which ends it
    thread.join()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["moe-10"], "No system is called 'moe-10'"),
        (["meki-4e"], "No system is called 'meki-4e'"),
        (["mole-4e-ram"], "No system is called 'mole-4e-ram'"),
        (["--shape", "161m"], "Did you mean '160m'"),
        (["dense", "--prompt", "2040"], "more than the model's context of 2048"),
        (["--memory-plot", "x.png"], "--memory-plot needs --quality"),
        (["--plot", "x.gif"], "x.gif is no name of a picture; expected one of .png, .svg, .pdf"),
        (["--quality", "nowhere.json", "--memory-plot", "x.png"], "expected the JSON of mole"),
    ],
)
def test_bad_input(tmp_path, ids, arguments, words):
    common = ["bench", "latency", "--shape", "tiny", "--work", str(tmp_path), "--ids", str(ids)]
    done = run(cli.app, [*common, *arguments])
    assert isinstance(done.exception, UserError), done.output
    assert words in str(done.exception)


def test_dense_takes_part_in_any_case():
    assert [system.name for system in parse_systems(["mole-16e"])] == ["dense", "mole-16e"]
    assert System.parse("moe-34e-accelerate").model_name == "moe-34e"
