"""Several processes: whole copies and shards, the same curve, kills, and going on as others."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes_together
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_runs import make_data, make_text, tiny_recipe

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.training import sharding
from lookup_experts.training.checkpoints import last_checkpoint
from lookup_experts.training.models import build_model, build_without_weights
from lookup_experts.training.recipe import load_recipe
from lookup_experts.training.sources import TrainingData
from lookup_experts.training.train import train
from lookup_experts.training.upcycling import UpcycleRecipe, for_backbone

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
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


@pytest.mark.slow
def test_torchrun_trains_what_one_process_does(data: Path, alone: Path, tmp_path: Path) -> None:
    """The command of the documentation."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    out = tmp_path / "out"
    done = processes_together.launch(
        *(Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2"),
        *("-m", "lookup_experts.cli", "train", tmp_path / "recipe.yaml"),
        *("--data", data, "--out", out, "--json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads((out / "summary.json").read_text())
    assert_same_run(out, alone)


@pytest.mark.slow
def test_a_configuration_for_accelerate_shards(data: Path, alone: Path, tmp_path: Path) -> None:
    """As the launcher tells it to two processes."""
    told = processes_together.told_by_accelerate(CONFIGURATIONS / "fsdp2.yaml", tmp_path)
    out = tmp_path / "out"
    processes_together.run(RECIPE, data, out, 2, told=told)
    assert (out / "model.safetensors.index.json").exists()  # which only shards write
    assert_same_run(out, alone)


def test_three_processes_train_what_one_does(data: Path, alone: Path, tmp_path: Path) -> None:
    processes_together.run(RECIPE, data, tmp_path / "out", 3, shard=True)
    assert_same_run(tmp_path / "out", alone)


def test_copies_that_share_expert_outputs_train_what_one_process_does(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    """Each evaluates its experts once for its three micro batches of a step."""
    recipe = replace(RECIPE, training=replace(RECIPE.training, share_expert_outputs=True))
    processes_together.run(recipe, data, tmp_path / "out", 2)
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
        assert all(process.is_alive() for process in started)
        time.sleep(0.005)


LONGER = tiny_recipe(EXPERTS, sequences_per_step=12, steps=14, log_every=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def longer_alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longer run of one process. Tests only read it."""
    out = tmp_path_factory.mktemp("longer-alone") / "out"
    train(LONGER, data, out, progress=False)
    return out


@pytest.mark.parametrize(
    ("shard", "rank", "goes_on_as"),
    [
        (True, 1, [(3, True), (2, False), (1, False)]),
        (False, 0, [(1, False)]),
        pytest.param(True, 0, [(1, False)], marks=pytest.mark.slow),
        pytest.param(False, 1, [(2, True)], marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_others_and_any_number_goes_on(
    data: Path,
    longer_alone: Path,
    tmp_path: Path,
    shard: bool,
    rank: int,
    goes_on_as: list[tuple[int, bool]],
) -> None:
    """One of two, shards or copies; the run goes on as so many processes, shards or copies."""
    killed = tmp_path / "killed"
    started = processes_together.start(LONGER, data, killed, 2, shard=shard)
    wait_for_line(killed, 4, started)
    os.kill(started[rank].pid, signal.SIGKILL)
    assert started.wait(30) == ([-signal.SIGKILL, 1] if rank == 0 else [1, -signal.SIGKILL])
    assert last_checkpoint(killed / "checkpoints") is not None
    assert not (killed / "summary.json").exists()

    for number, shards in goes_on_as:
        out = tmp_path / f"{number}-{shards}"
        shutil.copytree(killed, out)
        if number == 1:
            train(LONGER, data, out, progress=False)
        else:
            processes_together.run(LONGER, data, out, number, shard=shards)
        assert_same_run(out, longer_alone, tolerance=1e-4)


def test_a_run_of_one_process_on_a_stream_goes_on_in_shards(data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": make_text(n, 60)}) + "\n" for n in range(30)))
    mixture = TrainingData([f"{data}=0.6", f"stream:{rows}=0.4"])
    alone, out = tmp_path / "alone", tmp_path / "out"
    train(RECIPE, mixture, alone, progress=False)
    shutil.copytree(alone, out)
    (out / "summary.json").unlink()
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints/checkpoint-6")
    processes_together.run(RECIPE, mixture, out, 2, shard=True)
    assert_same_run(out, alone)


# --- an existing model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, beside which the experts are float32, and one matrix for embedding and head."""
    folder = tmp_path_factory.mktemp("backbone")
    model = tiny_model("llama", vocab_size=320, tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, folder)
    return folder


UPCYCLE = [
    *(f"training.{key}" for key in ("context_length=16", "steps=3", "sequences_per_step=4")),
    *(f"training.{key}" for key in ("sequences_per_micro_batch=2", "learning_rate=1e-2")),
    *(f"training.{key}" for key in ("log_every=1", "checkpoint_every=2", "precision=bf16")),
]


@pytest.fixture(scope="module")
def upcycled(data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process. Tests only read it."""
    out = tmp_path_factory.mktemp("upcycled") / "out"
    recipe = load_recipe("upcycle", UPCYCLE, kind=UpcycleRecipe)
    train(for_backbone(recipe, str(backbone)), data, out, progress=False)
    return out


def test_copies_upcycle_as_one_process_does(
    data: Path, backbone: Path, upcycled: Path, tmp_path: Path
) -> None:
    """With the other configuration for accelerate."""
    recipe = for_backbone(load_recipe("upcycle", UPCYCLE, kind=UpcycleRecipe), str(backbone))
    told = processes_together.told_by_accelerate(CONFIGURATIONS / "ddp.yaml", tmp_path)
    processes_together.run(recipe, data, tmp_path / "out", 2, told=told)
    assert (tmp_path / "out/model.safetensors").exists()  # which shards don't write
    assert_same_run(tmp_path / "out", upcycled, tolerance=1e-3)


@pytest.mark.parametrize("save", ["full", "experts"])
def test_shards_upcycle_as_one_process_does(
    data: Path, backbone: Path, upcycled: Path, tmp_path: Path, save: str
) -> None:
    recipe = for_backbone(
        load_recipe("upcycle", UPCYCLE, kind=UpcycleRecipe), str(backbone), save=save
    )
    out = tmp_path / "out"
    processes_together.run(recipe, data, out, 2, shard=True)
    if save == "full":
        assert_same_run(out, upcycled, tolerance=1e-3)
        return
    assert all(".lookup_experts." in name for name in weights(out))
    found, expected = (le.load(path, dtype="float32").state_dict() for path in (out, upcycled))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-2)


def test_a_quantised_backbone_is_not_sharded(backbone: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(backbone, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("upcycle", UPCYCLE, kind=UpcycleRecipe)
    chosen = for_backbone(recipe, str(folder), save="experts")
    with pytest.raises(UserError, match="quantised models can't be sharded"):
        train(chosen, data, tmp_path / "out", shard=True, progress=False)


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
