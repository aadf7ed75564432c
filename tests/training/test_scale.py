"""Several processes: whole copies and shards, the same curve, kills, and going on as others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes_together
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_data, tiny_recipe

from lookup_experts.errors import UserError
from lookup_experts.training import sharding
from lookup_experts.training.checkpoints import last_checkpoint
from lookup_experts.training.models import build_model, build_without_weights
from lookup_experts.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERTS = {"num_experts": 3}
# On a busy machine, where several processes share a core, they take their time.
pytestmark = pytest.mark.timeout(400)
# 12 sequences are cut evenly among 1, 2 and 3 processes with 2 at once.
RECIPE = tiny_recipe(EXPERTS, sequences_per_step=12, log_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process. Tests only read it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(RECIPE, data, out, progress=False)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = sorted(out.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def losses(out: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    kinds = ("loss", "validation_loss")
    return {(line["step"], kind): line[kind] for line in lines for kind in kinds if kind in line}


def assert_same_run(out: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same curve and weights but for the order in which gradients are summed."""
    assert losses(out) == pytest.approx(losses(expected), rel=tolerance)
    one, two = weights(out), weights(expected)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=10 * tolerance)
    assert (out / "config.json").read_text() == (expected / "config.json").read_text()


@pytest.mark.parametrize(("number", "shard"), [(2, False), (2, True), (3, True)])
def test_several_processes_train_what_one_does(
    data: Path, alone: Path, tmp_path: Path, number: int, shard: bool
) -> None:
    processes_together.run(RECIPE, data, tmp_path / "out", number, shard=shard)
    assert_same_run(tmp_path / "out", alone)


def test_mixed_precision_and_recomputation_over_shards(data: Path, tmp_path: Path) -> None:
    """bfloat16 rounds each micro batch's sum differently, so the curves agree less."""
    recipe = tiny_recipe(
        EXPERTS, sequences_per_step=12, log_every=1, precision="bf16", gradient_checkpointing=True
    )
    train(recipe, data, tmp_path / "alone", progress=False)
    processes_together.run(recipe, data, tmp_path / "out", 2, shard=True)
    assert_same_run(tmp_path / "out", tmp_path / "alone", tolerance=1e-3)


def wait_for_line(out: Path, step: int, started: list[Any]) -> None:
    """Until the history tells of a step."""
    history = out / "history.jsonl"
    while not (history.exists() and f'"step": {step},' in history.read_text()):
        assert any(process.is_alive() for process in started)
        time.sleep(0.005)


def test_a_killed_process_ends_the_others_and_any_number_goes_on(
    data: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """From shards of two to shards of three, to copies of two, and to one."""
    recipe = tiny_recipe(EXPERTS, sequences_per_step=12, steps=24, log_every=1)
    train(recipe, data, tmp_path / "alone", progress=False)
    killed = tmp_path / "killed"
    started = processes_together.start(recipe, data, killed, 2, shard=True)
    wait_for_line(killed, 5, started)
    os.kill(started[1].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    for process in started:
        process.join(60)
    assert time.monotonic() - killed_at < 30
    assert started[1].exitcode == -signal.SIGKILL
    assert started[0].exitcode == 1
    last = last_checkpoint(killed / "checkpoints")
    assert last is not None
    assert not (killed / "summary.json").exists()

    for name, number, shard in (("three", 3, True), ("copies", 2, False), ("one", 1, False)):
        out = tmp_path / name
        shutil.copytree(killed, out)
        if number == 1:
            train(recipe, data, out, progress=False)
        else:
            processes_together.run(recipe, data, out, number, shard=shard)
        assert_same_run(out, tmp_path / "alone", tolerance=1e-4)


def test_a_run_of_one_process_goes_on_in_shards(data: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (out / "summary.json").unlink()
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints/checkpoint-6")
    processes_together.run(RECIPE, data, out, 2, shard=True)
    assert_same_run(out, alone)


def test_accelerate_launches_the_command_with_a_configuration_of_ours(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    """Its launcher, its FSDP configuration, and `mole train` in two processes."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    configuration = REPOSITORY / "recipes/accelerate/fsdp2.yaml"
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", configuration, "--num_processes", "2"),
            *("-m", "lookup_experts.cli", "train", tmp_path / "recipe.yaml"),
            *("--data", data, "--out", out, "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads((out / "summary.json").read_text())
    assert (out / "model.safetensors.index.json").exists()  # which only shards write
    assert_same_run(out, alone)


# --- the parts ----------------------------------------------------------------------------------


def test_a_large_model_is_written_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = build_model(RECIPE, 320)
    monkeypatch.setattr(sharding, "MAX_FILE_BYTES", 50_000)
    sharding.write_sharded_model(model, tmp_path / "out", writes=True)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_model_is_built_without_memory_for_its_weights() -> None:
    """71 billion parameters; in float32 they would take 285 GB."""
    recipe = tiny_recipe({"num_experts": 16})
    sizes = replace(recipe.model, hidden_size=4096, ffn_size=16384, num_layers=32)
    model = build_without_weights(replace(recipe, model=sizes), 50304)
    assert sum(parameter.numel() for parameter in model.parameters()) > 70e9
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_other_kinds_of_sharding_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        sharding.take_over_from_launcher()


def test_shards_need_the_processes_of_torchrun(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun --nproc-per-node"):
        train(RECIPE, data, tmp_path / "out", shard=True, progress=False)
