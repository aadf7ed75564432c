"""Backbones with code of their own: carried along, and never run without being allowed to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_code_model import FILES, TOKENIZER_FILE, write_own_code_model
from run_command import run_command
from tiny_models import greedy, logits_of, randomize_experts, tiny_model, token_ids
from tiny_runs import CONTEXT, make_data
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    dynamic_module_utils,
)

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation.inspection import verify_folder
from lookup_experts.generation.reencoding import reencode

IDS = token_ids(2, 9)
ASKED = r"code of its own, which isn't run unasked: .* trust_remote_code=True"


@pytest.fixture(autouse=True)
def ran(monkeypatch, tmp_path) -> Path:
    """A file with a line for each module of a folder that was run, in this process or another.

    Modules are copied to a place of this test's; they have the name of a folder in theirs, so those
    of another test are others.
    """
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("OWN_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "ran").touch()
    return tmp_path / "ran"


@pytest.fixture
def plain(tmp_path, tokenizer) -> Path:
    """A model with code of its own, and a tokenizer with some."""
    write_own_code_model(tmp_path / "pocket", tokenizer)
    return tmp_path / "pocket"


def _attached(plain: Path, **settings):
    model = AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True)
    le.attach(model, 3, expert_size=8, init="normal", **settings)
    randomize_experts(model)
    return model.eval()


def _python_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


_LOGITS_ELSEWHERE = """
import sys
import torch
import lookup_experts as le
from tiny_models import logits_of, token_ids
from transformers import AutoModelForCausalLM

for load in (le.load, AutoModelForCausalLM.from_pretrained):
    model = load(sys.argv[1], trust_remote_code=True)
    print(type(model).__name__)
    torch.save(logits_of(model.eval(), token_ids(2, 9)), f"{sys.argv[2]}.{load.__module__}")
