"""Training a mixture of experts, and lookup experts with auxiliary losses, by `mole train`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CONTEXT, make_data, tiny_recipe

from lookup_experts.generation.inspection import inspect_folder
from lookup_experts.model.moe import MoeGatelessLlamaForCausalLM
from lookup_experts.training.data import TokenDataset, TokenShards
from lookup_experts.training.models import build_model, count_parameters
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.train import TrainingSummary, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("moe"))


def moe_recipe(moe: dict[str, Any] | None = None, **training: Any) -> Recipe:
    values = tiny_recipe(**training).to_dict()
    values["model"]["moe"] = {"num_experts": 4, **(moe or {})}
    return Recipe.from_dict(values)


def training_lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_the_folder_is_the_model_and_its_validation_loss_is_the_language_models(
    data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    # Losses so heavy that a validation loss with them would be another.
    recipe = moe_recipe({"load_balance_loss": 1.0, "z_loss": 1.0}, validate_sequences=1000)
    summary = train(recipe, data, tmp_path / "out", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is MoeGatelessLlamaForCausalLM
    held_out = TokenDataset(TokenShards(data, "validation"), CONTEXT)
    batch = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    assert summary.validation_loss == pytest.approx(loss, abs=1e-5)
    assert summary.parameters.resident == summary.parameters.total
    described = inspect_folder(tmp_path / "out")
    assert (described["form"], described["moe"]["num_experts"]) == ("moe", 4)
    assert described["parameters"]["resident"] == summary.parameters.total
    assert described["parameters"]["active"] == summary.parameters.active
    json.dumps(described)


@pytest.mark.parametrize("kind", ["moe", "experts"])
def test_the_history_has_the_losses_apart(kind: str, data: Path, tmp_path: Path) -> None:
    coefficients = {"load_balance_loss": 1.0, "z_loss": 0.5}
    if kind == "moe":
        recipe = moe_recipe(coefficients, steps=8)
    else:
        recipe = tiny_recipe({"num_experts": 4, **coefficients}, steps=8)
    summary = train(recipe, data, tmp_path / "out", progress=False)
    lines = training_lines(tmp_path / "out")
    assert lines[0]["loss"] < 6.5  # ln 320 is 5.8; the auxiliary losses would add at least 2
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert summary.training_loss == lines[-1]["loss"]
    selected = 2 if kind == "moe" else 1
    assert all(line["load_balance_loss"] > selected * 0.98 for line in lines)
    # Four logits near 0 have a z-loss of ln(4) squared, 1.92; training pushes it down.
    assert 1.2 < lines[0]["z_loss"] < 2
    assert lines[-1]["z_loss"] < 0.5


def test_without_coefficients_lookup_experts_have_no_auxiliary_losses(
    data: Path, tmp_path: Path
) -> None:
    train(tiny_recipe({"num_experts": 2}, steps=2), data, tmp_path / "out", progress=False)
    assert all("z_loss" not in line for line in training_lines(tmp_path / "out"))


def test_gradient_checkpointing_and_accumulation_change_nothing_but_rounding(
    data: Path, tmp_path: Path
) -> None:
    """The z-loss is a mean over positions, so micro batches add up to the whole."""
    heavy = {"load_balance_loss": 0.0, "z_loss": 1.0}
    recipe = moe_recipe(heavy)
    found = []
    for number, changes in enumerate(
        ({}, {"gradient_checkpointing": True}, {"sequences_per_micro_batch": 4})
    ):
        changed = replace(recipe, training=replace(recipe.training, **changes))
        train(changed, data, tmp_path / str(number), progress=False)
        found.append(load_file(tmp_path / str(number) / "model.safetensors"))
    for other in found[1:]:
        for name, weight in found[0].items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-4)


def test_two_experts_of_half_the_size_are_as_many_parameters_as_the_dense_ffn() -> None:
    dense, moe, mole = (
        count_parameters(build_model(recipe, 320))
        for recipe in (tiny_recipe(), moe_recipe(), tiny_recipe({"num_experts": 3}))
    )
    assert dense.active == dense.total
    assert moe.active - dense.total == 2 * 4 * 32  # the routers of two layers
    assert moe.total - moe.active == 2 * 2 * 2 * 32 * 32  # layers, experts, up and down
    assert mole.active == mole.resident == dense.total + 2 * 3 * 32
    shared = count_parameters(build_model(moe_recipe({"shared_size": 64}), 320))
    assert shared.active - moe.active == 2 * 2 * 32 * 64


def test_a_summary_from_before_there_were_mixtures_of_experts(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    summary = train(tiny_recipe(steps=2), data, out, progress=False)
    values = json.loads((out / "summary.json").read_text())
    del values["parameters"]["active"]
    (out / "summary.json").write_text(json.dumps(values))
    assert TrainingSummary.load(out / "summary.json") == summary
