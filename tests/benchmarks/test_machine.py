import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch

import lookup_experts
from lookup_experts.benchmarks import machine
from lookup_experts.benchmarks.machine import checkout_commit, describe_machine


def test_this_machine():
    described = describe_machine()
    assert described.cpu and described.vector_instructions
    assert 1 <= described.cores <= (os.cpu_count() or 1)
    assert described.memory_bytes > 2**28
    assert (described.gpu is not None) == torch.cuda.is_available()
    assert described.versions["lookup-experts"] == lookup_experts.__version__
    assert set(described.versions) == {"python", "torch", "transformers", "lookup-experts"}
    assert datetime.fromisoformat(described.date).tzinfo is not None
    assert json.loads(json.dumps(described.to_dict())) == described.to_dict()


@pytest.mark.parametrize(
    ("flops_per_second", "largest"), [(1e9, 512), (1e10, 1024), (1e13, 4096), (1e15, 4096)]
)
def test_no_product_takes_long(monkeypatch, flops_per_second, largest):
    sizes = []

    def seconds_of(matrix):
        sizes.append(len(matrix))
        return 2 * len(matrix) ** 3 / flops_per_second

    monkeypatch.setattr(machine, "_seconds_of_product", seconds_of)
    assert machine.matmul_flops_per_second(torch.float32) == pytest.approx(flops_per_second)
    assert sizes == [size for size in (512, 1024, 2048, 4096) if size <= largest]


def test_what_a_product_takes(monkeypatch):
    monkeypatch.setattr(machine, "MATRIX_SIZE", 256)
    assert machine.matmul_flops_per_second(torch.float32) > 1e8


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with one committed file."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file.py").write_text("1")
    git(tmp_path, "add", "file.py")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


def test_commit_of_a_checkout_says_whether_files_were_changed(checkout):
    head = git(checkout, "rev-parse", "HEAD")[:12]
    assert checkout_commit(checkout / "file.py") == head
    (checkout / "file.py").write_text("2")
    assert checkout_commit(checkout / "file.py") == f"{head}+"


def test_what_was_changed_beside_the_package_does_not_count(checkout):
    for folder in ("package", "docs"):
        (checkout / folder).mkdir()
        (checkout / folder / "file").write_text("1")
        git(checkout, "add", folder)
    git(checkout, "commit", "--quiet", "-m", "two")
    (checkout / "docs" / "file").write_text("2")
    head = git(checkout, "rev-parse", "HEAD")[:12]
    assert checkout_commit(checkout / "package" / "file") == head
    assert checkout_commit(checkout / "docs" / "file") == f"{head}+"


def test_a_file_that_lies_in_a_checkout_of_something_else_has_no_commit(checkout):
    (checkout / "installed.py").write_text("")
    assert checkout_commit(checkout / "installed.py") is None


def test_no_checkout_no_commit(tmp_path):
    assert checkout_commit(tmp_path / "file.py") is None


def test_no_git_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkout_commit(checkout / "file.py") is None


def test_a_processor_without_a_name_is_told_by_its_architecture(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 50\n")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "cpuinfo")
    assert machine._cpu_model() == machine.platform.machine()