"""


def _logits_in_new_process(run_python, folder: Path, tmp_path: Path) -> list[torch.Tensor]:
    """Of `le.load` and of transformers."""
    code, out, err = run_python(_LOGITS_ELSEWHERE, folder, tmp_path / "logits", timeout=120)
    assert code == 0, err
    assert out.split() == ["LookupExpertsPocketForCausalLM"] * 2
    return [torch.load(path) for path in tmp_path.glob("logits.*")]


# ------------------------------------------------------------------------------------ round trips


def test_saved_code_comes_along_and_is_all_that_is_needed(plain, run_python, tmp_path):
    model = _attached(plain)
    model.save_pretrained(tmp_path / "saved")
    assert _python_files(tmp_path / "saved") == set(FILES)
    shutil.rmtree(plain)
    shutil.rmtree(tmp_path / "modules")
    (tmp_path / "saved").rename(tmp_path / "moved")
    for found in _logits_in_new_process(run_python, tmp_path / "moved", tmp_path):
        assert torch.equal(found, logits_of(model, IDS))


def test_what_was_loaded_can_be_saved_again(plain, tmp_path):
    model = _attached(plain)
    model.save_pretrained(tmp_path / "first")
    loaded = le.load(tmp_path / "first", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "second")
    assert _python_files(tmp_path / "second") == set(FILES)
    configurations = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")
    ]
    assert configurations[0] == configurations[1]
    loaded.save_pretrained(tmp_path / "second")  # over itself
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert again.config.sharpness == 1.5
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))


def test_a_checkpoint_of_the_trainer(plain, run_python, tmp_path):
    model = _attached(plain)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=4, save_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 6)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert _python_files(checkpoint) == set(FILES)
    for found in _logits_in_new_process(run_python, checkpoint, tmp_path):
        torch.testing.assert_close(found, logits_of(model.eval(), IDS))
    resumed = _attached(plain)
    Trainer(resumed, arguments, train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    torch.testing.assert_close(logits_of(resumed.eval(), IDS), logits_of(model, IDS))


@pytest.mark.parametrize("from_folder", [True, False])
def test_folded(from_folder, plain, tokenizer, run_python, tmp_path):
    model = _attached(plain)
    if from_folder:
        model.save_pretrained(tmp_path / "saved")
        load_tokenizer(plain, trust_remote_code=True).save_pretrained(tmp_path / "saved")
        le.reparameterize(
            tmp_path / "saved", tmp_path / "out", encoding="float32", trust_remote_code=True
        )
        assert _python_files(tmp_path / "out") == {*FILES, TOKENIZER_FILE}
        found = load_tokenizer(tmp_path / "out", trust_remote_code=True)
        assert type(found).__name__ == "PocketTokenizer"
        assert found("the fox").input_ids == tokenizer("the fox").input_ids
    else:
        le.reparameterize(model, tmp_path / "out", encoding="float32")
        assert _python_files(tmp_path / "out") == set(FILES)
    for found in _logits_in_new_process(run_python, tmp_path / "out", tmp_path):
        torch.testing.assert_close(found, logits_of(model, IDS), rtol=1e-5, atol=1e-5)
    folded = le.load(tmp_path / "out", store="direct", trust_remote_code=True)
    assert torch.equal(greedy(folded, IDS, 5), greedy(model, IDS, 5))
    assert not verify_folder(tmp_path / "out", trust_remote_code=True).problems
    reencode(tmp_path / "out", tmp_path / "smaller", encoding="nf4")
    assert _python_files(tmp_path / "smaller") == _python_files(tmp_path / "out")
    le.load(tmp_path / "smaller", trust_remote_code=True).save_pretrained(tmp_path / "copied")
    assert _python_files(tmp_path / "copied") == set(FILES)


def test_experts_alone_bring_the_code_that_they_were_trained_with(plain, run_python, tmp_path):
    model = _attached(plain, train_backbone=False, save="experts")
    model.save_pretrained(tmp_path / "alone")
    assert _python_files(tmp_path / "alone") == set(FILES)
    (plain / "modeling_pocket.py").write_text("raise RuntimeError('the code of another day')")
    for found in _logits_in_new_process(run_python, tmp_path / "alone", tmp_path):
        assert torch.equal(found, logits_of(model, IDS))
    le.reparameterize(
        tmp_path / "alone", tmp_path / "out", encoding="float32", trust_remote_code=True
    )
    assert _python_files(tmp_path / "out") == set(FILES)
    shutil.rmtree(plain)
    folded = le.load(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits_of(folded, IDS), logits_of(model, IDS), rtol=1e-5, atol=1e-5)


def test_a_generate_of_the_folders_own_is_carried_and_run_if_it_may(training_folder, ran, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(training_folder, source)
    (source / "custom_generate").mkdir()
    (source / "custom_generate" / "generate.py").write_text(
        "import os\n"
        "with open(os.environ['OWN_CODE_RAN'], 'a') as file:\n"
        "    file.write('generate')\n"
        "def generate(model, *args, **kwargs):\n"
        "    return 'of its own'\n"
    )
    le.reparameterize(source, tmp_path / "out")
    assert torch.is_tensor(le.load(tmp_path / "out").generate(IDS, max_new_tokens=2))
    assert ran.read_text() == ""
    model = le.load(tmp_path / "out", trust_remote_code=True)
    assert model.generate(inputs=IDS) == "of its own"
    assert ran.read_text() == "generate"


# ------------------------------------------------------------------------------ without permission


@pytest.fixture
def folders(plain, tmp_path) -> dict[str, Path]:
    """A folder of each kind with code of its own."""
    model = _attached(plain)
    model.save_pretrained(tmp_path / "full")
    le.reparameterize(model, tmp_path / "table")
    model = _attached(plain, train_backbone=False, save="experts")
    model.save_pretrained(tmp_path / "alone")
    found = {name: tmp_path / name for name in ("full", "table", "alone")}
    for folder in found.values():
        for file in plain.glob("tokenizer*"):
            shutil.copy(file, folder)
        shutil.copy(plain / TOKENIZER_FILE, folder)
    return {"plain": plain, **found}


_REFUSED_ELSEWHERE = """
import sys
import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation.inspection import inspect_folder, verify_folder
from transformers import AutoConfig, AutoModelForCausalLM

kind, folder = sys.argv[1:]
calls = [
    lambda: le.load(folder),
    lambda: le.load(folder, trust_remote_code=False),
    lambda: le.reparameterize(folder, folder + ".out"),
    lambda: load_tokenizer(folder),
]
if kind == "table":
    calls.append(lambda: verify_folder(folder))
if kind != "plain":
    calls.append(lambda: AutoModelForCausalLM.from_pretrained(folder))
    calls.append(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False))
    assert AutoConfig.from_pretrained(folder).hidden_size == 32
inspect_folder(folder)
for call in calls:
    try:
        call()
    except UserError as error:
        print(error)
    else:
        raise SystemExit("was loaded")
