"""What comes along when a table is made or made anew: tokenizers, templates, links, modes."""

import ast
import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import logits_of, token_ids
from transformers import AutoTokenizer

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.tokenizer import copy_tokenizer
from lookup_experts.generation.inspection import inspect_folder, verify_folder
from lookup_experts.generation.reencoding import reencode
from lookup_experts.table.opening import open_table

IDS = token_ids(2, 12)
MAKERS = {"reparameterize": le.reparameterize, "reencode": reencode}
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture(params=MAKERS)
def made_from(request, training_folder, table_folder, tmp_path):
    """(what makes a table, a folder of one's own that it can be made from)"""
    source = tmp_path / "source"
    is_folded = request.param == "reencode"
    shutil.copytree(table_folder if is_folded else training_folder, source)
    return MAKERS[request.param], source


# ---------------------------------------------------------------------- tokenizers and processors


def test_every_template_comes_along(made_from, tokenizer, tmp_path):
    make, source = made_from
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    talking = AutoTokenizer.from_pretrained(source)
    talking.chat_template = templates
    talking.save_pretrained(source)
    assert sorted(path.name for path in (source / "additional_chat_templates").iterdir()) == [
        "rag.jinja",
        "tool_use.jinja",
    ]
    make(source, tmp_path / "out", encoding="nf4")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


