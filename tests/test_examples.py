"""The examples run as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import greedy
from tiny_runs import make_data, tiny_recipe
from transformers import AutoTokenizer

import lookup_experts as le
from lookup_experts.training.train import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_attach_and_fold():
    assert "the table says what the experts say" in run(EXAMPLES / "attach_and_fold.py")


@pytest.mark.timeout(300)
def test_upcycle():
    assert "the folded model says what the trained one says" in run(EXAMPLES / "upcycle.py")


def test_train_tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "the table holds a record for every token, and every record is read once\n" * 50
    )
    out = tmp_path / "tokenizer"
    assert "entries in" in run(EXAMPLES / "train_tokenizer.py", text, out, "--entries", "300")
    assert (out / "tokenizer.json").is_file()


@pytest.mark.timeout(300)
def test_smollm2(tmp_path):
    """Upcycled, folded and served it is in tests/vllm_plugin/test_smollm2.py."""
    folder = tmp_path / "smollm2"
    example = [sys.executable, str(EXAMPLES / "smollm2.py"), str(folder)]
    done = subprocess.run(example, capture_output=True, text=True, check=False)
    if "can't be fetched" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(greedy(le.load(folder), prompt, 5)[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text and a small model that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    data = make_data(folder / "text")
    train(tiny_recipe(steps=2, context_length=256), data, folder / "dense", progress=False)
    return data, folder / "dense"


@pytest.mark.timeout(300)
def test_compare_upcycling_takes_finished_runs_as_they_are(trained, tmp_path):
    data, backbone = trained
    work, report = tmp_path / "work", tmp_path / "upcycling.json"
    variants = ["ffn@1e-2", "experts@1e-3+ffn@1e-2"]
    command = [EXAMPLES / "compare_upcycling.py", *variants, "--backbone", backbone]
    command += ["--data", data, "--work", work, "--json", report]
    command += ["--also", backbone]
    run(*command, "--steps", "2", "--seeds", "1,2")

    before, ffn, both, same = json.loads(report.read_text())["results"]
    for result in (ffn, both):
        assert (result["steps"], result["seeds"]) == (2, 2)
        assert result["gain"] == before["validation_loss"] - result["validation_loss"] != 0
        assert result["validation_loss_std"] is not None
    assert same["validation_loss"] == before["validation_loss"] and same["gain"] == 0
    assert ffn["learning_rates"] == [1e-2] and both["learning_rates"] == [1e-3, 1e-2]
    assert both["parameters_trained"] > ffn["parameters_trained"]
    summaries = [json.loads(path.read_text()) for path in work.glob("ffn@1e-2-seed*/summary.json")]
    losses = [summary["validation_loss"] for summary in summaries]
    assert ffn["validation_loss"] == pytest.approx(sum(losses) / 2)

    first = report.read_text()
    report.unlink()
    for folder in work.iterdir():
        (folder / "model.safetensors").unlink()  # training again would bring it back
    run(*command, "--steps", "2", "--seeds", "1,2")
    assert json.loads(report.read_text())["results"] == json.loads(first)["results"]
    assert not list(work.glob("*/model.safetensors"))

    refused = subprocess.run(
        [sys.executable, *map(str, command), "--steps", "3"], capture_output=True, text=True
    )
    assert refused.returncode and "has 2 steps, not 3" in refused.stderr


@pytest.mark.timeout(300)
def test_compare_upcycling_with_lora_and_narrow_rows(trained, tmp_path):
    data, backbone = trained
    work, report = tmp_path / "work", tmp_path / "upcycling.json"
    command = [EXAMPLES / "compare_upcycling.py", "lora@1e-2", "narrow@1e-2", "meki@1e-2"]
    command += ["--backbone", backbone, "--data", data, "--work", work, "--json", report]
    command += ["--steps", "2", "--row-size", "16", "--set", "training.sequences_per_step=4"]
    run(*command, "--set", "training.sequences_per_micro_batch=2")

    _, lora, narrow, meki = json.loads(report.read_text())["results"]
    assert [result["system"] for result in (lora, narrow, meki)] == [
        "LoRA, rank 16",
        "experts with rows of 16",
        "MeKi's rows of 16",
    ]
    for result in (lora, narrow, meki):
        assert result["tokens"] == 2 * 4 * 256 and 0 < abs(result["gain"]) < 1
    plain = le.load(backbone)
    linears = [
        module
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert lora["parameters_trained"] == 16 * sum(sum(each.weight.shape) for each in linears)

    # What is said of the adapters is true of the folder that they were merged into.
    merged = work / "lora@1e-2-seed1"
    run(*command, "--set", "training.sequences_per_micro_batch=2", "--also", merged)
    _, _, _, _, again = json.loads(report.read_text())["results"]
    assert again["validation_loss"] == pytest.approx(lora["validation_loss"], abs=1e-4)


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert all(example.name in here for example in EXAMPLES.glob("*.py"))
