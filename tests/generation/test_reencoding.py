"""`reencode`: folders in, folders of the same kind out; and the commands that make tables."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from random_tables import edit_json, flip_bit, make_table
from tiny_models import greedy, logits_of, token_ids

import lookup_experts as le
from lookup_experts import cli
from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.generation import reencoding
from lookup_experts.generation.inspection import verify_folder
from lookup_experts.generation.reencoding import reencode
from lookup_experts.table import build
from lookup_experts.table.opening import open_table

IDS = token_ids(4, 20)


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory, training_folder):
    """An inference folder whose encoding has rounded; not to be changed."""
    folder = tmp_path_factory.mktemp("half") / "model"
    le.reparameterize(training_folder, folder, encoding="float16")
    return folder


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "nf4", "nf3"])
def test_it_says_what_the_folded_model_says(encoding, training_folder, table_folder, tmp_path):
    made = reencode(table_folder, tmp_path / "made", encoding=encoding)
    folded = le.reparameterize(training_folder, tmp_path / "folded", encoding=encoding)
    assert made == open_table(tmp_path / "made" / "table")
    assert made.manifest == folded.manifest
    found, expected = le.load(tmp_path / "made"), le.load(tmp_path / "folded", store="direct")
    torch.testing.assert_close(
        logits_of(found, IDS), logits_of(expected, IDS), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(greedy(found, IDS, 8), greedy(expected, IDS, 8))


def test_what_comes_out_is_intact_and_has_all_that_was_there(table_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(table_folder, source)
    (source / "notes").mkdir()
    (source / "notes" / "table.txt").write_text("mine")
    reencode(source, tmp_path / "made", encoding="nf4", block_size=16)
    assert not verify_folder(tmp_path / "made").problems
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "table/" not in str(path)}
        for folder in (source, tmp_path / "made")
    ]
    assert names[0] == names[1]
    assert (tmp_path / "made" / "notes" / "table.txt").read_text() == "mine"
    assert (tmp_path / "made" / "tokenizer.json").exists()
    assert not (tmp_path / "made.partial").exists()


def test_weights_are_linked_and_what_may_be_edited_is_not(table_folder, tmp_path):
    reencode(table_folder, tmp_path / "made", encoding="int8")
    assert (tmp_path / "made" / "model.safetensors").samefile(table_folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        assert not (tmp_path / "made" / name).samefile(table_folder / name)
        assert (tmp_path / "made" / name).read_bytes() == (table_folder / name).read_bytes()


def test_saving_a_model_leaves_the_folder_it_shares_weights_with(table_folder, tmp_path):
    shutil.copytree(table_folder, tmp_path / "source")
    before = (tmp_path / "source" / "model.safetensors").read_bytes()
    reencode(tmp_path / "source", tmp_path / "made", encoding="int8")
    model = le.load(tmp_path / "made")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "made")
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == before


def test_a_bare_table_becomes_a_bare_table(tmp_path):
    source, _ = make_table(tmp_path / "source", encoding="float32", ids_per_shard=15)
    made = reencode(tmp_path / "source", tmp_path / "made", encoding="nf3")
    assert made == open_table(tmp_path / "made")
    assert made.manifest.fingerprint == source.manifest.fingerprint
    assert not verify_folder(tmp_path / "made").problems
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "table-00001-of-00001.safetensors",
        "table.json",
    ]


def test_what_was_rounded_away_is_said_in_one_line(half_folder, table_folder, tmp_path):
    said = []
    reencode(half_folder, tmp_path / "a", encoding="nf4", notify=said.append)
    assert len(said) == 1
    assert "float16: what that rounded away is not brought back" in said[0]
    said.clear()
    reencode(table_folder, tmp_path / "b", encoding="nf4", notify=said.append)
    assert not said


def test_the_source_is_left_as_it_was(half_folder, tmp_path):
    before = {path: path.read_bytes() for path in half_folder.rglob("*") if path.is_file()}
    reencode(half_folder, tmp_path / "out", encoding="nf4")
    after = {path: path.read_bytes() for path in half_folder.rglob("*") if path.is_file()}
    assert after == before


# ------------------------------------------------------------------------------- interruption


def test_an_interrupted_run_goes_on(table_folder, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    said = []
    with pytest.raises(KeyboardInterrupt):
        reencode(table_folder, tmp_path / "out", encoding="nf4", progress=stop)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "config.json").write_text('{"half of')
    reencode(table_folder, tmp_path / "out", encoding="nf4", notify=said.append)
    assert said == [f"Going on with the interrupted run in {tmp_path / 'out.partial'}."]
    assert not verify_folder(tmp_path / "out").problems
    reencode(table_folder, tmp_path / "expected", encoding="nf4")
    assert _shards(tmp_path / "out") == _shards(tmp_path / "expected")


def _shards(folder) -> list[bytes]:
    table = open_table(folder / "table")
    return [table.path(shard).read_bytes() for shard in table.shards]


def _reencode_slowly(folder, out) -> None:
    reencode(folder, out, encoding="nf4", progress=lambda done, total: time.sleep(0.005))


def test_a_killed_run_goes_on(table_folder, tmp_path, monkeypatch):
    """SIGKILL at random moments, several times in a row; a process of its own each time."""
    monkeypatch.setattr(build, "MAX_CHUNK_IDS", 7)
    chosen, fork = random.Random(1), multiprocessing.get_context("fork")
    kills = 0
    while not (tmp_path / "out").exists() and kills < 5:
        process = fork.Process(target=_reencode_slowly, args=(table_folder, tmp_path / "out"))
        process.start()
        process.join(chosen.uniform(0.05, 0.15))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills
    if not (tmp_path / "out").exists():
        reencode(table_folder, tmp_path / "out", encoding="nf4")
    reencode(table_folder, tmp_path / "expected", encoding="nf4")
    assert _shards(tmp_path / "out") == _shards(tmp_path / "expected")
    assert not verify_folder(tmp_path / "out").problems


# --------------------------------------------------------------------------------- bad input


def test_what_has_no_table_is_refused(training_folder, tmp_path):
    with pytest.raises(UserError, match=r"in training form.*mole reparameterize"):
        reencode(training_folder, tmp_path / "out", encoding="nf4")
    with pytest.raises(UserError, match="No such folder"):
        reencode(tmp_path / "missing", tmp_path / "out", encoding="nf4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        reencode(tmp_path / "empty", tmp_path / "out", encoding="nf4")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no model in table form"):
        reencode(tmp_path / "empty", tmp_path / "out", encoding="nf4")
    assert not list(tmp_path.glob("out*"))


def test_bad_arguments_are_refused_first(table_folder, tmp_path):
    with pytest.raises(UserError, match="Unknown encoding 'nf5'"):
        reencode(table_folder, tmp_path / "out", encoding="nf5")
    with pytest.raises(UserError, match="int8 has no blocks"):
        reencode(table_folder, tmp_path / "out", encoding="int8", block_size=64)
    with pytest.raises(UserError, match="is in float32 already"):
        reencode(table_folder, tmp_path / "out", encoding="float32")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        reencode(table_folder, tmp_path / "there", encoding="nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("bare", [True, False])
def test_a_folder_inside_of_the_source_is_refused(bare, table_folder, tmp_path):
    if bare:
        make_table(tmp_path / "source")
    else:
        shutil.copytree(table_folder, tmp_path / "source")
    with pytest.raises(UserError, match=r"lies in .*which is read"):
        reencode(tmp_path / "source", tmp_path / "source" / "out", encoding="nf4")
    assert not list((tmp_path / "source").glob("out*"))


def test_another_block_size_is_another_encoding(table_folder, tmp_path):
    reencode(table_folder, tmp_path / "a", encoding="nf4", block_size=16)
    with pytest.raises(UserError, match=r"in nf4 \(blocks of 16\) already"):
        reencode(tmp_path / "a", tmp_path / "b", encoding="nf4", block_size=16)
    table = reencode(tmp_path / "a", tmp_path / "b", encoding="nf4", block_size=8)
    assert table.layout.encoding.block_size == 8


def test_the_table_of_another_model_is_refused(table_folder, tmp_path):
    shutil.copytree(table_folder, tmp_path / "source")
    edit_json(
        tmp_path / "source" / "config.json",
        lambda config: config["lookup_experts"].update(fingerprint="of another"),
    )
    with pytest.raises(TableError, match="table of another model"):
        reencode(tmp_path / "source", tmp_path / "out", encoding="nf4")


def test_a_damaged_table_is_refused(table_folder, tmp_path):
    shutil.copytree(table_folder, tmp_path / "source")
    table = open_table(tmp_path / "source" / "table")
    flip_bit(table.path(table.shards[0]), 4096 + 40 * table.layout.stride)
    with pytest.raises(TableError, match="record of id 40 is damaged"):
        reencode(tmp_path / "source", tmp_path / "out", encoding="nf4")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_an_error_in_one_line(table_folder, tmp_path, monkeypatch):
    def no_space(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(reencoding, "link_or_copy", no_space)
        with pytest.raises(DiskFullError, match="no space left"):
            reencode(table_folder, tmp_path / "out", encoding="nf4")
    free = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patched:
        patched.setattr(build.shutil, "disk_usage", lambda folder: free)
        with pytest.raises(DiskFullError, match=r"needs .* more in"):
            reencode(table_folder, tmp_path / "out", encoding="nf4")
    reencode(table_folder, tmp_path / "out", encoding="nf4")
    assert not verify_folder(tmp_path / "out").problems


# ------------------------------------------------------------------------------- the commands


@pytest.fixture
def mole(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mole", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog . " * 20)
    return path


@pytest.mark.parametrize("command", ["reparameterize", "reencode"])
def test_commands_report_on_quality(
    command, mole, training_folder, table_folder, tokenizer, text, tmp_path
):
    source = training_folder if command == "reparameterize" else table_folder
    code, out, err = mole(
        command, source, tmp_path / "out", "--encoding", "nf4", "--eval", text, "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["folder"] == str(tmp_path / "out")
    assert report["quality"]["encoding"] == report["encoding"] == "nf4"
    assert report["quality"]["record_bytes"] == report["record_bytes"]
    assert 0.01 < report["quality"]["rows"]["relative_error"] < 0.12
    num_tokens = len(tokenizer(text.read_text())["input_ids"])
    assert report["quality"]["text"]["predicted_tokens"] == num_tokens - 1
    assert 0 < report["quality"]["text"]["top1_agreement"] <= 1
    assert open_table(tmp_path / "out" / "table").manifest.fingerprint == report["fingerprint"]


@pytest.mark.parametrize("command", ["reparameterize", "reencode"])
def test_commands_take_another_block_size(command, mole, training_folder, table_folder, tmp_path):
    source = training_folder if command == "reparameterize" else table_folder
    errors = {}
    for size in (4, 32):
        out = tmp_path / str(size)
        told = ("--encoding", "nf4", "--block-size", size, "--json")
        code, report, err = mole(command, source, out, *told)
        assert code == 0, err
        assert open_table(out / "table").layout.encoding.block_size == size
        errors[size] = json.loads(report)["quality"]["rows"]["relative_error"]
    assert errors[4] < errors[32]


@pytest.mark.parametrize("command", ["reparameterize", "reencode"])
def test_commands_report_on_rows_without_a_text(
    command, mole, training_folder, table_folder, tmp_path
):
    source = training_folder if command == "reparameterize" else table_folder
    code, out, _ = mole(command, source, tmp_path / "out", "--encoding", "int8")
    assert code == 0
    assert "relative error" in out
    assert "of float16" in out
    assert "perplexity" not in out


def test_a_bare_table_can_be_reencoded_but_predicts_nothing(mole, text, tmp_path):
    make_table(tmp_path / "table", encoding="float32")
    arguments = ["reencode", tmp_path / "table", tmp_path / "out", "--encoding", "nf4"]
    code, _, err = mole(*arguments, "--eval", text)
    assert code == 2
    assert "a table without a model" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = mole(*arguments, "--json")
    assert code == 0
    assert json.loads(out)["quality"]["text"] is None


@pytest.mark.parametrize("command", ["reparameterize", "reencode"])
def test_commands_tell_bad_input_in_one_line_before_they_work(
    command, mole, training_folder, table_folder, text, tmp_path
):
    source = training_folder if command == "reparameterize" else table_folder
    bad = [
        (["--encoding", "nf5"], "Unknown encoding"),
        (["--encoding", "nf4", "--block-size", 0], "Block size 0"),
        (["--encoding", "nf4", "--eval", tmp_path / "missing.txt"], "is no file"),
    ]
    for arguments, words in bad:
        code, out, err = mole(command, source, tmp_path / "out", *arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert len(err.strip().splitlines()) == 1
    shutil.copytree(source, tmp_path / "wordless")
    for file in (tmp_path / "wordless").glob("tokenizer*"):
        file.unlink()
    code, _, err = mole(
        command, tmp_path / "wordless", tmp_path / "out", "--encoding", "nf4", "--eval", text
    )
    assert code == 2
    assert "has no tokenizer" in err
    assert not list(tmp_path.glob("out*"))


def test_an_encoding_must_be_named(mole, table_folder, tmp_path):
    code, _, err = mole("reencode", table_folder, tmp_path / "out")
    assert code == 2
    assert "--encoding" in err
