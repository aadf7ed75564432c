"""Static rows updated one by one, against AdamW on whole gradients."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_data, tiny_recipe
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lookup_experts.errors import UserError
from lookup_experts.training.costs import costs
from lookup_experts.training.models import build_model
from lookup_experts.training.row_updates import (
    RowAdamW,
    clip_gradients,
    exchange_gradients,
    keep_whole,
    static_rows,
)
from lookup_experts.training.sharding import shard_model
from lookup_experts.training.train import train

V, R = 60, 5


class Pair:
    """The same embedding, and a matrix after it, with both optimizers."""

    def __init__(
        self, betas: tuple[float, float] = (0.9, 0.95), dtype: Any = torch.float32
    ) -> None:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Embedding(V, R), nn.Linear(R, 1))
        self.models = (whole, copy.deepcopy(whole))
        kinds: Any = (torch.optim.AdamW, lambda groups: RowAdamW(groups, [self.models[1][0]]))
        self.optimizers = [
            make(
                [
                    {"params": [*model[1].parameters()], "weight_decay": 0.1, "betas": betas},
                    {"params": [*model[0].parameters()], "weight_decay": 0.0, "betas": betas},
                ]
            )
            for make, model in zip(kinds, self.models, strict=True)
        ]

    def step(self, ids: Tensor, rate: float) -> list[Tensor]:
        """One step on ids; what each model read of them before."""
        read = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            rows = model[0](ids)
            read.append(rows.detach().clone())
            goal = (ids.float() / V).sin().unsqueeze(-1)
            optimizer.zero_grad()
            (model[1](rows) - goal).square().mean().backward()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return read


def some_ids(step: int) -> Tensor:
    """Few of the ids, frequent ones often; unique, as makers are called."""
    generator = torch.Generator().manual_seed(step)
    found = (V * torch.rand(6, generator=generator) ** 3).long()
    return found.unique()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.5, 0.9)])
def test_rows_are_where_adamw_has_them_whenever_they_are_read(betas: tuple[float, float]) -> None:
    pair = Pair(betas)
    for step in range(500):
        rate = 1e-2 * min(1, step / 20) * (1 - step / 600)
        dense, sparse = pair.step(some_ids(step), rate)
        torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=2e-4)
        if step % 150 == 70:
            check_settled(pair)
    check_settled(pair)


def check_settled(pair: Pair) -> None:
    """All of the rows and of the state, untouched ones too."""
    pair.optimizers[1].settle()
    dense, sparse = (model[0].weight for model in pair.models)
    torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=2e-4)
    states = [o.state[w] for o, w in zip(pair.optimizers, (dense, sparse), strict=True)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-2, atol=1e-6)


def test_a_step_touches_the_rows_of_its_ids_alone() -> None:
    pair = Pair()
    weight = pair.models[1][0].weight
    for step in range(5):
        ids = some_ids(step)
        before = weight.detach().clone()
        pair.step(ids, 1e-2)
        moved = (weight.detach() != before).any(dim=1).nonzero().flatten()
        assert set(moved.tolist()) <= set(ids.tolist())
    # Others move when all are settled, as they would have.
    before = weight.detach().clone()
    pair.optimizers[1].settle()
    assert bool((weight.detach() != before).any())
    settled = weight.detach().clone()
    pair.optimizers[1].settle()
    assert torch.equal(weight, settled)


def test_rows_never_seen_stay() -> None:
    pair = Pair()
    before = pair.models[1][0].weight.detach().clone()
    for _ in range(10):
        pair.step(torch.tensor([1, 2]), 1e-2)
    pair.optimizers[1].settle()
    assert torch.equal(pair.models[1][0].weight[3:], before[3:])


def test_a_settled_state_is_taken_up_bit_for_bit() -> None:
    pair = Pair()
    for step in range(40):
        pair.step(some_ids(step), 1e-2)
    pair.optimizers[1].settle()
    again = Pair()
    again.models[1].load_state_dict(pair.models[1].state_dict())
    again.optimizers[1].load_state_dict(copy.deepcopy(pair.optimizers[1].state_dict()))
    for step in range(40, 60):
        for each in (pair, again):
            each.step(some_ids(step), 1e-2)
    assert torch.equal(pair.models[1][0].weight, again.models[1][0].weight)


def test_a_first_moment_that_outlasts_the_second_is_refused() -> None:
    embedding = nn.Embedding(3, 2)
    groups = [{"params": [embedding.weight], "weight_decay": 0.0, "betas": (0.99, 0.9)}]
    with pytest.raises(UserError, match=r"betas \[0.99, 0.9\]: of static rows the first must be"):
        RowAdamW(groups, [embedding])


# ------------------------------------------------------------------------------ in training

MEKI = {"form": "meki", "row_size": 8}


def test_only_forms_with_static_rows_have_some() -> None:
    assert len(static_rows(build_model(tiny_recipe(MEKI), 300))) == 2
    assert static_rows(build_model(tiny_recipe({"num_experts": 2}), 300)) == []
    assert static_rows(build_model(tiny_recipe(), 300)) == []


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_accumulated_gradients_and_their_norm_are_those_of_the_whole(max_norm: float) -> None:
    dense, sparse = (build_model(tiny_recipe(MEKI), 300) for _ in range(2))
    rows = static_rows(sparse)
    for embedding in rows:
        embedding.sparse = True
    for seed in range(3):
        ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
        for model in (dense, sparse):
            model(input_ids=ids, labels=ids).loss.backward()
    exchange_gradients(rows)
    for embedding in rows:
        gradient: Any = embedding.weight.grad
        assert gradient.is_coalesced() and gradient.values().shape[0] <= 40
    norm = clip_gradients([*sparse.parameters()], rows, max_norm)
    expected = nn.utils.clip_grad_norm_(dense.parameters(), max_norm)
    torch.testing.assert_close(norm, expected)
    for one, two in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert two.grad is not None
        torch.testing.assert_close(two.grad.to_dense(), one.grad)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


def test_a_run_that_goes_on_gives_the_same_bits(data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(MEKI)
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(recipe, data, whole, progress=False)
    shutil.copytree(whole, part)
    for path in (part / "summary.json", part / "model.safetensors"):
        path.unlink()
    shutil.rmtree(part / "checkpoints/checkpoint-6")
    train(recipe, data, part, progress=False)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, part))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


def test_a_checkpoint_holds_what_adamw_would_have(data: Path, tmp_path: Path) -> None:
    """So it doesn't matter when checkpoints are written."""
    for every in (1, 6):
        recipe = tiny_recipe(MEKI, checkpoint_every=every)
        train(recipe, data, tmp_path / str(every), progress=False)
    one, two = (load_file(tmp_path / every / "model.safetensors") for every in ("1", "6"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("group_of_one")
def test_neither_copies_nor_shards_send_static_rows() -> None:
    model = build_model(tiny_recipe(MEKI), 300)
    rows = {embedding.weight for embedding in keep_whole(model)}
    assert len(rows) == 2
    copies = nn.parallel.DistributedDataParallel(model)
    assert rows.isdisjoint(copies._module_parameters)
    assert len(copies._module_parameters) == len([*model.parameters()]) - len(rows)

    model = build_model(tiny_recipe(MEKI), 300)
    shard_model(model, torch.device("cpu"))
    whole = {name for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert whole == {name for name, _ in model.named_parameters() if name.endswith("static.weight")}


def test_dry_runs_count_static_rows_where_they_are() -> None:
    recipe = tiny_recipe({"form": "meki", "row_size": 8, "size": 5})
    model = build_model(recipe, 300)
    total = sum(p.numel() for p in model.parameters())
    static = sum(embedding.weight.numel() for embedding in static_rows(model))
    memory = costs(recipe, 300, num_gpus=2).memory_per_gpu
    assert memory["ddp"].weights == 4 * total
    assert memory["ddp"].gradients == 4 * (total - static) == memory["ddp"].gathered
    share = -(-(total - static) // 2)
    assert memory["fsdp2"].gradients == 4 * share
    assert memory["fsdp2"].weights == 4 * (share + static)
    assert memory["fsdp2"].optimizer == 2 * memory["fsdp2"].weights
