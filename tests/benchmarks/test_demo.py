"""The demo in miniature: every stage for real, but with models that train in a second."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_texts import prose

from lookup_experts import cli
from lookup_experts.benchmarks.demo import measure, stages
from lookup_experts.benchmarks.demo.journal import JOURNAL_NAME, Journal, Stage
from lookup_experts.benchmarks.demo.measure import measure_memory, require_same_tokens
from lookup_experts.benchmarks.demo.report import (
    SYSTEMS,
    format_count,
    header,
    remarks,
    rows,
    shorten,
    show_report,
    show_sample,
)
from lookup_experts.benchmarks.demo.stages import FULL, QUICK, Sizes, run_demo
from lookup_experts.benchmarks.text import own_text, read_corpus, standard_library, write_corpus
from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.generation.inspection import verify_folder
from lookup_experts.generation.text import Generation
from lookup_experts.training.files import locked

TINY = Sizes(
    text_bytes=60_000,
    min_text_bytes=10_000,
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    context_length=32,
    sequences_per_step=2,
    steps=4,
    learning_rate=1e-2,
    validate_sequences=4,
    validations=2,
    prompts=2,
    prompt_tokens=8,
    new_tokens=6,
)
ONLY_NEW_TOKENS = replace(TINY, new_tokens=7)
MEMORY = {"process_bytes": 400_000_000, "model_bytes": 20_000_000}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder of prose."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(prose(4000, seed=number))
    return folder


@pytest.fixture(scope="module")
def memory_not_measured() -> Iterator[None]:
    """Four fresh processes take long; `test_memory_...` starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_memory", lambda demo, system: dict(MEMORY))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts, memory_not_measured) -> Path:
    """A finished demo. Don't change it."""
    out = tmp_path_factory.mktemp("finished") / "demo"
    run_demo(own_text([texts], out), TINY, out, "mole demo")
    return out


@pytest.fixture
def demo(tmp_path, finished, memory_not_measured) -> Path:
    """A finished demo to change."""
    return Path(shutil.copytree(finished, tmp_path / "demo", copy_function=shutil.copy2))


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def modified(out: Path, *names: str) -> list[int]:
    return [(out / name).stat().st_mtime_ns for name in names]


# ------------------------------------------------------------------------------ what comes out


def test_the_report_has_every_figure(finished):
    report = report_of(finished)
    dense, experts, in_memory, on_disk = (report["systems"][s.name] for s in SYSTEMS)
    assert report["training"]["dense"]["tokens"] == report["training"]["mole"]["tokens"] == 256
    assert dense["validation_loss"] == report["training"]["dense"]["validation_loss"]
    assert experts["validation_loss"] == on_disk["validation_loss"] != dense["validation_loss"]
    table = 320 * 2 * 4 * 32
    assert on_disk["disk_parameters"] == table
    assert on_disk["loaded_parameters_per_token"] == 2 * 4 * 32
    # The routers are all that MoLE keeps in memory beyond the dense model.
    assert on_disk["resident_parameters"] == dense["resident_parameters"] + 2 * 4 * 32
    assert in_memory["resident_parameters"] == on_disk["resident_parameters"] + table
    assert experts["resident_parameters"] > on_disk["resident_parameters"]
    for system in (dense, experts, in_memory, on_disk):
        assert system["ms_per_token"] > 0
        assert system["steps"] == 2 * (32 - 16 - 8)
        assert system["ratio_spread"][0] <= system["ratio_to_dense"] <= system["ratio_spread"][1]
    assert dense["ratio_to_dense"] == 1
    assert on_disk["bytes_per_record"] >= 2 * 4 * 32 * 4
    assert report["page_cache_bypassed"] == ("page cache" not in on_disk["backend"])
    assert report["machine"]["cores"] >= 1
    assert report["command"] == "mole demo"
    assert set(report["seconds"]) >= {"dense", "mole", "decoding", "memory"}


