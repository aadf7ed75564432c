"""`mole bench train` for real, on a shape small enough for a test."""

import json

import numpy as np
import pytest
import torch
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import train
from lookup_experts.benchmarks.text import TextWindows
from lookup_experts.benchmarks.train import Rows, TrainingCase
from lookup_experts.errors import UserError

run = CliRunner().invoke


def bench(tmp_path, ids, *arguments: object) -> list[dict]:
    out = tmp_path / "train.json"
    common = ["--shape", "tiny", "--layers", "2", "--context", "32", "--ids", str(ids)]
    words = ["bench", "train", *common, "--json", str(out), *map(str, arguments)]
    done = run(cli.app, words)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())["results"]


def test_every_system_beside_what_flops_say(tmp_path, ids):
    plot = tmp_path / "plot.png"
    arguments = ("--tokens", "32,128", "--experts", "2,3", "--rounds", 2, "--no-peak")
    results = bench(tmp_path, ids, *arguments, "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    systems = [(r["system"], r.get("num_experts")) for r in results if r["tokens"] == 128]
    assert systems == [
        ("dense", None),
        ("unique", 2),
        ("per_position", 2),
        ("unique", 3),
        ("per_position", 3),
    ]
    dense, unique, position, *_ = results[5:]
    assert dense["flop_ratio_to_dense"] == 1
    assert 1 < unique["flop_ratio_to_dense"] < position["flop_ratio_to_dense"]
    assert unique["flop_speedup"] == pytest.approx(
        position["flop_ratio_to_dense"] / unique["flop_ratio_to_dense"]
    )
    assert unique["speedup_over_per_position"] > 0
    assert 0 < unique["unique"] < 128
    for result in results:
        rate = result["tokens"] / result["seconds_per_step"]
        assert result["tokens_per_second"] == pytest.approx(rate)
        assert result["flop_utilisation"] > 0
    rows = result_rows("train", results)
    assert [row["system"] for row in rows[:3]] == ["dense", "unique, 2 experts",
                                                   "per position, 2 experts"]  # fmt: skip
    assert "micro batches" not in rows[0] and rows[0]["faster than per position"] == ""


def test_narrow_rows_beside_wide_ones(tmp_path, ids):
    plot = tmp_path / "plot.png"
    arguments = ("--tokens", 64, "--experts", "2,2-r8,meki-r8", "--rounds", 1, "--plot", plot)
    results = bench(tmp_path, ids, *arguments, "--no-peak")
    found = [(r["system"], r.get("form"), r.get("row_size")) for r in results if "row_size" in r]
    assert found == [
        ("unique", None, 8), ("per_position", None, 8),
        ("unique", "meki", 8), ("per_position", "meki", 8),
    ]  # fmt: skip
    _, wide, _, narrow, _, meki, _ = results
    assert narrow["flop_ratio_to_dense"] < wide["flop_ratio_to_dense"]
    assert meki["flop_ratio_to_dense"] < wide["flop_ratio_to_dense"]
    names = [row["system"] for row in result_rows("train", results)]
    assert names[1::2] == [
        "unique, 2 experts", "unique, 2 experts, rows of 8", "unique, meki, rows of 8",
    ]  # fmt: skip
    assert plot.stat().st_size > 1000


def test_accumulation_with_shared_outputs(tmp_path, ids):
    arguments = ("--tokens", 32, "--experts", 2, "--accumulate", 3, "--rounds", 1, "--no-peak")
    dense, unique, shared = bench(tmp_path, ids, *arguments)
    assert (dense["system"], unique["system"], shared["system"]) == ("dense", "unique", "shared")
    assert shared["unique"] < unique["unique"] <= 3 * 32
    assert shared["flop_speedup_over_unique"] > 1
    assert shared["speedup_over_unique"] > 0
    assert dense["tokens_per_second"] == pytest.approx(3 * 32 / dense["seconds_per_step"])
    rows = result_rows("train", [dense, unique, shared])
    assert rows[2]["system"] == "shared, 2 experts"
    assert rows[2]["faster than unshared"].endswith("×") and not rows[1]["faster than unshared"]


def test_the_trainer_beside_a_bare_loop(tmp_path, ids):
    arguments = ("--tokens", 64, "--experts", 2, "--trainer", "--rounds", 3)
    (result,) = bench(tmp_path, ids, *arguments)
    assert result["rounds"] == 3
    assert result["ratio_to_bare_loop"] > 0.5
    (row,) = result_rows("trainer", [result])
    assert row["× the bare loop"] == f"{result['ratio_to_bare_loop']:.3f}"


def test_peak_memory_is_of_a_process_of_its_own():
    case = train.case_of_shape("tiny", 1, context=32, head=False)
    held = np.ones(800_000_000, np.uint8)
    peak = train.peak_bytes(case, ("unique", Rows(2)), [torch.ones(1, 33, dtype=torch.int64)])
    assert 100e6 < peak < held.nbytes


@pytest.mark.slow
def test_every_row_has_its_peak_memory(tmp_path):
    """Of ten ids in all: what per-position keeps of its experts tells it from unique."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(20_000) % 10)
    arguments = ("--tokens", 4096, "--experts", 4, "--rounds", 1, "--no-head")
    dense, unique, position = bench(tmp_path, ids, *arguments)
    peaks = [row["peak_bytes"] for row in (dense, unique, position)]
    assert all(100e6 < peak < 10e9 for peak in peaks)
    hidden_bytes = 2 * 4 * 4096 * 128 * 4  # of the experts' hidden states, in two layers
    assert position["peak_bytes"] > unique["peak_bytes"] + hidden_bytes


def test_the_steps_gradients_are_those_of_the_model_s_own_loss():
    """The head in chunks of positions, with and without a rest."""
    case = train.case_of_shape("tiny", 1, context=32)
    model = case.build(Rows(2))
    batch = torch.randint(0, 500, (2, 33))
    train.HEAD_CHUNK, before = 48, train.HEAD_CHUNK
    try:
        train.forward_and_backward(model, batch, head=True)
    finally:
        train.HEAD_CHUNK = before
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=batch[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-7)


def test_flops_are_those_of_the_operations_that_run():
    """Counted by torch, to 2 %: it doesn't count the weighted sum, and of attention both halves."""
    from torch.utils.flop_counter import FlopCounterMode

    case = train.case_of_shape("160m", 1, context=64, head=False)
    model = case.build(Rows(2))
    batch = torch.randint(0, 20, (4, 65))
    ratio = 256 / len(batch[:, :-1].unique())
    with FlopCounterMode(display=False) as counter:
        train.forward_and_backward(model, batch, head=False)
    expected = 256 * case.flops("unique", Rows(2), ratio)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "48"], "--tokens 48 is no multiple of --context 32"),
        (["--dtype", "float31"], "Did you mean 'float32'"),
        (
            ["--experts", "4,x"],
            "numbers like 4,16, or narrow rows like 4-r192 and meki-r96; got 'x'",
        ),
        (["--trainer", "--plot", "x.png"], "leave it out with --trainer"),
    ],
)
def test_bad_input(ids, arguments, words):
    common = ["bench", "train", "--shape", "tiny", "--context", "32", "--ids", str(ids)]
    done = run(cli.app, [*common, *arguments])
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)


def test_a_gpu_is_warmed_up_by_a_step_of_the_size_that_counts(ids):
    """Where memory is taken and kernels are chosen; the device `meta` stands for it."""
    windows = TextWindows(np.load(ids))
    case = TrainingCase({"hidden_size": 64}, context=32, device="meta")
    batch = train._warm_up_batch(case, windows, 128)
    assert batch.shape == (4, 33) and batch.device.type == "meta"
    on_cpu = TrainingCase({"hidden_size": 64}, context=32)
    assert train._warm_up_batch(on_cpu, windows, 128).shape == (1, 33)
