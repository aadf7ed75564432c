"""`mole bench scale`: tiny systems on equal tokens, within limits of time, killed and gone on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from result_rows import result_rows
from tiny_runs import make_data, tiny_recipe
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import scale
from lookup_experts.benchmarks.quality import System
from lookup_experts.benchmarks.scale import Trial, tokens_per_unique_id, tokens_that_fit
from lookup_experts.errors import UserError
from lookup_experts.training.train import train

SYSTEMS = ("dense", "mole-2e", "meki:row_size=8", "moe-4e")
TOKENS = 1024


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(scale, "VALIDATE_EVERY", TOKENS // 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def recallable_data(tmp_path_factory) -> Path:
    """Text of forty words that are one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lookup_experts.training.prepare import prepare

    folder = tmp_path_factory.mktemp("recallable")
    letters = "abcdefgh"
    words = [f"{a}{b}{b}" for a in letters for b in letters[:5]]
    vocabulary = {"<|end|>": 0} | {f"Ġ{word}": number for number, word in enumerate(words, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder / "tokenizer")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(5):
        (texts / f"{number}.txt").write_text(" ".join(words[number:] * 8))
    prepare([texts], tokenizer=folder / "tokenizer", out=folder / "data", validation=0.2,
            num_workers=1)  # fmt: skip
    return folder / "data"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(tiny_recipe().to_yaml())
    return path


def bench(data, base, work, *arguments):
    out = work / "scale.json"
    done = CliRunner().invoke(
        cli.app,
        [
            *("bench", "scale", *arguments, "--data", str(data), "--recipe", str(base)),
            *("--tokens", str(TOKENS), "--work", str(work / "curves"), "--json", str(out)),
        ],
    )
    return done, out


def test_systems_are_trained_on_equal_tokens_as_mole_train_trains_them(data, base, tmp_path):
    plot = tmp_path / "curves.png"
    done, out = bench(data, base, tmp_path, *SYSTEMS, "--plot", str(plot))
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())["results"]
    assert [result["system"] for result in results] == list(SYSTEMS)
    assert {result["tokens"] for result in results} == {TOKENS}
    assert {tuple(at for at, _ in result["curve"]) for result in results} == {(512, 1024)}
    for result in results[1:]:
        assert result["ratio_to_dense"] == pytest.approx(
            results[0]["tokens_per_second"] / result["tokens_per_second"]
        )
    assert results[1]["flop_ratio_to_dense"] > 1
    for result in results[:2]:
        recipe = System.parse(result["system"]).recipe(
            tiny_recipe(), tokens=TOKENS, seed=0, points=2
        )
        by_train = train(recipe, data, tmp_path / result["system"], progress=False)
        assert result["validation_loss"] == by_train.validation_loss
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Few of this text's words are one token each: said, and left out.
    assert "No recall:" in done.output and "recall" not in results[0]

    rows = result_rows("scale", results)
    assert [row["system"] for row in rows] == list(SYSTEMS)
    leads = result_rows("lead-curves", results)
    assert [row["after"] for row in leads] == ["0.00 M tokens"] * 2
    gained = results[0]["curve"][-1][1] - results[3]["curve"][-1][1]
    assert leads[-1]["moe-4e"] == f"{gained:+.3f}"


def test_recall_is_measured(recallable_data, base, tmp_path):
    done, out = bench(
        recallable_data, base, tmp_path, "dense", "--set", "training.context_length=64"
    )
    assert done.exit_code == 0, done.output
    (result,) = json.loads(out.read_text())["results"]
    assert [at["distance"] for at in result["recall"]["distances"]] == [16, 32]
    assert "recall over 16: " in done.output
    without = {key: value for key, value in result.items() if key != "recall"}
    rows = result_rows("scale", [result, without])
    assert rows[0]["recall over distances"].startswith("16: ")
    assert rows[1]["recall over distances"] == ""


def test_tokens_per_unique_id():
    import torch

    ids = [torch.tensor([1, 1, 2, 3]), torch.tensor([1, 2, 2, 2]), torch.tensor([5, 5, 5, 5])]
    sequences = [{"input_ids": row} for row in [*ids, *ids]]
    training = tiny_recipe(sequences_per_micro_batch=2, sequences_per_step=2).training
    # {1, 2, 3}, {1, 2, 3, 5}, {1, 2, 5} in the micro batches of eight tokens
    assert tokens_per_unique_id(sequences, training) == pytest.approx(24 / 10)
    assert tokens_per_unique_id(sequences, training, batches=1) == pytest.approx(8 / 3)


def test_what_fits_is_shared_by_speed(monkeypatch):
    monkeypatch.setattr(scale, "VALIDATE_EVERY", 1000)
    fast, slow = Trial(0.001, 1.0), Trial(0.006, 2.0)  # 2 and 8 ms per token with validations
    tokens = tokens_that_fit([fast, slow], 100)
    used = tokens * (0.002 + 0.008) + 2 * scale.SECONDS_BESIDE
    assert used == pytest.approx(100 * (1 - scale.RESERVE), rel=1e-3)
    assert tokens_that_fit([fast], 100) > tokens
    assert tokens_that_fit([fast, slow], 1) == 0


