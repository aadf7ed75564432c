"""`mole prepare`: the words it answers with, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_texts import prose, write_rows

from lookup_experts import cli

MOLE = Path(sys.executable).with_name("mole")


@pytest.fixture
def mole(monkeypatch, capsys, tokenizer_folder, tmp_path):
    """Run `mole prepare` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object, tokenizer: object = tokenizer_folder) -> tuple[int, str, str]:
        options = ["--workers", 1, "--tokenizer", tokenizer, "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["mole", "prepare", *map(str, [*options, *arguments])])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def binary(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command."""
    return subprocess.run(
        [MOLE, "prepare", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_summary_in_words_and_as_json(mole, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [prose(200, seed) for seed in range(20)] + [""])
    code, words, error = mole(rows)
    assert code == 0
    assert "documents that end in it: 19" in words
    assert "Left out, because empty: 1 documents." in words
    assert "Tokenising" in error
    code, words, _ = mole(rows)
    assert "is complete already; nothing was done." in words
    code, printed, _ = mole(rows, "--json")
    summary = json.loads(printed)
    assert summary["was_complete"]
    assert summary["splits"]["train"]["num_documents"] == 19
    assert (summary["dtype"], summary["vocab_size"]) == ("uint16", 300)


def test_what_was_taken_as_what_is_told_and_what_was_passed_over_and_why(
    tmp_path, tokenizer_folder
):
    """A clone of a data set's repository, through the real command."""
    folder = tmp_path / "set"
    for name in (".git/config", "README.md", "load.py", "data/LICENSE", "data/more.txt", "a/b.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("Not a document?")
    for number in range(6):
        write_rows(folder / "data" / f"{number}.jsonl", [prose(200, number), prose(200, -number)])
    (folder / "data" / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "data" / "again").symlink_to(folder / "a")
    options = ["--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--workers", "1"]
    done = binary(folder, *options, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    taken = {Path(i["name"]).name: i["taken_as"] for i in told["inputs"]}
    rows = {f"{number}.jsonl": "a document per row" for number in range(6)}
    assert taken == rows | {"more.txt": "one document", "b.md": "one document"}
    reasons = {Path(p["name"]).name: p["reason"].split(",")[0] for p in told["passed_over"]}
    assert reasons == {
        ".git": "hidden",
        "README.md": "the card of a data set",
        "load.py": "a script of a data set",
        "LICENSE": "unknown ending",
        "gone.txt": "a link to nothing",
        "again": "a link to a folder",
    }
    assert sum(split["num_documents"] for split in told["splits"].values()) == 12 + 2
    told_lines = done.stderr.splitlines()
    assert "Taken, each as a document per row, field 'text': 6 (" in done.stderr
    assert next(line for line in told_lines if "field" in line).endswith("3.jsonl …)")
    assert any(
        line.startswith("Passed over, the card of a data set, beside") for line in told_lines
    )
    named = binary(folder / "README.md", folder / "load.py", *options[:3], tmp_path / "named")
    assert "Taken, each as one document: 2 (" in named.stderr


def test_a_single_document_is_said(mole, tmp_path):
    (tmp_path / "a.txt").write_text(prose(2000, seed=0))
    _, words, _ = mole(tmp_path / "a.txt")
    assert "There is one document only, so the end of it was held out for validation." in words


def test_help_has_an_example():
    done = binary("--help")
    assert done.returncode == 0
    assert "mole prepare books/" in done.stdout


def the_line(error: str) -> str:
    """The one line of an error; before it what was taken may be told, and a progress bar."""
    *before, line = error.splitlines()
    assert line.startswith("mole: ")
    assert all(not other or "━" in other or other.startswith("Taken, ") for other in before)
    return line


def make_inputs(folder: Path) -> None:
    (folder / "text.txt").write_text("some text")
    (folder / "empty.txt").touch()
    (folder / "picture.png").touch()
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "tw\n')
    (folder / "nameless.jsonl").write_text('{"body": "one"}\n')
    (folder / "blank.jsonl").write_text('{"text": ""}\n')
    (folder / "latin.txt").write_bytes("é".encode("latin1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.txt"], "nope.txt not found: there is no such file or folder."),
        (["picture.png"], "picture.png has an unknown file type. Known endings: .txt, .md"),
        (["empty.txt"], "There is no text to prepare"),
        (["blank.jsonl"], "only empty documents: 1."),
        (["broken.jsonl"], "broken.jsonl, line 2: not valid JSON"),
        (["nameless.jsonl"], "line 1: no field 'text'; there are 'body'."),
        (["latin.txt"], "latin.txt is not UTF-8 text"),
        (["text.txt", "text.txt"], "text.txt is given twice"),
        (["text.txt", "--validation", "1"], "--validation 1.0: expected a share"),
        (["text.txt", "--workers", "0", "--json"], "--workers 0: expected at least 1"),
        (["text.txt", "--eos-token", "<eos>"], "--eos-token '<eos>' is not in the vocabulary"),
    ],
)
def test_bad_input(mole, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    code, printed, error = mole(*arguments)
    assert (code, printed) == (2, "")
    assert message in the_line(error)


def test_a_tokenizer_that_is_not_there(mole, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    code, _, error = mole(tmp_path / "a.txt", tokenizer="./nope")
    assert code == 2
    assert error == "mole: Tokenizer ./nope not found: there is no such file or folder.\n"


def test_the_real_command_refuses_in_one_line(tmp_path, tokenizer_folder):
    make_inputs(tmp_path)
    options = ["--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--workers", "2"]
    for name, message in (("broken.jsonl", "broken.jsonl, line 2"), ("nope.md", "not found")):
        done = binary(tmp_path / name, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in the_line(done.stderr)


def test_the_real_command_with_workers(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text(prose(2000, seed=0))
    options = ["--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--workers", "2"]
    done = binary(tmp_path / "a.txt", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["num_tokens"] > 100