def test_every_vocabulary_that_transformers_knows_comes_along(tmp_path):
    """By the names in the sources of its tokenizers; some can't be imported here."""
    names = {"special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"}
    names |= {"processor_config.json", "preprocessor_config.json"}
    names |= {"video_preprocessor_config.json", "audio_tokenizer_config.json"}
    names |= {"chat_template.json", "chat_template.jinja"}
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "VOCAB_FILES_NAMES":
                files = [ast.unparse(value) for value in node.value.values]
                names |= {ast.literal_eval(file) for file in files if file[0] == "'"}
    assert {"vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"} <= names
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "source" / name).write_text(name)
    copy_tokenizer(tmp_path / "source", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_second_tokenizer_of_a_processor_comes_along(training_folder, tokenizer, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(training_folder, source)
    tokenizer.save_pretrained(source / "qformer_tokenizer")
    (source / "processor_config.json").write_text("{}")
    le.reparameterize(source, tmp_path / "out")
    assert (tmp_path / "out" / "processor_config.json").read_text() == "{}"
    inner = AutoTokenizer.from_pretrained(tmp_path / "out" / "qformer_tokenizer")
    assert inner.get_vocab() == tokenizer.get_vocab()


def test_stray_folders_and_other_files_stay_where_they_are(training_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(training_folder, source)
    for name in ("tokenizer_old", "vocab.backup", "chat_template_drafts", "checkpoint-5"):
        (source / name).mkdir()
        (source / name / "tokenizer_config.json").write_text("{}")
    (source / "optimizer.pt").write_text("large")
    le.reparameterize(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "table",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_stray_folders_in_a_table_are_passed_over(table_folder, tmp_path):
    shutil.copytree(table_folder, tmp_path / "source")
    (tmp_path / "source" / "table" / "notes").mkdir()
    reencode(tmp_path / "source", tmp_path / "out", encoding="nf4")
    le.load(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "table" / "notes").exists()
    assert verify_folder(tmp_path / "saved").report.intact


# ------------------------------------------------------------------------- folders of other people

_INTERRUPT_AND_GO_ON = """
import sys
from pathlib import Path
import lookup_experts as le
from lookup_experts.generation.reencoding import reencode

source, out = map(Path, sys.argv[2:])
make = le.reparameterize if sys.argv[1] == "reparameterize" else reencode
try:
    (source / "config.json").write_text("{}")
    raise SystemExit("a file that is read-only was written")
except PermissionError:
    pass

def stop(done, total):
    raise KeyboardInterrupt

try:
    make(source, out, encoding="nf4", progress=stop)
    raise SystemExit("was not interrupted")
except KeyboardInterrupt:
    pass
make(source, out, encoding="nf4")
model = le.load(out)
model.save_pretrained(out)
"""


def _obey_modes() -> None:
    """The superuser may write to what is read-only; not so after this, where it is one."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_run_from_a_read_only_folder_goes_on(made_from, tmp_path):
    make, source = made_from
    talking = AutoTokenizer.from_pretrained(source)
    talking.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    talking.save_pretrained(source)
    for path in [*source.rglob("*"), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _INTERRUPT_AND_GO_ON, make.__name__, source, tmp_path / "out"],
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=_obey_modes,
            check=False,
        )
    finally:
        for path in [source, *source.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    assert not verify_folder(tmp_path / "out").problems
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & stat.S_IWUSR, path
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_modes_that_the_user_wants(umask, made_from, tmp_path):
    make, source = made_from
    talking = AutoTokenizer.from_pretrained(source)
    talking.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    talking.save_pretrained(source)
    before = os.umask(umask)
    try:
        for path in source.glob("*.safetensors"):
            path.chmod(0o666 & ~umask)  # is linked, where the table is made of another
        make(source, tmp_path / "out", encoding="nf4")
        le.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    finally:
        os.umask(before)
    for folder in ("out", "again"):
        for path in [tmp_path / folder, *(tmp_path / folder).rglob("*")]:
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


# ------------------------------------------------------------------------------------------ links


@pytest.fixture
def linked_folder(table_folder, tmp_path):
    """An inference folder whose table lies on another disk."""
    shutil.copytree(table_folder, tmp_path / "linked")
    (tmp_path / "linked" / "table").rename(tmp_path / "elsewhere")
    (tmp_path / "linked" / "table").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "linked"


def _bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_table_that_is_a_link_is_read(linked_folder, table_folder, tmp_path):
    assert not verify_folder(linked_folder).problems
    assert inspect_folder(linked_folder)["table"] == inspect_folder(table_folder)["table"]
    expected = logits_of(le.load(table_folder), IDS)
    for store in ("direct", "mmap", "memory"):
        assert torch.equal(logits_of(le.load(linked_folder, store=store), IDS), expected)
    made = reencode(linked_folder, tmp_path / "made", encoding="nf4")
    assert not (tmp_path / "made" / "table").is_symlink()
    assert made == open_table(tmp_path / "made" / "table")
    with pytest.raises(UserError, match=r"elsewhere/out lies in .*table, which is read"):
        reencode(linked_folder, tmp_path / "elsewhere" / "out", encoding="nf4")


def test_saving_over_a_table_that_is_a_link_leaves_what_it_leads_to(
    linked_folder, table_folder, tmp_path
):
    before = _bytes_of(tmp_path / "elsewhere")
    model = le.load(linked_folder)
    model.save_pretrained(linked_folder)  # it is its own
    assert (linked_folder / "table").is_symlink()
    reencode(table_folder, tmp_path / "half", encoding="float16")
    half = le.load(tmp_path / "half")
    half.save_pretrained(linked_folder)
    assert not (linked_folder / "table").is_symlink()
    assert _bytes_of(tmp_path / "elsewhere") == before
    assert torch.equal(logits_of(le.load(linked_folder), IDS), logits_of(half, IDS))


def test_a_link_that_leads_nowhere_is_told_of(linked_folder, table_folder, tmp_path):
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    for read in (verify_folder, inspect_folder, le.load):
        with pytest.raises(UserError, match=r"linked/table"):
            read(linked_folder)
    with pytest.raises(UserError, match=r"linked/table"):
        reencode(linked_folder, tmp_path / "out", encoding="nf4")
    assert not list(tmp_path.glob("out*"))
    before = sorted(linked_folder.rglob("*"))
    with pytest.raises(UserError, match=r"linked/table is where the table belongs"):
        le.load(table_folder).save_pretrained(linked_folder)
    assert sorted(linked_folder.rglob("*")) == before


def test_a_table_can_be_made_through_a_link(made_from, tmp_path):
    make, source = made_from
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "table").symlink_to(tmp_path / "disk")
    make(source, tmp_path / "out", encoding="nf4")
    assert (tmp_path / "out" / "table").is_symlink()
    assert (tmp_path / "disk" / "table.json").exists()
    assert not verify_folder(tmp_path / "out").problems


@pytest.mark.parametrize("name", ["out", "out.partial", "out.partial/table"])
def test_links_that_lead_nowhere_are_refused_before_anything_is_written(name, made_from, tmp_path):
    make, source = made_from
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"out\S* (exists already|is a link)"):
        make(source, tmp_path / "out", encoding="nf4")
    assert sorted(tmp_path.rglob("*")) == there


def test_a_linked_folder_stays_a_link(table_folder, tmp_path):
    shutil.copytree(table_folder, tmp_path / "source")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "source" / "additional_chat_templates").symlink_to("../templates")
    reencode(tmp_path / "source", tmp_path / "deeper" / "out", encoding="nf4")
    found = AutoTokenizer.from_pretrained(tmp_path / "deeper" / "out").chat_template
    assert found == {"tool_use": "{{ tools }}"}


# -------------------------------------------------------------------------------------- bad input


def test_what_is_in_the_way_is_not_touched(made_from, tmp_path):
    make, source = made_from
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial is in the way"):
        make(source, tmp_path / "out", encoding="nf4")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["mine.txt"]


def test_of_an_interrupted_run_from_another_folder_nothing_stays(made_from, tmp_path):
    make, source = made_from
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "chat_template.jinja").write_text("{{ messages }}")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(other, tmp_path / "out", encoding="nf4", progress=stop)
    make(source, tmp_path / "out", encoding="nf4")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_generation_configuration_that_cannot_be_saved_is_refused_first(
    training_folder, tmp_path
):
    model = le.load(training_folder)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    with pytest.raises(UserError, match=r"generation_config can't be saved.*temperature"):
        le.reparameterize(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model.generation_config.do_sample = True
    le.reparameterize(model, tmp_path / "out")
    assert le.load(tmp_path / "out").generation_config.temperature == 0.5


def test_what_cannot_be_saved_is_known_before_the_table_is_built(
    training_folder, tmp_path, monkeypatch
):
    from transformers import PreTrainedModel

    def broken(*arguments, **options):
        raise RuntimeError("can't be saved")

    built = []
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="can't be saved"):
        le.reparameterize(
            training_folder, tmp_path / "out", progress=lambda *done: built.append(done)
        )
    assert not built
