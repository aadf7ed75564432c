"""What a recipe costs, against the paper's tables, built models and what autograd keeps."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import tiny_recipe

from lookup_experts import cli
from lookup_experts.model.shared_outputs import shared_expert_outputs
from lookup_experts.training.costs import (
    Costs,
    costs,
    count,
    kept_bytes,
    prose_tokens_per_unique_id,
)
from lookup_experts.training.models import build_model, build_without_weights, count_parameters
from lookup_experts.training.recipe import Recipe, load_recipe, recipe_names

VOCAB = 50304
PAPER = [name for name in recipe_names() if "tiny" not in name]


def of(name: str, *overrides: str, **options: Any) -> Costs:
    return costs(load_recipe(name, overrides), VOCAB, **options)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    recipe = load_recipe(name)
    expected = count_parameters(build_without_weights(recipe, VOCAB))
    found = count(recipe.model, VOCAB)
    assert (found.total, found.active) == (expected.total, expected.active)
    if recipe.model.experts is not None:
        assert found.total - found.routed_experts == expected.resident


# arXiv 2503.15798, tables 2 and 3: numbers kept outside of the GPU, and loaded per token.
@pytest.mark.parametrize(
    ("name", "offloaded", "loaded"),
    [
        ("moe-160m-10e", 0.3e9, 57e6),
        ("mole-160m-4e", 1.8e9, 0.037e6),
        ("mole-160m-16e", 7.4e9, 0.15e6),
        ("moe-410m-34e", 3.4e9, 201e6),
        ("mole-410m-16e", 19.7e9, 0.39e6),
        ("moe-1b-10e", 2.7e9, 537e6),
        # The paper states 0.26 M, twice what its formula dN gives for 16 layers, and twice its own
        # 6.6 G over the vocabulary.
        ("mole-1b-4e", 6.6e9, 0.13e6),
    ],
)
def test_what_is_offloaded_is_what_the_paper_says(
    name: str, offloaded: float, loaded: float
) -> None:
    found = of(name).parameters
    assert found.offloaded_experts == pytest.approx(offloaded, rel=0.06)  # it rounds to a digit
    assert found.loaded_per_token == pytest.approx(loaded, rel=0.025)


@pytest.mark.parametrize("size", ["160m", "410m", "1b"])
def test_flops_follow_the_papers_table_1(size: str) -> None:
    """MoLE computes what dense does, with a router: 4d·D_s per layer; MoE 4d·k·D_r, the same."""
    dense, mole, moe = (
        of(name).flops_per_token.inference
        for name in (f"dense-{size}", f"mole-{size}-4e", f"moe-{size}-10e")
    )
    model = load_recipe(f"dense-{size}").model
    d, layers = model.hidden_size, model.num_layers
    assert mole - dense == layers * 4 * d * 4  # router and weighted sum, of 4 experts
    assert moe - dense == layers * 2 * d * 10  # the router
    without = of(f"dense-{size}", "model.ffn_size=1").flops_per_token.inference
    assert dense - without == layers * 4 * d * (model.ffn_size - 1)


@pytest.mark.parametrize(
    ("num_experts", "ratio", "over_unique", "over_dense"),
    [(4, 4.0, 1.95, 1.46), (16, 4.0, 2.95, None), (4, 6.9, 2.2, 1.27), (16, 6.9, 4.1, None)],
)
def test_training_flops_with_unique_ids(
    num_experts: int, ratio: float, over_unique: float, over_dense: float | None
) -> None:
    """Matrix products of the 160M shape with its head, as computed by hand."""
    short = "training.context_length=2"  # so that attention's scores don't count
    mole = of(f"mole-160m-{num_experts}e", short, tokens_per_unique_id=ratio).flops_per_token
    dense = of("dense-160m", short).flops_per_token
    per_position = mole.training_backbone + mole.training_experts_per_position
    assert per_position / mole.training == pytest.approx(over_unique, rel=0.02)
    if over_dense is not None:
        assert mole.training / dense.training == pytest.approx(over_dense, rel=0.01)
    assert dense.training == 3 * dense.inference - 3 * 12 * 4 * 768  # attends to 1, not to 2


def test_tables_have_the_sizes_of_their_format() -> None:
    found = of("mole-160m-4e")
    assert found.bytes_per_token["bfloat16"] == 72 * 1024
    assert found.table_bytes["bfloat16"] == VOCAB * 72 * 1024
    assert found.table_bytes["nf4"] / found.table_bytes["float16"] == pytest.approx(0.26, abs=0.02)
    assert of("dense-160m").table_bytes == {}


def test_prose_repeats_itself_more_in_longer_windows() -> None:
    assert prose_tokens_per_unique_id(1) == 1
    assert prose_tokens_per_unique_id(8192) == pytest.approx(4.0)
    assert 4.0 < prose_tokens_per_unique_id(16384) < 6.9
    assert prose_tokens_per_unique_id(10**9) == 33


def test_memory_is_cut_by_shards_and_not_by_copies() -> None:
    one, eight = (of("mole-1b-16e", num_gpus=number).memory_per_gpu for number in (1, 8))
    total = of("mole-1b-16e").parameters.total
    assert one["ddp"].weights + one["ddp"].gradients + one["ddp"].optimizer == 16 * total
    assert one["ddp"].gathered == one["fsdp2"].gathered == 0
    assert eight["ddp"].weights == one["ddp"].weights
    assert eight["fsdp2"].weights == pytest.approx(one["fsdp2"].weights / 8, rel=1e-6)
    assert eight["fsdp2"].total < eight["ddp"].total
    assert eight["fsdp2"].activations == one["ddp"].activations


def saved_bytes(recipe: Recipe, vocab_size: int) -> tuple[int, float]:
    """What autograd saves in a forward pass, and the tokens per unique id."""
    training = recipe.training
    model = build_model(recipe, vocab_size).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    ids = torch.randint(0, vocab_size, (training.sequences_per_micro_batch, 128))
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(s.nbytes() for s in saved.values()), ids.numel() / ids.unique().numel()


@pytest.mark.parametrize("experts", [None, {"num_experts": 3}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(
    experts: dict[str, Any] | None, precision: str
) -> None:
    recipe = tiny_recipe(experts, precision=precision, context_length=128)
    sizes = replace(recipe.model, hidden_size=64, ffn_size=256, num_layers=4)
    recipe = replace(recipe, model=sizes)
    saved, ratio = saved_bytes(recipe, 512)
    assert kept_bytes(recipe, 512, ratio) == pytest.approx(saved, rel=0.35)


def test_sharing_expert_outputs_trades_flops_for_memory() -> None:
    batches = ("training.sequences_per_step=32", "training.sequences_per_micro_batch=8")
    plain = of("mole-160m-16e", *batches)
    shared = of("mole-160m-16e", *batches, "training.share_expert_outputs=true")
    assert shared.tokens_per_unique_id == pytest.approx(
        prose_tokens_per_unique_id(32 * 2048), rel=1e-3
    )
    assert shared.flops_per_token.training_experts < plain.flops_per_token.training_experts
    assert shared.flops_per_token.training_backbone == plain.flops_per_token.training_backbone
    assert list(shared.memory_per_gpu) == ["ddp"]  # not under FSDP
    unique = 32 * 2048 / shared.tokens_per_unique_id - 8 * 2048 / plain.tokens_per_unique_id
    outputs = 2 * 16 * 768 * 12 * unique  # of the step's further ids, in bfloat16
    more = shared.memory_per_gpu["ddp"].activations - plain.memory_per_gpu["ddp"].activations
    assert more > outputs
    halved = of(
        "mole-160m-16e", *batches, "training.share_expert_outputs=true", num_gpus=2
    ).memory_per_gpu["ddp"]
    assert halved.activations < shared.memory_per_gpu["ddp"].activations
    # What the experts keep lies beside checkpoints too.
    ways = (*batches, "training.gradient_checkpointing=true")
    checkpointed = of("mole-160m-16e", *ways).memory_per_gpu["ddp"].activations
    kept = of("mole-160m-16e", *ways, "training.share_expert_outputs=true").memory_per_gpu["ddp"]
    assert kept.activations - checkpointed > outputs


def test_the_estimate_with_shared_outputs_is_near_what_is_kept() -> None:
    recipe = tiny_recipe({"num_experts": 3}, context_length=128, share_expert_outputs=True)
    sizes = replace(recipe.model, hidden_size=64, ffn_size=256, num_layers=4)
    recipe = replace(recipe, model=sizes)
    model = build_model(recipe, 512).train()
    shape = (recipe.training.sequences_per_step, 128)
    batches = torch.randint(0, 512, shape).split(recipe.training.sequences_per_micro_batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        shared_expert_outputs(model, batches),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(input_ids=batches[0], labels=batches[0], use_cache=False).loss
        forward = sum(saved.values())
        loss.backward()
        for batch in batches[1:]:
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    unique = torch.cat(batches).unique().numel()
    ratio = torch.cat(batches).numel() / unique
    sums = 4 * unique * 4 * 3 * 64  # float32, per layer, expert and number
    assert kept_bytes(recipe, 512, ratio) == pytest.approx(forward + sums, rel=0.35)


# --- the command --------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    before, sys.argv = sys.argv, ["mole", "train", *arguments]
    try:
        cli.main()
        code: Any = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_dry_run_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "mole-160m-4e", "--dry-run", "--gpus", "8")
    assert (code, err) == (0, "")
    assert "389 M trained" in out
    assert "table in nf4: 932 MB" in out
    assert "memory per GPU, 8 with fsdp2" in out
    assert "an estimate" in out
    code, out, err = run(capsys, "mole-160m-4e", "--dry-run", "--json")
    assert json.loads(out) == json.loads(json.dumps(of("mole-160m-4e").to_dict()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dense-tiny", "--dry-run"], "add --set model.vocab_size"),
        (["dense-160m", "--dry-run", "--gpus", "0"], "--gpus 0: expected at least 1"),
        (["dense-160m", "--dry-run", "--tokens-per-id", "0.5"], "expected at least 1"),
        (["dense-160m", "--data", "somewhere"], "needs --data and --out"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
