"""What the commands of `mole bench` have in common: what they warn of, and what they refuse."""

import json

import pytest
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import machine, processes, read
from lookup_experts.errors import UserError

run = CliRunner().invoke


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_a_comparison_asks_for_pairs(what):
    done = run(cli.app, ["bench", what, "--pairs", "0"])
    assert done.exit_code == 2 and "--pairs" in done.output


@pytest.mark.parametrize("what", ["decode", "prefill", "read"])
def test_a_page_cache_that_answers_is_noticed(tmp_path, ids, monkeypatch, what):
    monkeypatch.setattr(processes.DiskCounter, "bytes_read", lambda self: 0)
    monkeypatch.setattr(machine, "LARGE_READ", 2**20)
    monkeypatch.setattr(read, "DISK_SAMPLE_BYTES", 4 * 2**20)
    monkeypatch.setattr(read, "SECONDS", 0.02)
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
        (["--plot", "x.gif"], "x.gif is no name of a picture"),
    ],
)
def test_bad_input(tmp_path, arguments, words):
    common = ["bench", "decode", "--shape", "tiny", "--work", str(tmp_path)]
    done = run(cli.app, [*common, *arguments])
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