def test_a_limit_of_time_chooses_the_tokens(data, base, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "tokens_that_fit", lambda trials, seconds: 768 + len(trials))
    done, out = bench(data, base, tmp_path, "dense", "mole-2e", "--seconds", "600")
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())["results"]
    assert [result["tokens"] for result in results] == [832, 832]  # whole steps of 64


def test_too_little_time_is_told_in_one_line(data, base, tmp_path):
    done, out = bench(data, base, tmp_path, "dense", "--seconds", "1")
    assert isinstance(done.exception, UserError)
    assert "Give more --seconds" in str(done.exception)
    assert not out.exists()


def test_a_run_that_time_cuts_off_is_trained_again(data, base, tmp_path, monkeypatch):
    answers = iter([True] * 4)  # before the run, and after its first three steps
    monkeypatch.setattr(scale._Study, "has_time", lambda study: next(answers, False))
    monkeypatch.setattr(scale, "tokens_that_fit", lambda trials, seconds: TOKENS)
    done, out = bench(data, base, tmp_path, "dense", "moe-4e", "--seconds", "60")
    assert done.exit_code == 0, done.output
    result, late = json.loads(out.read_text())["results"]
    assert late == {"system": "moe-4e", "failed": "no time was left"}
    assert result["stopped"] and result["tokens"] == 4 * 64
    assert result["curve"][-1][0] == result["tokens"]
    assert "time ran out" in done.output
    assert not scale._is_whole(result)


def test_what_fails_is_told_and_the_others_go_on(data, base, tmp_path, monkeypatch):
    build = scale.build_model

    def fail_for_mixtures(recipe, vocab_size):
        if recipe.model.moe is not None:
            raise RuntimeError("no such kernel\nand where it was looked for")
        return build(recipe, vocab_size)

    monkeypatch.setattr(scale, "build_model", fail_for_mixtures)
    done, out = bench(data, base, tmp_path, "moe-4e", "dense")
    assert done.exit_code == 0, done.output
    failed, trained = json.loads(out.read_text())["results"]
    assert failed == {"system": "moe-4e", "failed": "RuntimeError: no such kernel."}
    assert trained["tokens"] == TOKENS
    rows = result_rows("scale", [trained, failed])
    assert rows[1]["validation loss"] == "RuntimeError: no such kernel."


def test_a_loss_that_is_not_finite_is_told(data, base, tmp_path):
    changes = ("--set", "training.learning_rate=1e30", "--set", "training.clip=1e30")
    done, out = bench(data, base, tmp_path, "dense", *changes)
    assert done.exit_code == 0, done.output
    (result,) = json.loads(out.read_text())["results"]
    assert "is nan at step" in result["failed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dens",), "No system is called 'dens'"),
        (("meki:num_experts=4",), "no experts to count"),
        (("dense", "--set", "model.moe={num_experts: 2}"), "on a dense --recipe"),
        (("dense", "--set", "training.length=3"), "training.length"),
        (("dense", "--set", "training.context_length=4096"), "at least as many"),
    ],
)
def test_bad_input_is_told_in_one_line(data, base, tmp_path, arguments, words):
    done, out = bench(data, base, tmp_path, *arguments)
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
    assert not out.exists() and not (tmp_path / "curves").exists()


def test_text_without_held_out_text_is_refused(base, tmp_path):
    data = make_data(tmp_path / "all", validation=0.0)
    done, _ = bench(data, base, tmp_path, "dense")
    assert isinstance(done.exception, UserError)
    assert "no validation text" in str(done.exception)


@pytest.mark.timeout(180)
def test_a_killed_comparison_goes_on_after_the_systems_that_are_done(data, base, tmp_path):
    command = [
        *(sys.executable, "-m", "lookup_experts.cli", "bench", "scale", "dense", "mole-2e"),
        *("--data", str(data), "--recipe", str(base), "--tokens", str(64 * 150)),
        *("--work", str(tmp_path / "curves"), "--json", str(tmp_path / "scale.json")),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "scale.json.partial").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    dense_curve = (tmp_path / "curves/dense-seed0/history.jsonl").stat().st_mtime_ns
    partial = json.loads((tmp_path / "scale.json.partial").read_text())["results"]
    assert [result["system"] for result in partial] == ["dense"]

    again = subprocess.run(
        [*command, "--seconds", "500"], capture_output=True, text=True, check=True
    )
    assert "dense trained already, on 9,600 tokens" in again.stderr
    assert (tmp_path / "curves/dense-seed0/history.jsonl").stat().st_mtime_ns == dense_curve
    results = json.loads((tmp_path / "scale.json").read_text())["results"]
    assert results[0] == partial[0]
    assert results[1]["tokens"] == results[0]["tokens"] and "ratio_to_dense" in results[1]
    assert not (tmp_path / "scale.json.partial").exists()
