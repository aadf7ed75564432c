"""The examples run as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import make_data, tiny_recipe

from lookup_experts.training.train import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(90)
def test_attach_and_fold():
    assert "the table says what the experts say" in run(EXAMPLES / "attach_and_fold.py")


@pytest.mark.timeout(90)
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


@pytest.mark.timeout(180)
def test_compare_upcycling_takes_finished_runs_as_they_are(tmp_path):
    data = make_data(tmp_path / "text")
    backbone = tmp_path / "dense"
    train(tiny_recipe(steps=2, context_length=256), data, backbone, progress=False)
    work, report = tmp_path / "work", tmp_path / "upcycling.json"
    command = [EXAMPLES / "compare_upcycling.py", backbone, "--data", data, "--work", work]
    command += ["--steps", "2", "--expert-lr", "1e-3", "--ffn-lr", "1e-3", "--json", report]
    run(*command)

    before, experts, ffn = json.loads(report.read_text())["results"]
    assert before["gain"] == 0 and before["learning_rate"] is None
    for result in (experts, ffn):
        assert result["steps"] == 2 and result["learning_rate"] == 1e-3
        assert result["gain"] == before["validation_loss"] - result["validation_loss"] != 0
    assert experts["parameters_trained"] != ffn["parameters_trained"]

    first = report.read_text()
    report.unlink()
    for folder in work.iterdir():
        (folder / "model.safetensors").unlink()  # training again would bring it back
    run(*command)
    assert json.loads(report.read_text())["results"] == json.loads(first)["results"]
    assert not list(work.glob("*/model.safetensors"))


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert all(example.name in here for example in EXAMPLES.glob("*.py"))
