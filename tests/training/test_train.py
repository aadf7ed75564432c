"""Training runs, for real and tiny: what comes out, and what is refused."""

import errno
import json
import os
import subprocess
from collections import namedtuple
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from run_command import run_command
from safetensors.torch import load_file
from tiny_runs import CONTEXT, make_data, tiny_recipe

from lookup_experts.errors import DiskFullError, UserError
from lookup_experts.training import disk_space
from lookup_experts.training.checkpoints import list_checkpoints
from lookup_experts.training.data import TokenDataset, TokenShards
from lookup_experts.training.history import Stopwatch, perplexity, tokens_per_second
from lookup_experts.training.models import build_model, count_parameters, with_vocabulary
from lookup_experts.training.order import ShuffledSequences
from lookup_experts.training.progress import format_duration
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.train import TrainingSummary, train
from lookup_experts.training.trainer import RecipeTrainer

EXPERTS = {"num_experts": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with experts. Tests only read it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(tiny_recipe(EXPERTS), data, out, progress=False)
    return out


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_the_folder_is_the_model_that_was_validated(
    data: Path, tmp_path: Path, experts: dict[str, Any] | None
) -> None:
    """Loaded by transformers, it has the validation loss that the summary states."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = tiny_recipe(experts, validate_sequences=1000)
    summary = train(recipe, data, tmp_path / "out", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held_out = TokenDataset(TokenShards(data, "validation"), CONTEXT)
    batch = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    assert summary.validation_loss == pytest.approx(loss, abs=1e-5)
    assert summary.validation_perplexity == pytest.approx(perplexity(loss), rel=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("alpha beta", return_tensors="pt").input_ids
    generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > prompt.shape[1]
    assert model.generation_config.use_cache
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_training_learns(data: Path, tmp_path: Path) -> None:
    summary = train(tiny_recipe(EXPERTS, steps=40), data, tmp_path / "out", progress=False)
    losses = [line["loss"] for line in history(tmp_path / "out") if "loss" in line]
    assert losses[0] > 5  # nearly that of guessing, ln 320
    assert losses[-1] < 3.5
    assert summary.training_loss == losses[-1]
    assert summary.validation_loss is not None
    assert summary.validation_loss < 3.5


def test_the_summary_counts(trained: Path) -> None:
    summary = TrainingSummary.load(trained / "summary.json")
    assert (summary.steps, summary.tokens) == (6, 6 * 4 * CONTEXT)
    rate = tokens_per_second(summary.tokens, summary.seconds)
    assert summary.tokens_per_second == pytest.approx(rate, rel=1e-3)
    assert summary.device == "cpu"
    assert summary.versions["torch"] == torch.__version__
    sizes = {name: tensor.numel() for name, tensor in weights(trained).items()}
    assert summary.parameters.total == summary.parameters.trained == sum(sizes.values())
    # Per layer: up and down of three experts of size 64, and their norm.
    routed = 2 * (3 * 2 * 32 * 64 + 32)
    assert summary.parameters.resident == sum(sizes.values()) - routed


def test_a_short_run_shows_its_loss(data: Path, tmp_path: Path, capsys: Any) -> None:
    """Over before a line is due, and before as many steps as lines are apart."""
    recipe = tiny_recipe(steps=3, log_every=10, validate_every=3)
    train(recipe, data, tmp_path / "out")
    said = capsys.readouterr().err
    losses = [line["loss"] for line in history(tmp_path / "out") if "loss" in line]
    assert len(losses) == 3
    assert f"step 3/3  loss {losses[-1]:.3f}" in said


def test_the_history_has_losses_and_validations(trained: Path) -> None:
    lines = history(trained)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 6]
    assert all(line["tokens"] == line["step"] * 4 * CONTEXT for line in lines)
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(lines))


def test_tensorboard_gets_the_same(trained: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("eval/perplexity")}
    expected = {
        line["step"]: line["validation_perplexity"]
        for line in history(trained)
        if "validation_perplexity" in line
    }
    assert found == pytest.approx(expected)


def test_nothing_unfinished_is_left(trained: Path) -> None:
    assert not list(trained.rglob("*unfinished*"))
    assert not list(trained.rglob("*.tmp"))
    assert not (trained / "training_args.bin").exists()
    checkpoints = list_checkpoints(trained / "checkpoints")
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-6"]


def test_the_learning_rate_falls_along_the_cosine(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=20, log_every=1, warmup_fraction=0.25, min_lr_ratio=0.5)
    train(recipe, data, tmp_path / "out", progress=False)
    rates = [line["lr"] for line in history(tmp_path / "out") if "lr" in line]
    peak = rates.index(max(rates))
    assert peak in (4, 5)  # five steps of warm-up; versions log before or after the step
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.5e-2, rel=0.02)


def test_micro_batches_change_nothing_but_rounding(data: Path, tmp_path: Path) -> None:
    for micro in (1, 4):
        recipe = tiny_recipe(EXPERTS, sequences_per_micro_batch=micro)
        train(recipe, data, tmp_path / f"{micro}", progress=False)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert all(torch.allclose(one[name], four[name], atol=1e-4) for name in one)


def test_gradient_checkpointing_changes_nothing_but_rounding(data: Path, tmp_path: Path) -> None:
    for on in (False, True):
        recipe = tiny_recipe(EXPERTS, gradient_checkpointing=on)
        train(recipe, data, tmp_path / f"{on}", progress=False)
    without, with_it = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert all(torch.allclose(without[name], with_it[name], atol=1e-5) for name in without)


def test_bf16_computes_in_bfloat16_over_float32_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = set()
    compute_loss = RecipeTrainer.compute_loss

    def spy(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        hook = model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda module, inputs, output: dtypes.add(output.dtype)
        )
        try:
            return compute_loss(self, model, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(RecipeTrainer, "compute_loss", spy)
    recipe = tiny_recipe(EXPERTS, precision="bf16")
    summary = train(recipe, data, tmp_path / "out", progress=False)
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert summary.validation_loss is not None
    assert summary.validation_loss < 5


def test_without_held_out_text_there_is_no_validation(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = make_data(tmp_path_factory.mktemp("all"), validation=0.0)
    summary = train(tiny_recipe(), data, tmp_path / "out", progress=False)
    assert (summary.validation_loss, summary.validation_perplexity) == (None, None)
    assert "no text was held out" in summary.in_words()


def test_a_finished_run_says_so_and_does_nothing(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    again = train(tiny_recipe(EXPERTS), data, trained)
    assert again == TrainingSummary.load(trained / "summary.json")
    assert "finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


# --- the parts ----------------------------------------------------------------------------------


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others() -> None:
    recipe = tiny_recipe(EXPERTS)
    state = torch.random.get_rng_state()
    one, two = (build_model(recipe, 320).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_model(tiny_recipe(EXPERTS, seed=1), 320).state_dict()
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_weights_are_drawn_with_the_recipes_deviation() -> None:
    recipe = tiny_recipe(EXPERTS)
    recipe = replace(recipe, model=replace(recipe.model, init_std=0.3, hidden_size=128))
    model = build_model(recipe, 320)
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p.numel() > 10_000]
    assert len(matrices) > 10
    assert all(float(matrix.detach().std()) == pytest.approx(0.3, rel=0.1) for matrix in matrices)


def test_experts_of_a_recipe_are_attached() -> None:
    experts = {"num_experts": 2, "kind": "swiglu", "size": 48, "layers": [1]}
    settings = build_model(tiny_recipe(experts), 320).lookup_settings
    assert (settings.num_experts, settings.expert_size, settings.layers) == (2, 48, (1,))
    assert settings.expert_kind == "swiglu"


def test_a_dense_model_is_all_resident() -> None:
    counts = count_parameters(build_model(tiny_recipe(), 320))
    assert counts.total == counts.trained == counts.resident


def test_the_vocabulary_is_the_tokenizers_rounded_up_unless_stated() -> None:
    recipe = tiny_recipe()
    assert with_vocabulary(recipe, 300).model.vocab_size == 320
    assert with_vocabulary(recipe, 320).model.vocab_size == 320
    stated = replace(recipe, model=replace(recipe.model, vocab_size=301))
    assert with_vocabulary(stated, 300).model.vocab_size == 301
    assert with_vocabulary(stated, 302).model.vocab_size == 301  # the text may use few of them


def test_only_matrices_decay() -> None:
    model = build_model(tiny_recipe(EXPERTS), 320)
    decaying = set(RecipeTrainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    others = {name for name, _ in model.named_parameters()} - decaying
    assert "lm_head.weight" in decaying
    assert {name.split(".")[-1] for name in decaying if "lookup_experts" in name} == {
        "up_proj",
        "down_proj",
        "weight",  # of the router
    }
    assert "model.embed_tokens.weight" in others
    assert all("norm" in name or name == "model.embed_tokens.weight" for name in others)
    assert not any("norm" in name for name in decaying)


def test_every_pass_shows_every_sequence_once_in_another_order(data: Path) -> None:
    sequences = TokenDataset(TokenShards(data), CONTEXT)
    count = len(sequences)
    order = ShuffledSequences(sequences, 3 * count, seed=7)
    places = [order.place(index) for index in range(3 * count)]
    passes = [places[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    # A place depends on nothing but its number and the seed.
    jumped = ShuffledSequences(sequences, 3 * count, seed=7)
    assert [jumped.place(i) for i in (2 * count, 3, count + 1)] == [
        places[i] for i in (2 * count, 3, count + 1)
    ]
    assert [ShuffledSequences(sequences, count, 8).place(i) for i in range(count)] != passes[0]
    assert torch.equal(order[5]["input_ids"], sequences[places[5]]["input_ids"])


def test_a_rate_is_tokens_over_seconds() -> None:
    assert tokens_per_second(300, 1.5) == 200
    assert tokens_per_second(300, 0) == 0


def test_the_stopwatch_leaves_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 17.0, 18.5])
    monkeypatch.setattr("lookup_experts.training.history.perf_counter", lambda: next(times))
    watch = Stopwatch(100.0)
    watch.lap()  # 2 s of training
    watch.skip()  # 5 s of validation
    watch.lap()  # 1.5 s of training
    assert watch.seconds == 103.5


def test_durations_are_in_hours_minutes_seconds() -> None:
    assert format_duration(3723.4) == "1:02:03"
    assert format_duration(None) == "-"


# --- what is refused ----------------------------------------------------------------------------


def test_another_recipe_in_the_same_folder(data: Path, trained: Path) -> None:
    with pytest.raises(UserError, match=r"training.learning_rate was 0.01, is 0.02"):
        train(tiny_recipe(EXPERTS, learning_rate=2e-2), data, trained, progress=False)
    with pytest.raises(UserError, match=r"model.experts.num_experts was 3, is None"):
        train(tiny_recipe(), data, trained, progress=False)


def test_other_data_in_the_same_folder(other_data: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="another data: train was"):
        train(tiny_recipe(EXPERTS), other_data, trained, progress=False)


def test_a_folder_with_other_things_in_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not empty.*config.json"):
        train(tiny_recipe(), data, tmp_path, progress=False)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_file_as_the_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(tiny_recipe(), data, tmp_path / "out", progress=False)


def test_two_processes_in_one_folder(data: Path, tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "out").locked(),
        pytest.raises(UserError, match="Another process"),
    ):
        train(tiny_recipe(), data, tmp_path / "out", progress=False)


def test_data_that_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mole prepare"):
        train(tiny_recipe(), tmp_path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("context", [600, 100_000])
def test_text_shorter_than_the_context(data: Path, tmp_path: Path, context: int) -> None:
    """The training text, or the held-out text alone."""
    context = TokenShards(data, "validation").num_tokens + 1 if context == 600 else context
    with pytest.raises(UserError, match="at least as many"):
        train(tiny_recipe(context_length=context), data, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_share_a_step_evenly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookup_experts.training.trainer.num_processes", lambda: 3)
    with pytest.raises(UserError, match="3 processes"):
        train(tiny_recipe(), data, tmp_path / "out", progress=False)


def test_accelerate_is_missing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookup_experts.training.train.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lookup-experts\[train\]"):
        train(tiny_recipe(), data, tmp_path / "out", progress=False)


def break_loss_from(step: int, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    compute_loss = RecipeTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        return loss * factor if self.model.training and self.state.global_step >= step else loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", broken)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    break_loss_from(3, monkeypatch, factor)
    with pytest.raises(UserError, match=r"at step 4; at step 2 all was finite.*checkpoint-2"):
        train(tiny_recipe(EXPERTS), data, tmp_path / "out", progress=False)
    assert [p.name for p in list_checkpoints(tmp_path / "out/checkpoints")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(tiny_recipe(EXPERTS), data, tmp_path / "out", progress=False).steps == 6


def test_a_gradient_that_is_not_finite_stops_before_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is still finite; the weights after it are not."""
    clip = RecipeTrainer._clip_grad_norm

    def broken(self: Any, model: Any) -> Any:
        if self.state.global_step == 3:
            model.lm_head.weight.grad.fill_(float("nan"))
        return clip(self, model)

    monkeypatch.setattr(RecipeTrainer, "_clip_grad_norm", broken)
    with pytest.raises(UserError, match="norm of the gradient is nan at step 4"):
        train(tiny_recipe(), data, tmp_path / "out", progress=False)
    assert [p.name for p in list_checkpoints(tmp_path / "out/checkpoints")] == ["checkpoint-2"]


# --- full disks ---------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_told_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**6))
    with pytest.raises(DiskFullError, match=r"3 checkpoints and the model need about 1.48 MB"):
        train(tiny_recipe(), data, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_gets_full_keeps_the_checkpoint_before_and_the_run_goes_on(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets full after the weights of the second checkpoint were written."""
    save, calls = torch.save, []

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(file)
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "out"
    with pytest.raises(DiskFullError, match=r"checkpoint-2, is kept"):
        train(tiny_recipe(EXPERTS), data, out, progress=False)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    train(tiny_recipe(EXPERTS), data, out, progress=False)
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1.5 MB: two checkpoints fit, not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    data: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However torch and safetensors put it."""
    monkeypatch.setattr("lookup_experts.training.train.check_disk_space", lambda *args: None)
    with pytest.raises(DiskFullError, match=r"disk of .* is full"):
        train(tiny_recipe(keep_checkpoints=9), data, small_disk / "out", progress=False)
    complete = list_checkpoints(small_disk / "out/checkpoints")
    assert complete
    assert set((small_disk / "out/checkpoints").iterdir()) == set(complete)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe(EXPERTS).to_yaml())
    return path


def test_the_command_prints_one_json_object(
    data: Path, tmp_path: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", data, "--out", tmp_path / "out", "--set", "training.steps=2", "--json"]
    code, out, err = run_command(capsys, "train", recipe_file, *arguments)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out/summary.json").read_text())
    assert "Step 2: validation loss" in err
    assert "perplexity" in err


def test_the_command_says_what_came_out(
    data: Path, trained: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_command(capsys, "train", recipe_file, "--data", data, "--out", trained)
    assert code == 0
    assert "validation loss" in out
    assert "finished already" in err


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("no-such-recipe", [], "Unknown recipe"),
        (None, ["--set", "training.step=3"], "Did you mean 'training.steps'"),
        (None, ["--set", "model.vocab_size=64"], "embedding has rows for the ids below 64 only"),
        (None, ["--data", "nowhere"], "has no weight"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    data: Path,
    tmp_path: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str | None,
    options: list[str],
    words: str,
) -> None:
    arguments = [recipe or recipe_file, "--data", data, "--out", tmp_path / "out", *options]
    code, out, err = run_command(capsys, "train", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
