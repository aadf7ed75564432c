"""Runs that are killed or told to stop, in real processes, and what they come to when taken up."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_data, tiny_recipe

from lookup_experts.training.checkpoints import (
    UNFINISHED,
    checkpoint_step,
    last_checkpoint,
    list_checkpoints,
)
from lookup_experts.training.history import History
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.train import train

LONG = tiny_recipe({"num_experts": 2}, steps=45, checkpoint_every=3, validate_every=15, log_every=5)
# Imported once, by the server that the processes are forked from: a process starts at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lookup_experts.training.train", "torch.utils.tensorboard"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_to_the_end(LONG, data, out)
    return out


def start(recipe: Recipe, data: Path, out: Path) -> Any:
    process = processes.Process(target=train, args=(recipe, data, out), kwargs={"progress": False})
    process.start()
    return process


def run_to_the_end(recipe: Recipe, data: Path, out: Path) -> None:
    process = start(recipe, data, out)
    process.join(100)  # seconds, where the machine is busy with much else
    assert process.exitcode == 0


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    for _ in range(60_000):
        if condition() or not process.is_alive():
            return
        time.sleep(0.001)
    raise AssertionError("it took over a minute")


def has_logged(out: Path, step: int) -> bool:
    """Whether a run has begun, for step 0, or come as far as this line of its history."""
    history = out / "history.jsonl"
    return out.exists() and (
        step == 0 or (history.exists() and f'"step": {step},' in history.read_text())
    )


def without_seconds(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(out: Path, expected: Path) -> None:
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert without_seconds(out) == without_seconds(expected)
    one, two = (json.loads((path / "summary.json").read_text()) for path in (out, expected))
    for timing in ("seconds", "tokens_per_second"):
        one.pop(timing), two.pop(timing)
    assert one == two
    assert not list(out.rglob("*.tmp"))
    assert not list(out.rglob(UNFINISHED))


def test_killed_at_random_moments_it_comes_to_the_same_bits(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    chosen = random.Random(0)
    out = tmp_path / "out"
    kills = 0
    for step in (0, 6, 15, 25, 36):
        process = start(LONG, data, out)
        wait_for(partial(has_logged, out, step), process)
        time.sleep(chosen.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 4
    run_to_the_end(LONG, data, out)
    assert_same_run(out, uninterrupted)


def test_killed_while_it_writes_a_checkpoint(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(LONG, data, out)
    unfinished = out / "checkpoints" / UNFINISHED / "checkpoint-9"
    wait_for(unfinished.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert last_checkpoint(out / "checkpoints") is not None
    (out / "recipe.yaml.1.tmp").write_text("mo")  # as another kill leaves it
    run_to_the_end(LONG, data, out)
    assert_same_run(out, uninterrupted)


def test_a_checkpoint_that_is_half_written_is_never_taken_up(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """As a kill leaves it: later than the last whole one, with files that are cut off."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    (out / "summary.json").unlink()
    checkpoints = out / "checkpoints"
    newest, older = list_checkpoints(checkpoints)[::-1]
    (checkpoints / UNFINISHED).mkdir()
    newest.rename(checkpoints / UNFINISHED / newest.name)
    for file in (checkpoints / UNFINISHED / newest.name).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])
    assert last_checkpoint(checkpoints) == older
    run_to_the_end(LONG, data, out)
    assert_same_run(out, uninterrupted)


def test_killed_between_the_last_checkpoint_and_the_summary(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    for name in ("summary.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    run_to_the_end(LONG, data, out)
    assert_same_run(out, uninterrupted)


def test_killed_before_anything_but_the_recipe_was_written(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(uninterrupted / "recipe.yaml", out)
    run_to_the_end(LONG, data, out)
    assert_same_run(out, uninterrupted)


def test_a_line_of_history_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "seconds": 2.5}\n{"step": 2, "seconds": 3}\n{"step": 3, "sec')
    history = History(path, step=1)
    assert history.lines == [{"step": 1, "seconds": 2.5}]
    assert history.seconds == 2.5
    history.drop_later_lines()
    assert path.read_text() == '{"step": 1, "seconds": 2.5}\n'
    history.append({"step": 2, "loss": 1.0})
    assert History(path, step=2).last("loss") == 1.0


@pytest.mark.parametrize("keep", [1, 3])
def test_the_latest_checkpoints_are_kept(data: Path, tmp_path: Path, keep: int) -> None:
    train(tiny_recipe(steps=10, keep_checkpoints=keep), data, tmp_path / "out", progress=False)
    steps = [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path / "out/checkpoints")]
    assert steps == [2, 4, 6, 8, 10][-keep:]


def stopped_at(out: Path, uninterrupted: Path, data: Path) -> int:
    """The step of the checkpoint that a stopped run left; taken up, it comes to the same bits."""
    last = last_checkpoint(out / "checkpoints")
    assert last is not None
    run_to_the_end(LONG, data, out)
    expected = (uninterrupted / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == expected
    return checkpoint_step(last)


def test_ctrl_c_ends_the_command_with_a_checkpoint(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(LONG.to_yaml())
    mole = str(Path(sys.executable).with_name("mole"))
    process = subprocess.Popen(
        [mole, "train", str(recipe), "--data", str(data), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not has_logged(out, 3) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    step = stopped_at(out, uninterrupted, data)
    assert stderr.splitlines()[-1] == (
        f"Stopped after step {step} of 45, with a checkpoint. Run the same command again to go on."
    )


def test_sigterm_does_the_same(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(LONG, data, out)
    wait_for(partial(has_logged, out, 3), process)
    process.terminate()
    process.join()
    assert process.exitcode == 1  # an exception, where a signal that ends a process gives -15
    assert 3 <= stopped_at(out, uninterrupted, data) < 45
