"""`mole bench` decode, prefill and memory of models with embeddings in tables."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_models import saved_and_offloaded
from result_rows import result_rows
from run_command import run_command
from safetensors import safe_open
from tiny_models import VOCAB

import lookup_experts as le
from lookup_experts.benchmarks import released
from lookup_experts.benchmarks.offloaded import CONTROL_GROUPS, Subjects
from lookup_experts.generation.inspection import verify_folder


@pytest.fixture(scope="module", params=["gemma3n_text", "qwen4_exp_text"])
def folders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    plain, out = saved_and_offloaded(request.param, folder)
    ids = np.random.default_rng(0).integers(3, VOCAB, 20_000)
    np.save(folder / "ids.npy", ids)
    return ("--model", out, "--resident", plain, "--ids", folder / "ids.npy", "--work", folder)


def _bench(capsys, *arguments):
    code, out, err = run_command(capsys, "bench", *arguments)
    assert code == 0, err
    return json.loads(out)["results"]


def test_decoding(folders, capsys):
    found = _bench(capsys, "decode", *folders, "--batch", "1,4", "--pairs", "3", "--cache", "1MB")
    systems = [(result["system"], result["batch"]) for result in found]
    assert systems == [(s, b) for b in (1, 4) for s in ("resident", "mapped", "offloaded")]
    assert found[0]["ratio_to_resident"] == 1
    assert found[1]["ratio_to_mapped"] == 1
    assert found[2]["store"] == "direct"
    assert 0 < found[2]["hit_rate"] < 1
    assert 0 < found[2]["share_wanted"] <= 1  # of what was missed
    rows = result_rows("embedding-steps", found)
    assert [row["embeddings"] for row in rows[:3]] == ["resident", "mapped", "offloaded"]
    assert (rows[0][""], rows[0]["× resident"]) == ("batch 1", "1.000")
    assert rows[1]["× mapped"] == "1.000"
    assert rows[2]["cache"].endswith(" MB")


def test_prompts(folders, capsys):
    found = _bench(capsys, "prefill", *folders, "--tokens", "70", "--pairs", "2")
    assert [result["system"] for result in found] == ["resident", "mapped", "offloaded"]
    assert found[2]["bytes_per_step"] > 0
    assert 0 < found[2]["share_wanted"] <= 1


@pytest.mark.slow
def test_cold_prompts(folders, capsys):
    found = _bench(capsys, "prefill", *folders, "--tokens", "70", "--pairs", "1", "--cold")
    assert [(result["system"], result["cold"]) for result in found] == [
        ("mapped", True),
        ("offloaded", True),
    ]
    assert all(result["rows_ms"] > 0 for result in found)
    rows = result_rows("embedding-steps", found)
    assert rows[0][""] == "70 tokens, the first prompt, nothing in the page cache"


@pytest.mark.slow
def test_memory(folders, capsys):
    found = {one["system"]: one for one in _bench(capsys, "memory", *folders, "--cache", "0")}
    assert list(found) == ["without", "offloaded", "mapped", "resident"]
    assert found["without"]["table_bytes_held"] == 0
    assert found["offloaded"]["page_cache_bytes"] <= 65_536  # headers
    rows = result_rows("embedding-memory", list(found.values()))
    assert (rows[0]["embeddings"], rows[0]["for the embeddings"]) == ("without", "0 MB")


@pytest.mark.slow
def test_within_a_limit(folders, capsys):
    groups = next(place for place in CONTROL_GROUPS if place.is_dir())
    with suppress(OSError):  # superusers only, as --limit itself
        (groups / "mole-bench-999999999").mkdir()  # of a process that was killed
    arguments = ("decode", *folders, "--batch", "2", "--pairs", "2", "--limit", "100MB")
    code, out, err = run_command(capsys, "bench", *arguments)
    if code == 2:
        assert "control group" in err
        assert "superuser" in err
        return
    found = json.loads(out)["results"]
    assert [result["system"] for result in found] == ["mapped", "offloaded"]
    assert found[1]["ratio_to_mapped"] > 0
    left = [group.name.split("-")[-1] for group in groups.glob("mole-bench-*")]
    assert all(Path("/proc", number).exists() for number in left)
    assert result_rows("embedding-steps", found)[1][""] == "batch 2, 100MB beside the weights"


def test_folders_that_are_no_pair(folders, capsys):
    _, out, _, plain, *_ = folders
    code, _, err = run_command(capsys, "bench", "decode", "--model", out)
    assert code == 2
    assert "belong together" in err
    code, _, err = run_command(capsys, "bench", "decode", "--model", plain, "--resident", plain)
    assert code == 2
    assert "has no embeddings in tables" in err


@pytest.mark.parametrize("system", ["resident", "mapped", "offloaded"])
def test_models_are_no_inference_tensors_wherever_they_are_loaded(folders, system):
    """Else torch copies the head for every prompt."""
    _, out, _, plain, _, ids, _, work = folders
    with torch.inference_mode():
        model = Subjects(out, plain, "direct", "0", ids, work).load(system)
    assert not any(weight.is_inference() for weight in model.parameters())


@pytest.mark.parametrize("shape", released.SHAPES)
def test_checkpoints_of_released_shapes(shape, tmp_path, monkeypatch):
    """Made small."""
    model_type, sizes = released.SHAPES[shape]
    small = {"vocab_size": 500, "vocab_size_per_layer_input": 500, "ngram_vocab_size_base": 300}
    less = {"hidden_size": 64, "intermediate_size": [64] * 30}
    changed = {**sizes, **{k: v for k, v in (small | less).items() if k in sizes}}
    monkeypatch.setitem(released.SHAPES, shape, (model_type, changed))
    plain, out = released.released_folders(shape, "bfloat16", tmp_path)
    assert verify_folder(out).problems == ()
    with safe_open(plain / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10
    assert released.released_folders(shape, "bfloat16", tmp_path) == (plain, out)
    new = le.load(out, weights="plain").generate(torch.tensor([[5, 7, 11]]), max_new_tokens=4)
    assert new.shape[1] > 3  # they decode