"""


@pytest.mark.parametrize("kind", ["plain", "full", "table", "alone"])
def test_no_code_runs_unasked(kind, folders, ran, run_python, tmp_path):
    ran.write_text("")
    code, out, err = run_python(_REFUSED_ELSEWHERE, kind, folders[kind], timeout=120)
    assert code == 0, err
    assert len(out.splitlines()) >= 4
    for line in out.splitlines():
        assert "which isn't run unasked" in line
        assert "trust_remote_code=True" in line
    assert ran.read_text() == ""
    assert not Path(f"{folders[kind]}.out").exists()
    assert not Path(f"{folders[kind]}.out.partial").exists()
    folders[kind].rename(tmp_path / "fresh")  # modules that were run before have another name
    le.load(tmp_path / "fresh", trust_remote_code=True)
    assert "modeling_pocket" in ran.read_text()


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog . " * 20)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{full}", "--prompt", "the fox", "-n", "3"],
        ["generate", "{table}", "--prompt-ids", "4 5 6", "-n", "3"],
        ["eval", "{table}", "--perplexity", "{text}"],
        ["reparameterize", "{full}", "{out}", "--eval", "{text}", "--counts", "{text}"],
        ["reencode", "{table}", "{out}", "--encoding", "nf4", "--eval", "{text}"],
        ["verify", "{table}"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_commands_ask_for_a_flag(command, folders, text, ran, tmp_path, capsys):
    places = {**folders, "text": text, "out": tmp_path / "out"}
    arguments = [word.format(**places) for word in command]
    ran.write_text("")
    code, _, told = run_command(capsys, *arguments)
    assert code == 2
    assert "--trust-remote-code" in told
    assert len(told.strip().splitlines()) == 1
    assert ran.read_text() == ""
    assert not list(tmp_path.glob("out*"))
    code, _, told = run_command(capsys, *arguments, "--trust-remote-code")
    assert code == 0, told
    assert "modeling_pocket" in ran.read_text()


def test_upcycling(ran, tmp_path, capsys):
    data = make_data(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text" / "tokenizer")
    write_own_code_model(tmp_path / "pocket", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "pocket")
    ran.write_text("")
    settings = ["training.steps=2", f"training.context_length={CONTEXT}", "training.precision=fp32"]
    settings += ["training.sequences_per_step=2", "training.sequences_per_micro_batch=2"]
    command = ["upcycle", tmp_path / "pocket", "--data", data, "--out", tmp_path / "out"]
    command += ["--experts", 2, "--layers", "every:2"]
    command += [word for setting in settings for word in ("--set", setting)]
    code, _, told = run_command(capsys, *command)
    assert code == 2
    assert "--trust-remote-code" in told
    assert ran.read_text() == ""
    assert not (tmp_path / "out").exists()
    code, _, told = run_command(capsys, *command, "--trust-remote-code")
    assert code == 0, told
    assert _python_files(tmp_path / "out") == set(FILES)
    model = le.load(tmp_path / "out", trust_remote_code=True)
    assert model.lookup_settings.layers == (0, 2)


# ---------------------------------------------------------------------------------- other classes


def test_a_class_of_transformers_needs_no_permission(tmp_path):
    """A folder can name code for a model that transformers has, too."""
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    config = json.loads(path.read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps({**config, "auto_map": named}))
    model = le.load(tmp_path / "plain")
    le.attach(model, 2, init="normal")
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    assert not _python_files(tmp_path / "saved")
    assert torch.equal(logits_of(le.load(tmp_path / "saved"), IDS), logits_of(model, IDS))


def test_code_that_is_in_no_file_is_refused_before_the_first_change(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import lookup_experts as le\n"
        "from tiny_models import tiny_config\n"
        "from transformers import LlamaForCausalLM\n"
        "class Mine(LlamaForCausalLM):\n"
        "    pass\n"
        "Mine.register_for_auto_class('AutoModelForCausalLM')\n"
        "model = Mine(tiny_config('llama'))\n"
        "try:\n"
        "    le.attach(model, 2)\n"
        "except le.UserError as error:\n"
        "    print(error)\n"
        "assert type(model) is Mine and not hasattr(model.config, 'lookup_experts')\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Mine is defined in __main__, so its code can't be saved")


def test_a_class_that_is_saved_with_its_code_by_its_author(tmp_path, run_python, monkeypatch):
    """`register_for_auto_class`, as transformers' guide for sharing a model says."""
    package = tmp_path / "mine"
    package.mkdir()
    for name, content in FILES.items():
        (package / name).write_text(content)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    from mine.configuration_pocket import PocketConfig
    from mine.modeling_pocket import PocketForCausalLM

    PocketConfig.register_for_auto_class()
    PocketForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = PocketForCausalLM(PocketConfig()).eval()
    le.attach(model, 3, expert_size=8, init="normal")
    randomize_experts(model)
    model.save_pretrained(tmp_path / "saved")
    assert _python_files(tmp_path / "saved") == set(FILES)
    for found in _logits_in_new_process(run_python, tmp_path / "saved", tmp_path):
        assert torch.equal(found, logits_of(model, IDS))


def test_a_damaged_folder_is_told_of(plain, tmp_path):
    _attached(plain).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "modeling_pocket.py").unlink()
    with pytest.raises(UserError, match=r"the code of modeling_pocket\.PocketForCausalLM"):
        le.load(tmp_path / "saved", trust_remote_code=True)
    (tmp_path / "saved" / "modeling_pocket.py").write_text("nothing = None")
    with pytest.raises(UserError, match=r"the code of modeling_pocket\.PocketForCausalLM"):
        le.load(tmp_path / "saved", trust_remote_code=True)
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    del config["backbone"]["auto_map"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="model type 'pocket' is unknown to transformers"):
        le.load(tmp_path / "saved", trust_remote_code=True)
