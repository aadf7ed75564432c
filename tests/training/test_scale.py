"""Several processes: whole copies and shards, the same curve, kills, and going on as others."""

import json
from pathlib import Path

import processes_together
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_data, tiny_recipe

from lookup_experts.training.train import train

EXPERTS = {"num_experts": 3}
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
