"""Preparing text: what is written, whoever does it, and after whatever interruption."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import OTHER_ROWS, REVISION, ROWS, serve_hub
from tiny_texts import bytes_of, prose, write_rows

from lookup_experts.errors import DiskFullError, UserError
from lookup_experts.training import pieces, sections
from lookup_experts.training import prepare as prepare_module
from lookup_experts.training.data import TokenShards
from lookup_experts.training.prepare import prepare

TESTS = Path(__file__).resolve().parents[1]
EOS = 0


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sections, "PIECE_CHARACTERS", 3000)
    monkeypatch.setattr(sections, "SECTION_CHARACTERS", 1000)


@pytest.fixture(scope="module")
def mixed_text(tmp_path_factory) -> Path:
    """A folder with every kind of file; a document longer than a piece, and empty documents."""
    folder = tmp_path_factory.mktemp("mixed") / "text"
    folder.mkdir()
    texts = [prose(150, seed) for seed in range(60)]
    (folder / "a.txt").write_text(prose(9000, seed=100))
    (folder / "b.txt.gz").write_bytes(gzip.compress(prose(800, seed=101).encode()))
    (folder / "c.md").write_text("# A title\n")
    (folder / "d.txt").write_text("")
    write_rows(folder / "e.jsonl", [*texts[:20], "", "  \n", *texts[20:30]])
    rows = write_rows(folder.parent / "f.jsonl", texts[30:45])
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[45:50]}), folder / "g.parquet")
    packed = pyarrow.compress(
        write_rows(folder.parent / "h.jsonl", texts[50:]).read_bytes(), "zstd", asbytes=True
    )
    (folder / "h.jsonl.zst").write_bytes(packed)
    return folder


def documents_of(folder: Path, tokenizer) -> list[str]:
    """The text of all documents of both splits, decoded, sorted."""
    found = []
    for split in ("train", "validation"):
        opened = TokenShards(folder, split)
        opened.verify()
        tokens = opened.window(0, opened.num_tokens)
        assert tokens[-1] == EOS
        ends = np.flatnonzero(tokens == EOS)
        assert len(ends) == opened.manifest.num_documents(split)
        found += [tokenizer.decode(part[part != EOS]) for part in np.split(tokens, ends)[:-1]]
    return sorted(found)


def test_every_kind_of_file(mixed_text, tmp_path, tokenizer_folder, tiny_tokenizer, small_pieces):
    prepared = prepare(
        [mixed_text], tokenizer=tokenizer_folder, out=tmp_path / "out", validation=0.05
    )
    expected = [prose(150, seed) for seed in range(60)]
    expected += [prose(9000, seed=100), prose(800, seed=101), "# A title\n"]
    assert documents_of(prepared.folder, tiny_tokenizer) == sorted(expected)
    manifest = prepared.manifest
    assert manifest.num_empty_documents == 3
    assert manifest.held_out == {"fraction": 0.05, "by": "document"}
    assert [Path(source["name"]).name for source in manifest.inputs] == sorted(
        path.name for path in mixed_text.iterdir()
    )
    assert sorted(path.name for path in prepared.folder.iterdir()) == [
        "job.json",
        "manifest.json",
        "tokenizer",
        "train-00000.bin",
        "validation-00000.bin",
    ]
    share = manifest.num_tokens("validation") / manifest.num_tokens("train")
    assert 0.02 < share < 0.11
    assert not prepared.was_complete


def test_workers_make_no_difference(mixed_text, tmp_path, tokenizer_folder, small_pieces):
    outs = []
    for num_workers in (1, 3):
        out = tmp_path / str(num_workers)
        prepare([mixed_text], tokenizer=tokenizer_folder, out=out, num_workers=num_workers)
        outs.append(bytes_of(out))
    assert outs[0] == outs[1]


def test_tokens_are_those_of_the_tokenizer(tmp_path, tokenizer_folder, tiny_tokenizer):
    """The slow reference: the tokenizer applied to every document, one after the other."""
    texts = [f"{prose(300, seed)} ünï\n\ncode <|endoftext|> x" for seed in range(40)]
    rows = write_rows(tmp_path / "a.jsonl", texts)
    prepare([rows], tokenizer=tokenizer_folder, out=tmp_path / "out", validation=0)
    expected = [i for text in texts for i in [*tiny_tokenizer.encode(text).ids, EOS]]
    opened = TokenShards(tmp_path / "out")
    assert opened.window(0, opened.num_tokens).tolist() == expected
    with pytest.raises(UserError, match="has no validation text"):
        TokenShards(tmp_path / "out", "validation")


def test_a_large_vocabulary_takes_four_bytes(tmp_path, tokenizer_folder):
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    token = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"<{i}>": i for i in range(len(vocabulary), 70_000)})
    tokenizer["added_tokens"].append(
        {**token, "id": 70_000, "content": "zebra", "normalized": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "a.txt").write_text("zebra " * 100)
    prepared = prepare(
        [tmp_path / "a.txt"],
        tokenizer=tmp_path / "tokenizer.json",
        eos_token="<|endoftext|>",
        out=tmp_path / "out",
    )
    assert (prepared.manifest.dtype, prepared.manifest.vocab_size) == ("uint32", 70_001)
    tokens = TokenShards(tmp_path / "out").window(0, 9)
    assert tokens.dtype == np.uint32
    assert tokens[0] == 70_000


def test_of_a_single_document_the_end_is_held_out(tmp_path, tokenizer_folder, tiny_tokenizer):
    (tmp_path / "a.txt").write_text(prose(5000, seed=1))
    prepared = prepare(
        [tmp_path / "a.txt"], tokenizer=tokenizer_folder, out=tmp_path / "out", validation=0.1
    )
    train, held_out = (TokenShards(tmp_path / "out", s) for s in ("train", "validation"))
    joined = [*train.window(0, train.num_tokens), *held_out.window(0, held_out.num_tokens)]
    assert joined == [*tiny_tokenizer.encode(prose(5000, seed=1)).ids, EOS]
    assert held_out.num_tokens == round(0.1 * len(joined))
    assert prepared.summary()["held_out_by"] == "tail"
    assert prepared.manifest.num_documents("validation") == 1


def test_a_complete_folder_is_left_alone(mixed_text, tmp_path, tokenizer_folder):
    def run():
        return prepare([mixed_text], tokenizer=tokenizer_folder, out=tmp_path / "out")

    first = run()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = run()
    assert second.was_complete
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


class TestAnotherJob:
    """A folder is for one job; what differs is said."""

    @pytest.fixture
    def run(self, tmp_path, tokenizer_folder):
        texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for seed, path in enumerate(texts):
            path.write_text(prose(500, seed))

        def run(inputs=texts, **changes):
            options = {"tokenizer": tokenizer_folder, "out": tmp_path / "out", **changes}
            return prepare(inputs, **options)

        run()
        return run

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"validation": 0.5}, "another --validation"),
            ({"text_field": "body"}, "another --text-field"),
            ({"eos_token": "t"}, "another --eos-token"),
        ],
    )
    def test_other_options(self, run, changes, message):
        with pytest.raises(UserError, match=rf"{message}\. Choose another --out, or delete"):
            run(**changes)

    def test_another_tokenizer(self, run, tmp_path, tokenizer_folder):
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(tokenizer_folder)
        other.add_tokens(["zebra"])
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match="another tokenizer"):
            run(tokenizer=tmp_path / "other")

    def test_other_inputs(self, run, tmp_path):
        a, b = tmp_path / "a.txt", tmp_path / "b.txt"
        with pytest.raises(UserError, match=r"without .*/b\.txt"):
            run([a])
        with pytest.raises(UserError, match="another order of the inputs"):
            run([b, a])
        c = tmp_path / "c.txt"
        c.write_text("more")
        with pytest.raises(UserError, match=r"c\.txt was not among the inputs"):
            run([a, b, c])
        a.write_text(a.read_text().replace("a", "e"))
        with pytest.raises(UserError, match=r"a\.txt has been changed since"):
            run()

    def test_a_copy_of_the_tokenizer_is_the_same_job(self, run, tmp_path, tokenizer_folder):
        shutil.copytree(tokenizer_folder, tmp_path / "copy")
        assert run(tokenizer=tmp_path / "copy").was_complete


def test_another_job_may_follow_one_that_came_to_nothing(tmp_path, tokenizer_folder):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not valid JSON"):
        prepare([rows], tokenizer=tokenizer_folder, out=tmp_path / "out")
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert prepare([rows], tokenizer=tokenizer_folder, out=tmp_path / "out").manifest


def test_a_run_that_was_killed_while_it_wrote_its_job(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text(prose(500, seed=0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json.123.tmp").write_text("{")
    prepare([tmp_path / "a.txt"], tokenizer=tokenizer_folder, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_folder_with_other_things_in_it(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds nothing of `mole prepare`"):
        prepare([tmp_path / "a.txt"], tokenizer=tokenizer_folder, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.txt is a file; expected a folder"):
        prepare([tmp_path / "a.txt"], tokenizer=tokenizer_folder, out=tmp_path / "a.txt")


def test_rows_that_were_missing_may_follow(tmp_path, tokenizer_folder):
    rows = tmp_path / "a.jsonl"
    rows.write_text("\n\n")
    with pytest.raises(UserError, match="only empty documents: 0"):
        prepare([rows], tokenizer=tokenizer_folder, out=tmp_path / "out")
    write_rows(rows, ["one", "two"])
    prepared = prepare([rows], tokenizer=tokenizer_folder, out=tmp_path / "out")
    assert prepared.manifest.num_documents("train") == 1


def test_text_without_text(tmp_path, tokenizer_folder):
    rows = write_rows(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(UserError, match="only empty documents: 2"):
        prepare([rows], tokenizer=tokenizer_folder, out=tmp_path / "out")
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match="There is no text to prepare"):
        prepare([tmp_path / "b.txt"], tokenizer=tokenizer_folder, out=tmp_path / "out2")


def stop_before_piece(monkeypatch, number: int) -> None:
    """Let the piece fail, as an interruption there would."""
    write = pieces.write_piece

    def write_or_stop(path, *arguments):
        if path.name.startswith(f"{number:08d}"):
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(pieces, "write_piece", write_or_stop)


class TestResume:
    """An interruption in this process; `test_sigkill_at_any_moment` has real ones."""

    @pytest.fixture
    def run(self, mixed_text, tmp_path, tokenizer_folder, small_pieces):
        def run():
            return prepare(
                [mixed_text], tokenizer=tokenizer_folder, out=tmp_path / "out", num_workers=1
            )

        return run

    def interrupt(self, run, number: int = 3) -> None:
        with pytest.MonkeyPatch.context() as patch:
            stop_before_piece(patch, number)
            with pytest.raises(KeyboardInterrupt):
                run()

    def test_finished_pieces_are_used_again(self, run, tmp_path, monkeypatch):
        self.interrupt(run)
        finished = sorted((tmp_path / "out" / "pieces").glob("*.safetensors"))
        assert len(finished) >= 3
        written = []
        write = pieces.write_piece
        monkeypatch.setattr(
            pieces, "write_piece", lambda path, *rest: (written.append(path), write(path, *rest))
        )
        run()
        assert written
        assert not set(written) & set(finished)

    def test_text_that_changed_unnoticed_is_found(self, run, tmp_path):
        self.interrupt(run)
        folder = tmp_path / "out" / "pieces"
        shutil.copy(folder / "00000001.safetensors", folder / "00000000.safetensors")
        with pytest.raises(UserError, match=r"The text has changed since .*/out was begun"):
            run()

    def test_a_damaged_piece_is_told(self, run, tmp_path):
        self.interrupt(run)
        piece = tmp_path / "out" / "pieces" / "00000001.safetensors"
        piece.write_bytes(piece.read_bytes()[:-5])
        with pytest.raises(UserError, match=r"00000001\.safetensors is damaged.*Delete this file"):
            run()
        piece.unlink()
        run()


def test_two_at_once_are_refused(mixed_text, tmp_path, tokenizer_folder):
    with (
        prepare_module.locked(tmp_path / "out", "preparing text"),
        pytest.raises(UserError, match="Another process is preparing text"),
    ):
        prepare([mixed_text], tokenizer=tokenizer_folder, out=tmp_path / "out")


def test_a_killed_worker_is_told(mixed_text, tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(pieces, "write_piece", kill_this_process)
    with pytest.raises(UserError, match=r"memory ran out.*--workers 1"):
        prepare([mixed_text], tokenizer=tokenizer_folder, out=tmp_path / "out", num_workers=2)


def kill_this_process(*_arguments) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_sigkill_at_any_moment(tmp_path, tokenizer_folder, small_pieces):
    """Real processes with real workers, killed at random; the last one is let finish."""
    text = write_rows(tmp_path / "a.jsonl", [prose(1000, seed) for seed in range(150)])
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    prepare([text], tokenizer=tokenizer_folder, out=expected, num_workers=1)
    done = subprocess.run(
        [sys.executable, TESTS / "kill_prepare.py", text, tokenizer_folder, killed],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["unfinished"] >= 4
    assert report["workers"] >= 2
    assert report["workers_left"] == []
    assert bytes_of(killed) == bytes_of(expected)


def test_too_little_space_is_told_before(tmp_path, tokenizer_folder, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(10_000, seed=0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage._replace(free=9000))
    with pytest.raises(DiskFullError, match=r"About 10 kB are needed in .*, 9 kB are free"):
        prepare([tmp_path / "a.txt"], tokenizer=tokenizer_folder, out=tmp_path / "out")


def test_a_disk_that_fills_up(mixed_text, tmp_path, tokenizer_folder, small_pieces):
    """On a real file system that is too small at first; mounting it needs a user namespace."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = [sys.executable, TESTS / "fill_disk.py", mixed_text, tokenizer_folder, disk]
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], check=False).returncode
    ):
        pytest.skip(
            "user namespaces are not permitted here, so no small file system can be mounted"
        )
    done = subprocess.run(
        [*namespace, *script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "is full. What is finished is kept" in report["while_writing"]
    assert report["pieces_kept"] > 0
    expected = prepare([mixed_text], tokenizer=tokenizer_folder, out=tmp_path / "expected")
    assert report["manifest"] == (expected.folder / "manifest.json").read_text()


def test_hub_data_sets(tmp_path, tokenizer_folder, tiny_tokenizer):
    """The real client, and a hub on this machine that has one data set."""
    names = ["owner/tiny", "owner/tiny:other", "owner/tiny:absent", "owner/absent"]
    with serve_hub() as environment:
        done = subprocess.run(
            [sys.executable, TESTS / "prepare_from_hub.py", tokenizer_folder, tmp_path, *names],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**environment, "HF_HOME": str(tmp_path / "cache")},
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name, rows in (("owner/tiny", ROWS), ("owner/tiny:other", OTHER_ROWS)):
        opened = TokenShards(report[name])
        expected = [i for text in rows for i in [*tiny_tokenizer.encode(text).ids, EOS]]
        assert opened.window(0, opened.num_tokens).tolist() == expected
        assert opened.manifest.inputs == [{"name": name, "revision": REVISION}]
    assert "tiny:absent can't be read: BuilderConfig 'absent' not" in report["owner/tiny:absent"]
    assert "owner/absent is no file or folder here, and no data set" in report["owner/absent"]
