"""`mole`: help, results on stdout, errors in one line and exit code 2."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from random_tables import flip_bit
from tiny_models import attached_model, gateless_model, tiny_model
from transformers import AutoTokenizer

import lookup_experts as le
from lookup_experts import cli

MOLE = Path(sys.executable).parent / "mole"
PROGRESS_BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
SHARD = "table/table-00001-of-00001.safetensors"


@pytest.fixture
def mole(monkeypatch, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mole", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(mole):
    """Run a command line that must be refused; gives the one line on stderr."""

    def run(*arguments: object) -> str:
        code, out, err = mole(*arguments)
        assert (code, out) == (2, ""), err
        lines = [line for line in err.splitlines() if line.strip() and PROGRESS_BAR not in line]
        assert len(lines) == 1, err
        assert lines[0].startswith("mole: ")
        return lines[0]

    return run


@pytest.fixture
def own_folder(table_folder, tmp_path):
    """A copy of the inference folder, to spoil."""
    return shutil.copytree(table_folder, tmp_path / "own")


def binary(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The real command in a process of its own."""
    return subprocess.run(
        [str(MOLE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


# ---------------------------------------------------------------------------------------- help


def test_the_version_is_told(mole):
    assert mole("--version") == (0, f"mole {le.__version__}\n", "")


def test_help_lists_every_command():
    done = binary("--help")
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert f" {command} " in done.stdout


def existing_commands() -> list[str]:
    folder = Path(cli.__file__).parent / "commands"
    return [name for name in cli.COMMANDS if (folder / f"{name}.py").exists()]


@pytest.mark.parametrize("name", existing_commands())
def test_help_of_every_command_has_an_example(name):
    command = cli.load_command(name)
    for leaf in getattr(command, "commands", {name: command}).values():
        assert "Example:" in leaf.help, leaf.name
        assert f"mole {name}" in leaf.help.split("Example:")[1]


def test_help_of_a_command_is_printed(mole):
    code, out, _ = mole("generate", "--help")
    assert code == 0
    assert "--prompt-ids" in out
    assert "Example: mole generate" in out


# ------------------------------------------------------------------------- through the binary


def test_the_whole_way_through_the_real_command(training_folder, tmp_path):
    folded = binary("reparameterize", training_folder, tmp_path / "out", "--encoding", "float32")
    assert folded.returncode == 0, folded.stderr
    assert "97 records of 1.54 kB" in folded.stdout
    generated = binary(
        "generate", tmp_path / "out", "--prompt", "the fox", "-n", "8", "--json", "--stats"
    )
    assert generated.returncode == 0, generated.stderr
    result = json.loads(generated.stdout)
    assert len(result["token_ids"]) == 8
    assert result["reader"]["batches"] == 8
    assert "8 new tokens" in generated.stderr


def test_an_error_of_the_real_command_is_one_line():
    done = binary("genrate", "folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mole: Unknown command 'genrate'. Did you mean 'generate'?")
    assert len(done.stderr.splitlines()) == 1


def test_chat_answers_what_is_piped_in(table_folder):
    done = binary("chat", table_folder, "-n", "5", "--seed", "1", input="the fox\nthe dog\n\n")
    assert done.returncode == 0, done.stderr
    assert ">" not in done.stdout  # signs that ask for a turn are for a terminal
    assert len(done.stdout.splitlines()) >= 2
    assert "no chat template" in done.stderr and "new tokens" not in done.stderr


def test_chat_on_a_terminal_asks_for_turns_and_outlives_one_that_is_too_long(table_folder):
    """A real terminal: only there a turn that can't be answered doesn't end the talk."""
    terminal, inner = pty.openpty()
    termios.tcsetwinsize(inner, (40, 4000))
    command = [str(MOLE), "chat", str(table_folder), "-n", "3"]
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, close_fds=True)
    os.close(inner)
    shown = b""
    for turn, signs in (
        (b"the fox\n", 1),
        (b"the dog " * 70 + b"\n", 2),
        (b"the dog\n", 3),
        (b"\n", 4),
    ):
        while shown.count(b"> ") < signs:
            shown += os.read(terminal, 10_000)
        os.write(terminal, turn)
    assert process.wait(20) == 0
    assert b"and the model's context is 128" in shown
    os.close(terminal)
    piped = binary("chat", table_folder, "-n", "3", input="the dog " * 70 + "\n")
    assert (piped.returncode, piped.stdout) == (2, "")
    assert "and the model's context is 128" in piped.stderr


def test_chat_near_the_end_of_the_context_says_so(table_folder):
    turn = "the quick brown fox " * 8
    done = binary("chat", table_folder, "-n", "120", "--stats", "--seed", "1", input=turn)
    assert done.returncode == 0, done.stderr
    prompt, new = map(int, re.search(r"(\d+) prompt tokens, (\d+) new", done.stderr).groups())
    assert prompt > 28 and prompt + new == 128
    assert f"Stopped after {new} tokens: the context of 128 is full." in done.stderr


def test_chat_tells_what_each_answer_took(table_folder):
    arguments = ("-n", "5", "--seed", "1", "--store", "direct", "--stats")
    done = binary("chat", table_folder, *arguments, input="the fox\nthe dog\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("new tokens") == done.stderr.count("table: direct (") == 2
    assert "new tokens" not in done.stdout


# -------------------------------------------------------------------------------- each command


def test_inspect(mole, training_folder, table_folder, official_oracles):
    for folder in (
        training_folder,
        table_folder,
        table_folder / "table",
        official_oracles / "dense",
    ):
        code, out, _ = mole("inspect", folder)
        assert code == 0
        assert str(folder) in out
        labels = [line[:18].strip() for line in out.splitlines()[1:]]
        assert sorted(labels) == sorted(set(labels))
        code, out, _ = mole("inspect", folder, "--json")
        assert json.loads(out)["folder"] == str(folder)


def test_inspect_tells_context_dtype_and_chat_template(mole, own_folder, tmp_path):
    def told(folder: Path) -> list[str]:
        lines = mole("inspect", folder)[1].splitlines()
        return [
            line.split(maxsplit=1)[1] for line in lines if line.split()[0] in ("context", "dtype")
        ] + [line.split(maxsplit=2)[2] for line in lines if line.startswith("  chat template")]

    assert told(own_folder) == ["128 tokens", "float32", "no"]
    tokenizer = AutoTokenizer.from_pretrained(own_folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(own_folder)
    assert told(own_folder)[2] == "yes"
    tiny_model("bloom").to(torch.bfloat16).save_pretrained(tmp_path / "bloom")
    settings = json.loads((tmp_path / "bloom" / "config.json").read_text())
    del settings[
        "max_position_embeddings"
    ]  # of ours; it has none, its attention needs no positions
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(settings))
    assert told(tmp_path / "bloom") == ["not stated", "bfloat16", "no tokenizer"]
    found = json.loads(mole("inspect", tmp_path / "bloom", "--json")[1])
    assert (found["context"], found["dtypes"], found["chat_template"]) == (None, ["bfloat16"], None)


def test_reparameterize_tells_what_it_made(mole, training_folder, tmp_path):
    code, out, _ = mole("reparameterize", training_folder, tmp_path / "out", "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["records"], made["encoding"]) == (97, "bfloat16")
    assert le.load(tmp_path / "out").lookup_settings.fingerprint == made["fingerprint"]


def test_reparameterize_goes_on_when_it_is_given_again(
    mole, training_folder, tmp_path, monkeypatch
):
    from lookup_experts.generation import folding

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folding, "save_without_experts", interrupt)
        assert mole("reparameterize", training_folder, tmp_path / "out")[0] == 130
    code, _, err = mole("reparameterize", training_folder, tmp_path / "out")
    assert code == 0
    assert "Going on with the interrupted run" in err


def test_the_authors_checkpoint_through_every_command(mole, official_oracles, tmp_path):
    from safetensors.torch import load_file

    folder = official_oracles / "mole-4e"
    oracle = load_file(folder / "greedy.safetensors")
    prompt = " ".join(map(str, oracle["prompt"][0].tolist()))
    expected = oracle["tokens"][0].tolist()[oracle["prompt"].shape[1] :]
    code, _, err = mole("reparameterize", folder, tmp_path / "out", "--encoding", "float32")
    assert code == 0, err
    for model in (folder, tmp_path / "out"):
        code, out, _ = mole("generate", model, "--prompt-ids", prompt, "-n", len(expected))
        assert code == 0
        assert list(map(int, out.split())) == expected
    assert mole("verify", tmp_path / "out")[0] == 0


def test_verify_reports_a_sound_table(mole, table_folder):
    code, out, _ = mole("verify", table_folder)
    assert code == 0
    assert "all 97 records are intact" in out
    assert "belongs to the model" in out
    code, out, _ = mole("verify", table_folder, "--json")
    assert json.loads(out)["intact"] is True


def test_verify_of_a_damaged_table_still_gives_its_json(mole, own_folder):
    flip_bit(own_folder / SHARD, 5000)
    code, out, err = mole("verify", own_folder, "--json")
    assert code == 2
    assert json.loads(out)["intact"] is False
    assert "1 of 97 records are damaged" in err


def test_generate_gives_text_as_it_comes_or_ids(mole, table_folder):
    code, out, _ = mole("generate", table_folder, "--prompt", "the fox", "-n", 6, "--json")
    assert code == 0
    whole = json.loads(out)
    code, text, _ = mole("generate", table_folder, "--prompt", "the fox", "-n", 6)
    assert (code, text) == (0, whole["text"] + "\n")
    code, out, _ = mole("generate", table_folder, "--prompt-ids", "4, 5 6", "-n", 6)
    assert code == 0
    assert len(out.split()) == 6


def test_generate_ends_with_the_context(mole, table_folder):
    code, out, err = mole("generate", table_folder, "--prompt-ids", "4 5", "-n", 5000)
    assert (code, len(out.split())) == (0, 126)
    assert "Stopped after 126 tokens: the context of 128 is full." in err
    out = mole("generate", table_folder, "--prompt-ids", "4 5", "-n", 5000, "--json")[1]
    assert json.loads(out)["finish_reason"] == "context"


def test_generate_reads_its_prompt_from_standard_input(table_folder, mole):
    expected = mole("generate", table_folder, "-p", "the fox\n  and", "-n", 5)[1]
    done = binary("generate", table_folder, "-p", "-", "-n", 5, input="the fox\n  and\n")
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    refused = subprocess.run(
        [str(MOLE), "generate", str(table_folder), "-p", "-"],
        input=b"\xff\xfe",
        capture_output=True,
        check=False,
    )
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert b"Standard input is not UTF-8 text" in refused.stderr


def test_generate_asks_a_message_through_the_chat_template(mole, refused, own_folder):
    assert "has no chat template" in refused("generate", own_folder, "--chat", "-p", "the fox")
    assert "give it as text" in refused("generate", own_folder, "--chat", "--prompt-ids", "4")
    tokenizer = AutoTokenizer.from_pretrained(own_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} and{% endfor %}"
    tokenizer.save_pretrained(own_folder)
    asked = mole("generate", own_folder, "--chat", "-p", "the fox", "-n", 5)
    assert asked[:2] == mole("generate", own_folder, "-p", "the fox and", "-n", 5)[:2]
    # A model that ends at once where it is not asked as it learnt to be.
    first = json.loads(mole("generate", own_folder, "-p", "the", "-n", 1, "--json")[1])
    settings = json.loads((own_folder / "generation_config.json").read_text())
    settings["eos_token_id"] = first["token_ids"][0]
    (own_folder / "generation_config.json").write_text(json.dumps(settings))
    tokenizer.add_special_tokens(
        {"eos_token": tokenizer.convert_ids_to_tokens(settings["eos_token_id"])}
    )
    tokenizer.save_pretrained(own_folder)
    code, out, err = mole("generate", own_folder, "-p", "the", "-n", 9)
    assert (code, out) == (0, "\n")
    assert "The model wrote no text and ended the text (tokens: 1)." in err
    assert "has a chat template: ask the prompt as a message, with --chat." in err


def test_generate_is_repeatable_with_a_seed(mole, table_folder):
    def sampled(seed: int) -> str:
        return mole(
            "generate", table_folder, "--prompt-ids", "4 5", "--temperature", 1.5, "--seed", seed
        )[1]

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


@pytest.mark.parametrize("store", ["memory", "mmap", "direct"])
def test_generate_says_what_it_took(mole, table_folder, store):
    code, _, err = mole(
        "generate", table_folder, "--prompt-ids", "4 5", "-n", 3, "--store", store, "--stats"
    )
    assert code == 0
    assert "2 prompt tokens, 3 new tokens" in err
    assert f"table: {store} (" in err


def test_generate_says_how_its_linear_layers_are_had(mole, tmp_path):
    folder = tmp_path / "large"
    gateless_model(hidden_size=256, intermediate_size=512).save_pretrained(folder)
    for weights in ("auto", "plain", "int8"):
        words = (
            "generate",
            folder,
            "--prompt-ids",
            "4 5",
            "-n",
            2,
            "--weights",
            weights,
            "--stats",
        )
        code, _, err = mole(*words)
        assert code == 0
        (said,) = (line for line in err.splitlines() if line.startswith("linear layers: "))
        assert {"auto": "packed", "plain": " plain", "int8": "int8"}[weights] in said
        assert ("packed" in said or "int8" in said) == (weights != "plain")
    code, _, err = mole("generate", folder, "--prompt-ids", "4 5", "--weights", "int3")
    assert code == 2 and "int3" in err and len(err.splitlines()) == 1


def test_generate_takes_a_tokenizer_from_elsewhere(mole, own_folder, table_folder):
    for path in own_folder.glob("tokenizer*"):
        path.unlink()
    code, out, _ = mole(
        "generate", own_folder, "--tokenizer", table_folder, "--prompt", "the", "-n", 2
    )
    assert code == 0
    assert out


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("command", ["inspect", "verify", "generate", "chat", "reparameterize"])
def test_folders_that_are_no_models(command, refused, tmp_path):
    extra = {
        "generate": ["--prompt-ids", "1"],
        "reparameterize": [tmp_path / "out"],
    }.get(command, [])
    assert "No such folder" in refused(command, tmp_path / "nowhere", *extra)
    (tmp_path / "empty").mkdir()
    line = refused(command, tmp_path / "empty", *extra)
    assert "not a model folder" in line or "no tokenizer" in line


def test_no_tokenizer(refused, own_folder):
    (own_folder / "tokenizer.json").unlink()
    for command in (["generate", own_folder, "--prompt", "a"], ["chat", own_folder]):
        assert "has no tokenizer" in refused(*command)


def test_tables_that_are_not_what_they_should_be(refused, own_folder, tmp_path):
    flip_bit(own_folder / SHARD, 4096 + 4 * 1536 + 2)
    assert "record 4" in refused("verify", own_folder)
    line = refused(
        "generate", own_folder, "--prompt-ids", "3 4", "--checksums", "--store", "direct"
    )
    assert "record of id 4 is damaged" in line
    shard = own_folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])
    for command in ("inspect", "verify"):
        assert "truncated, expected" in refused(command, own_folder)
    assert "truncated, expected" in refused("generate", own_folder, "--prompt-ids", "1 2 3")
    le.reparameterize(attached_model("llama", seed=5), tmp_path / "other", encoding="float32")
    shutil.rmtree(own_folder / "table")
    shutil.copytree(tmp_path / "other" / "table", own_folder / "table")
    assert "the table of another model" in refused("generate", own_folder, "--prompt-ids", "3")
    assert "the table of another model" in refused("verify", own_folder)


def test_prompts_that_can_not_be(refused, table_folder):
    generate = ["generate", table_folder, "--store", "mmap"]
    assert "Give either --prompt" in refused(*generate)
    assert "Give either --prompt" in refused(*generate, "--prompt", "a", "--prompt-ids", "1")
    assert "prompt is empty" in refused(*generate, "--prompt", "")
    assert "prompt is empty" in refused(*generate, "--prompt-ids", "")
    assert "Token id 97 is outside" in refused(*generate, "--prompt-ids", "4 97")
    assert "whole numbers" in refused(*generate, "--prompt-ids", "4 x")
    assert "max_new_tokens is 0" in refused(*generate, "--prompt-ids", "4", "-n", 0)
    assert "context is 128" in refused(*generate, "--prompt-ids", "4 " * 200)


def test_names_that_do_not_exist(refused, table_folder, training_folder, tmp_path):
    fold = ["reparameterize", training_folder, tmp_path / "out"]
    assert "Did you mean 'bfloat16'" in refused(*fold, "--encoding", "bfloat61")
    generate = ["generate", table_folder, "--prompt-ids", "4"]
    assert "Did you mean 'direct'" in refused(*generate, "--store", "direkt")
    assert "Did you mean 'float16'" in refused(*generate, "--dtype", "flaot16")
    assert "Did you mean 'generate'" in refused("genrate", table_folder)
    assert "Unknown encoding 'zip'" in refused(*fold, "--encoding", "zip")
    assert "No device 'cdua' here" in refused(*generate, "--device", "cdua")


def test_options_that_do_not_exist(mole, table_folder):
    code, _, err = mole("generate", table_folder, "--promt", "a")
    assert code == 2
    assert "--prompt" in err
    code, _, err = mole("generate", table_folder, "-n", "many")
    assert code == 2
    assert "--max-new-tokens" in err


def test_folding_where_something_is(refused, training_folder, table_folder, tmp_path):
    assert "exists already" in refused("reparameterize", training_folder, tmp_path)
    assert "into a table already" in refused("reparameterize", table_folder, tmp_path / "out")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    line = refused("reparameterize", tmp_path / "plain", tmp_path / "out")
    assert "no lookup experts" in line


def test_a_traceback_can_be_asked_for(mole, tmp_path, monkeypatch):
    monkeypatch.setenv("MOLE_TRACEBACK", "1")
    with pytest.raises(le.UserError, match="No such folder"):
        mole("inspect", tmp_path / "nowhere")
