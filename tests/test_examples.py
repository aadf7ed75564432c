"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert all(example.name in here for example in EXAMPLES.glob("*.py"))
