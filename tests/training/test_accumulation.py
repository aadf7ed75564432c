"""`training.share_expert_outputs`: a run like one without it, with fewer evaluations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_command import run_command
from safetensors.torch import load_file
from tiny_runs import make_data, tiny_recipe

from lookup_experts.errors import UserError
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.training.accumulation import SharesExpertOutputs
from lookup_experts.training.recipe import load_recipe
from lookup_experts.training.train import train
from lookup_experts.training.upcycling import UpcycleRecipe

EXPERTS = {"num_experts": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of ids of every evaluation of a layer's experts in training."""
    found: list[int] = []
    outputs = LayerExperts.forward

    def noted(self: LayerExperts, normalized: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            found.append(len(normalized))
        return outputs(self, normalized)

    monkeypatch.setattr(LayerExperts, "forward", noted)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_gives_the_same_weights(
    data: Path, tmp_path: Path, evaluations: list[int], precision: str
) -> None:
    """Two micro batches per step and two layers; validations in between."""
    weights, losses, counts = [], [], []
    for share in (False, True):
        evaluations.clear()
        out = tmp_path / str(share)
        recipe = tiny_recipe(EXPERTS, share_expert_outputs=share, precision=precision, steps=4)
        losses.append(train(recipe, data, out, progress=False).validation_loss)
        weights.append(load_file(out / "model.safetensors"))
        counts.append(len(evaluations))
    assert counts == [4 * 2 * 2, 4 * 2]
    plain, shared = weights
    largest = max(float((plain[name] - shared[name]).abs().max()) for name in plain)
    # AdamW takes a full step for any gradient, so in bfloat16 the sign of a small one shows.
    assert largest < (1e-4 if precision == "fp32" else 4 * 2e-2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6 if precision == "fp32" else 1e-3)


def test_checkpointed_runs_share_too(data: Path, tmp_path: Path, evaluations: list[int]) -> None:
    recipe = tiny_recipe(EXPERTS, share_expert_outputs=True, gradient_checkpointing=True, steps=2)
    train(recipe, data, tmp_path / "out", progress=False)
    assert len(evaluations) == 2 * 2


@pytest.mark.parametrize("name", ["dense-tiny", "moe-tiny-10e"])
def test_a_recipe_without_lookup_experts_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Also where only the cost is asked for."""
    arguments = ["train", name, "--set", "training.share_expert_outputs=true"]
    out = tmp_path / "out"
    for options in (["--data", data, "--out", out], ["--dry-run"]):
        code, _, errors = run_command(capsys, *arguments, *options)
        assert code == 2
        assert "has no lookup experts whose outputs could be shared" in errors
        assert len(errors.splitlines()) == 1
    assert not out.exists()


def test_an_upcycled_model_without_experts_is_refused() -> None:
    sharing = ["training.share_expert_outputs=true", "backbone.trained=all"]
    with pytest.raises(UserError, match="has no lookup experts whose outputs could be shared"):
        load_recipe("upcycle", [*sharing, "experts=null"], kind=UpcycleRecipe)


def test_sharding_is_refused_before_anything_is_built(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, _, errors = run_command(
        *(capsys, "train", "mole-tiny-4e", "--data", data, "--out", out, "--shard"),
        *("--set", "training.share_expert_outputs=true"),
    )
    assert code == 2
    assert "needs a whole copy of the experts in each process" in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


class Steps:
    """What a Trainer does around its steps."""

    args = type("Arguments", (), {"device": "cpu"})

    def get_batch_samples(self, batches: list[dict[str, Any]]) -> Any:
        return batches, None

    def training_step(self, model: Any, inputs: dict[str, Any]) -> Any:
        return inputs["fails"] / 0


def test_an_error_within_a_step_leaves_the_model_as_it_was() -> None:
    from tiny_models import attached_model

    model = attached_model()
    source = model.expert_source
    trainer = type("Sharing", (SharesExpertOutputs, Steps), {})()
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "fails": 1}
    trainer.get_batch_samples([batch, batch])
    with pytest.raises(ZeroDivisionError):
        trainer.training_step(model, batch)
    assert model.expert_source is source


def test_micro_batches_without_ids_are_refused() -> None:
    from tiny_models import attached_model

    trainer = type("Sharing", (SharesExpertOutputs, Steps), {})()
    trainer.get_batch_samples([{"pixels": 1}])
    with pytest.raises(UserError, match="with input_ids; these have pixels"):
        trainer.training_step(attached_model(), {"pixels": 1})