def test_validation_curves_begin_with_the_first_validation(finished):
    for training in report_of(finished)["training"].values():
        assert [point["tokens"] for point in training["validation_curve"]] == [128, 256]
        assert training["validation_curve"][-1]["validation_loss"] == training["validation_loss"]


def test_experts_and_table_gave_the_same_tokens(finished):
    agreement = report_of(finished)["agreement"]
    assert 2 <= agreement["num_tokens"] <= 12
    assert agreement["num_prompts"] == 2
    assert agreement["experts_text"] == agreement["table_text"]


def test_the_table_is_intact_and_exact(finished):
    assert verify_folder(finished / "mole-table").problems == ()
    assert report_of(finished)["table"]["record_bytes"] == 2 * 4 * 32 * 4


def test_the_report_can_be_read(finished):
    text = (finished / "report.md").read_text()
    report = report_of(finished)
    for row in rows(report):
        assert f"| {' | '.join(row)} |" in text
    for remark in remarks(report):
        assert remark in text
    assert report["machine"]["cpu"] in text
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_shows_the_sample_the_table_and_where_the_report_is(
    finished, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    report = report_of(finished)
    show_sample(report["agreement"])
    show_report(report)
    out, err = capsys.readouterr()
    assert "trained experts" in err
    assert "table on disk" in err
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for row in rows(report):  # each on a line of its own, nothing cut
        assert any(all(cell in line for cell in row) for line in lines)


# ----------------------------------------------------------------- going on, and doing it again


def words(said: str) -> str:
    """What was said, wherever its lines were broken."""
    return " ".join(said.split())


def test_a_finished_demo_is_shown_again_at_once(demo, texts, run_python):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    code = f"""
import sys
from lookup_experts.benchmarks.demo.stages import Sizes, run_demo
from lookup_experts.benchmarks.text import own_text
from pathlib import Path
texts, out = Path(sys.argv[1]), Path(sys.argv[2])
report = run_demo(own_text([texts], out), {TINY!r}, out, "again")
assert report["command"] == "mole demo"
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    exit_code, _, err = run_python(code, texts, demo)
    assert exit_code == 0, err
    assert words(err).count("finished earlier") == 11
    assert before == {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}


def test_only_what_depends_on_a_changed_option_is_done_again(demo, texts, capsys):
    kept = ("corpus.jsonl", "dense/summary.json", "mole/summary.json", "mole-table/table")
    before = modified(demo, *kept)
    run_demo(own_text([texts], demo), ONLY_NEW_TOKENS, demo, "mole demo")
    assert modified(demo, *kept) == before
    assert report_of(demo)["agreement"]["num_tokens"] > 12
    err = words(capsys.readouterr().err)
    assert err.count("finished earlier") == 9  # all but agreement, report


def test_changed_text_changes_everything(demo, texts, tmp_path):
    before = report_of(demo)
    more = tmp_path / "more.txt"
    more.write_text(prose(9000, seed=99))
    report = run_demo(own_text([texts, more], demo), TINY, demo, "mole demo")
    assert report["text"]["num_documents"] == 13
    for name in ("dense", "mole"):
        assert report["training"][name]["validation_loss"] != pytest.approx(
            before["training"][name]["validation_loss"], abs=1e-9
        )
    assert verify_folder(demo / "mole-table").problems == ()


def test_what_was_deleted_is_made_again(demo, texts):
    shutil.rmtree(demo / "mole-table")
    (demo / "report.md").unlink()
    run_demo(own_text([texts], demo), TINY, demo, "mole demo")
    assert verify_folder(demo / "mole-table").problems == ()
    assert (demo / "report.md").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from lookup_experts.benchmarks.demo.stages import Sizes, run_demo
from lookup_experts.benchmarks.text import own_text
from lookup_experts.training import trainer

publish = trainer.publish_checkpoint
def publish_then_die(folder, step, keep):
    publish(folder, step, keep)
    if folder.parent.name == "mole":
        os.kill(os.getpid(), signal.SIGKILL)
trainer.publish_checkpoint = publish_then_die
texts, out = Path(sys.argv[1]), Path(sys.argv[2])
run_demo(own_text([texts], out), {sizes!r}, out, "mole demo")
"""


def test_a_demo_that_was_killed_while_training_goes_on(
    tmp_path, texts, run_python, finished, memory_not_measured, capsys
):
    out = tmp_path / "demo"
    exit_code, _, err = run_python(KILLED.format(sizes=TINY), texts, out)
    assert exit_code == -9, err
    assert (out / "mole" / "checkpoints" / "checkpoint-2").is_dir()
    dense = modified(out, "dense/summary.json")
    (out / "stages.json.1.tmp").write_text("half of a j")
    run_demo(own_text([texts], out), TINY, out, "mole demo")
    err = capsys.readouterr().err
    assert "Going on after step 2." in err
    assert words(err).count("finished earlier") == 4
    assert modified(out, "dense/summary.json") == dense
    assert not list(out.glob("*.tmp"))
    once = report_of(finished)["training"]
    assert report_of(out)["training"]["mole"]["validation_loss"] == pytest.approx(
        once["mole"]["validation_loss"]
    )


def test_a_table_that_was_finished_just_before_a_kill_is_taken(demo, texts):
    journal = json.loads((demo / JOURNAL_NAME).read_text())
    journal["table"]["result"] = None
    (demo / JOURNAL_NAME).write_text(json.dumps(journal))
    before = modified(demo, "mole-table/table/table.json")
    run_demo(own_text([texts], demo), TINY, demo, "mole demo")
    assert modified(demo, "mole-table/table/table.json") == before


# ------------------------------------------------------------------------------------- journal


def stage(inputs: object, name: str = "one", needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, "", lambda _: {}, str, inputs=inputs, needs=needs, outputs=(f"{name}.txt",))


def test_a_stage_is_finished_only_with_its_output_and_the_same_inputs(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(stage(1))
    assert Journal(tmp_path).result(stage(1)) is None
    (tmp_path / "one.txt").write_text("made from 1")
    journal.finish(stage(1), {"value": 1})
    assert Journal(tmp_path).result(stage(1)) == {"value": 1}
    assert Journal(tmp_path).result(stage(2)) is None
    (tmp_path / "one.txt").unlink()
    assert Journal(tmp_path).result(stage(1)) is None


def test_what_was_begun_from_other_inputs_is_removed_and_the_rest_is_kept(tmp_path):
    journal = Journal(tmp_path)
    journal.begin(stage(1))
    (tmp_path / "one.txt").write_text("half")
    journal.begin(stage(1))
    assert (tmp_path / "one.txt").exists()
    journal.begin(stage(2))
    assert not (tmp_path / "one.txt").exists()


def test_a_stage_depends_on_those_before_it(tmp_path):
    journal = Journal(tmp_path)
    second = stage(0, "two", needs=("one",))
    for each in (stage(1), second):
        journal.begin(each)
        (tmp_path / f"{each.name}.txt").write_text("")
        journal.finish(each, {})
    assert journal.result(second) == {}
    journal.begin(stage(2))
    assert journal.result(second) is None


# ------------------------------------------------------------------------------- command line


def start_cli(monkeypatch, *arguments: object) -> int:
    """The exit code of `mole demo`, with the tiny sizes for the quick ones."""
    monkeypatch.setattr(stages, "QUICK", TINY)
    monkeypatch.setattr("sys.argv", ["mole", "demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def run_cli(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of `mole demo`."""
    code = start_cli(monkeypatch, *arguments)
    return code, capsys.readouterr().err


def test_json_is_all_that_stdout_gets(demo, texts, monkeypatch, capsys):
    assert start_cli(monkeypatch, "--quick", "--data", texts, "--out", demo, "--json") == 0
    assert json.loads(capsys.readouterr().out) == report_of(demo)


def test_the_end_says_what_to_try_next(demo, texts, monkeypatch, capsys):
    assert start_cli(monkeypatch, "--quick", "--data", texts, "--out", demo) == 0
    out, err = capsys.readouterr()
    assert "Validation loss" in out
    last = err.splitlines()[-3:]
    for line, command in zip(last, ("generate", "inspect", "verify"), strict=True):
        assert f"{command} {demo}/mole-table" in line


def test_ctrl_c_says_how_to_go_on(tmp_path, texts, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run_demo", interrupted)
    code, err = run_cli(monkeypatch, capsys, "--data", texts, "--out", tmp_path / "demo")
    assert (code, err) == (130, "Interrupted. Run the same command again to go on.\n")


# ----------------------------------------------------------------------------------- bad input


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


def test_no_such_file(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "missing.txt"
    code, err = run_cli(monkeypatch, capsys, "--data", missing, "--out", tmp_path / "demo")
    assert code == 2
    assert err == f"mole: --data {missing} not found: there is no such file or folder.\n"
    assert not (tmp_path / "demo").exists()


def test_text_that_is_too_short(monkeypatch, capsys, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("short")
    code, err = run_cli(monkeypatch, capsys, "--data", text, "--out", tmp_path / "demo")
    assert code == 2
    assert "too short" in last_line(err)
    assert "5 B" in last_line(err)
    # Another text may take its place in the same folder.
    assert Journal(tmp_path / "demo").result(stage(1)) is None


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="unknown file type"):
        own_text([tmp_path / "image.png"], tmp_path / "demo")


def test_a_folder_with_something_else_is_left_alone(monkeypatch, capsys, tmp_path, texts):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, err = run_cli(monkeypatch, capsys, "--data", texts, "--out", tmp_path)
    assert code == 2
    assert last_line(err).startswith(f"mole: {tmp_path} is not empty and holds no demo")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_out_that_is_a_file(monkeypatch, capsys, tmp_path, texts):
    (tmp_path / "file").write_text("")
    code, err = run_cli(monkeypatch, capsys, "--data", texts, "--out", tmp_path / "file")
    assert (code, "is a file; expected a folder" in err) == (2, True)


def test_a_damaged_journal(tmp_path):
    for content in ("{", "[]", '{"text": {"unknown": 1}}'):
        (tmp_path / JOURNAL_NAME).write_text(content)
        with pytest.raises(UserError, match="can't be read"):
            Journal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cant_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't be written to"):
        Journal(tmp_path)


def test_two_demos_in_one_folder(tmp_path, texts):
    with (
        locked(tmp_path / "demo", "running a demo"),
        pytest.raises(UserError, match="Another process is running a demo"),
    ):
        run_demo(own_text([texts], tmp_path / "demo"), TINY, tmp_path / "demo", "")


def test_too_little_space_is_told_before_anything_is_done(tmp_path, texts, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"needs about .* are free"):
        run_demo(own_text([texts], tmp_path / "demo"), TINY, tmp_path / "demo", "")
    assert not (tmp_path / "demo" / "corpus.jsonl").exists()


def test_a_disk_that_fills_up_on_the_way(tmp_path, texts, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stages, "write_corpus", no_space)
    with pytest.raises(DiskFullError, match="What is finished is kept"):
        run_demo(own_text([texts], tmp_path / "demo"), TINY, tmp_path / "demo", "")


def test_a_missing_package_is_told_before_anything_is_done(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lookup-experts\[train,plot\]'"):
        run_demo(own_text([texts], tmp_path / "demo"), TINY, tmp_path / "demo", "")
    assert not (tmp_path / "demo").exists()


def test_too_little_to_hold_out(tmp_path):
    """The shortest document is held out where the others are too long for it."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(prose(20_000, seed=number))
    (tmp_path / "3.txt").write_text("A line.")
    text = own_text([tmp_path / f"{number}.txt" for number in range(4)], tmp_path / "demo")
    with pytest.raises(UserError, match="could be held out"):
        run_demo(text, replace(TINY, text_bytes=10**6), tmp_path / "demo", "")


def generation(*token_ids: int) -> Generation:
    return Generation(list(token_ids), None, "length", 1, 0.0, 0.0, None, "")


def test_tokens_that_differ_are_an_error():
    require_same_tokens(generation(1, 2), generation(1, 2))
    with pytest.raises(TableError, match="from token 2 of 3 on"):
        require_same_tokens(generation(1, 2, 3), generation(1, 5, 3))
    with pytest.raises(TableError, match="from token 3 of 3 on"):
        require_same_tokens(generation(1, 2, 3), generation(1, 2))


# --------------------------------------------------------------------------------- text, memory


def test_the_standard_library_is_found_without_tests_in_the_same_order():
    text = standard_library()
    assert text == standard_library()
    names = [file.name for file in text.files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if "/test/" in name or "/site-packages/" in name]
    assert sum(file.num_bytes for file in text.files) > 2 * FULL.min_text_bytes


def test_a_library_without_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="mole demo --data"):
        standard_library()


def test_files_of_the_library_that_are_no_utf8_are_left_out(monkeypatch, tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "utf8.py").write_text("# café")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test.py").write_text("")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [file.path.name for file in standard_library().files] == ["utf8.py"]


def test_the_corpus_ends_where_there_is_enough(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("ä" * 10)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "more than enough"}\n')
    (tmp_path / "d.txt").write_text("never read")
    text = own_text([tmp_path], tmp_path.parent / "demo")
    target = tmp_path.parent / "corpus.jsonl"
    made = write_corpus(text, target, max_bytes=27, min_bytes=1)
    assert list(read_corpus(target)) == ["ä" * 10, "one", "more"]
    assert made == {"source": str(tmp_path), "num_bytes": 27, "num_documents": 3}


def test_a_long_file_is_cut(tmp_path):
    (tmp_path / "long.txt").write_text("äb" * 2**20)
    text = own_text([tmp_path / "long.txt"], tmp_path / "demo")
    write_corpus(text, tmp_path / "corpus.jsonl", max_bytes=4, min_bytes=1)
    assert list(read_corpus(tmp_path / "corpus.jsonl")) == ["äb"]  # half an ä is none


def test_memory_is_that_of_a_process_of_its_own(finished):
    measured = measure_memory(finished, SYSTEMS[3])
    assert 100e6 < measured["process_bytes"] < 2e9  # Python and PyTorch
    assert abs(measured["model_bytes"]) < 30e6  # a model of next to nothing


# -------------------------------------------------------------------------------------- in words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (999, "999"), (18432, "18.4 k"), (11_534_336, "11.5 M"), (4.71e9, "4.71 G")],
)
def test_counts_in_words(number, words):
    assert format_count(number) == words


def test_a_sample_is_never_invisible_and_never_endless():
    assert shorten("a\nb\n\n") == "a\nb"
    assert shorten("\n\n") == r"'\n\n'"
    assert shorten("x\n" * 50).splitlines() == ["x"] * 12 + ["…"]


def test_a_model_that_is_worse_is_said_to_be(finished):
    report = report_of(finished)
    for name, loss in (("dense", 4.0), ("mole", 4.25)):
        report["training"][name]["validation_loss"] = loss
    report["page_cache_bypassed"] = False
    on_loss, on_speed, *_ = remarks(report)
    assert "0.250 higher" in on_loss
    assert "no direct reads (O_DIRECT)" in on_speed


def test_every_row_has_a_cell_for_each_system(finished):
    assert {len(row) for row in rows(report_of(finished))} == {len(header())}


def test_the_demo_fits_a_small_disk():
    assert QUICK.disk_bytes() < FULL.disk_bytes() < 2e9
