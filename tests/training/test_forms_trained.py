"""Every form of rows through the commands: trained, upcycled, folded, read from disk; and the ways
to train it, which agree."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import processes_together
import pytest
import torch
from run_command import run_command
from safetensors.torch import load_file
from tiny_models import logits_of, token_ids
from tiny_runs import CONTEXT, make_data, tiny_recipe
from torch import Tensor

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.training.models import build_model, enable_gradient_checkpointing
from lookup_experts.training.recipe import load_recipe
from lookup_experts.training.train import train
from lookup_experts.training.upcycling import UpcycleRecipe, for_backbone

FORMS: list[dict[str, Any]] = [{"form": "meki", "row_size": 8}, {"num_experts": 3, "row_size": 8}]
MEKI = FORMS[0]
VOCAB = 300
IDS = token_ids(3, CONTEXT, vocab_size=VOCAB)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short dense run, with something left to learn. Tests only read it."""
    out = tmp_path_factory.mktemp("dense") / "out"
    train(tiny_recipe(steps=3), data, out, progress=False)
    return out


# --- the commands ----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, out, err = run_command(capsys, *arguments)
    assert code == 0, err
    return out


@pytest.mark.parametrize("experts", FORMS)
def test_trained_folded_and_generated_from_disk(
    experts: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out, folded = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "folded"
    recipe.write_text(tiny_recipe().to_yaml())
    settings = [w for k, v in experts.items() for w in ("--set", f"model.experts.{k}={v}")]
    summary = json.loads(
        run(capsys, "train", recipe, "--data", data, "--out", out, *settings, "--json")
    )
    run(capsys, "reparameterize", out, folded, "--encoding", "float32")
    prompt = ("--prompt", "alpha beta", "--max-new-tokens", 12, "--temperature", 0, "--json")
    told = [
        json.loads(run(capsys, "generate", *words, *prompt))
        for words in ((out,), (folded, "--store", "direct", "--cache", "4kB"))
    ]
    assert told[0]["text"] == told[1]["text"] != ""
    loaded = le.load(folded, store="direct")
    torch.testing.assert_close(
        logits_of(loaded, IDS), logits_of(le.load(out), IDS), rtol=1e-5, atol=1e-5
    )
    running = sum(weight.numel() for weight in loaded.parameters())
    assert summary["parameters"]["resident"] == running
    described = json.loads(run(capsys, "inspect", folded, "--json"))
    assert described["rows"] == {"form": experts.get("form", "mole"), "size": 8}
    assert described["parameters"]["resident"] == running


@pytest.mark.parametrize("save", ["full", "experts"])
def test_upcycled_and_folded(
    save: str, data: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the recipe with experts of the paper's form, whose number it doesn't take over."""
    out, folded = tmp_path / "out", tmp_path / "folded"
    settings = [
        *(f"training.{key}" for key in (f"context_length={CONTEXT}", "steps=20")),
        *("training.sequences_per_step=4", "training.sequences_per_micro_batch=2"),
        *("training.learning_rate=3e-2", "training.precision=fp32", "training.warmup_fraction=0"),
        "training.validate_sequences=4",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    form = ("--form", "meki", "--row-size", 8, "--save", save)
    run(capsys, "upcycle", dense, "--data", data, "--out", out, *form, *words)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in history if "validation_loss" in line]
    assert losses[-1] < losses[0]
    before = json.loads((dense / "summary.json").read_text())["validation_loss"]
    assert losses[0] == pytest.approx(before, abs=1e-6)  # step 0 is the backbone
    own = [".mlp.up_proj" in name for name in load_file(out / "model.safetensors")]
    assert any(own) == (save == "full")
    run(capsys, "reparameterize", out, folded, "--encoding", "float32")
    upcycled = le.load(out)
    assert upcycled.lookup_settings.row_form == "meki"
    torch.testing.assert_close(
        logits_of(le.load(folded, store="direct"), IDS),
        logits_of(upcycled, IDS),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--form", "meki", "--experts", 4), "num_experts is 4, but the form 'meki' has one row"),
        (("--form", "meki", "--experts", 0), "--form meki says how experts are, but --experts 0"),
        (("--row-size", 0), "row_size is 0; expected a number above 0"),
        (("--form", "mekki"), "Did you mean 'meki'"),
        (("--form", "meki", "--set", "experts.kind=gelu"), "kind is 'gelu', but the form 'meki'"),
        (("--form", "meki", "--set", "experts.num_experts=2"), "num_experts is 2, but the form"),
    ],
)
def test_what_upcycling_refuses(
    options: tuple[Any, ...],
    words: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    code, _, err = run_command(
        capsys, "upcycle", dense, "--data", tmp_path / "none", "--out", out, *options
    )
    assert code == 2 and len(err.splitlines()) == 1, err
    assert words in err
    assert not out.exists()


def test_a_chosen_form_settles_what_the_recipe_says_of_another() -> None:
    def chosen(recipe: str | Path, *overrides: str) -> Any:
        return load_recipe(recipe, [f"experts.{o}" for o in overrides], kind=UpcycleRecipe).experts

    meki = chosen("upcycle", "row_size=8", "form=meki", "layers=[1]")
    assert (meki.form, meki.row_size, meki.num_experts) == ("meki", 8, None)
    assert (meki.kind, meki.layers) == ("swiglu", (1,))
    same = chosen("upcycle", "form=mole", "row_size=8")
    assert (same.num_experts, same.row_size) == (4, 8)


def test_from_the_one_form_back_to_the_other(dense: Path, tmp_path: Path) -> None:
    recipe = load_recipe("upcycle", ["experts.form=meki"], kind=UpcycleRecipe)
    (tmp_path / "meki.yaml").write_text(recipe.to_yaml())
    overrides = ["experts.num_experts=2", "experts.form=mole"]
    back = load_recipe(tmp_path / "meki.yaml", overrides, kind=UpcycleRecipe)
    assert back.experts is not None
    assert (back.experts.num_experts, back.experts.kind) == (2, "gelu")
    with pytest.raises(UserError, match="num_experts is missing"):
        load_recipe(tmp_path / "meki.yaml", overrides[1:], kind=UpcycleRecipe)
    with pytest.raises(UserError, match="num_experts is 4, but the form 'meki'"):
        for_backbone(recipe, str(dense), num_experts=4)


# --- the ways to train it --------------------------------------------------------------------

BATCHES = [token_ids(2, 11, seed=seed, vocab_size=23) for seed in range(3)]


def gradients(experts: dict[str, Any], *, share: bool = False, checkpoint: bool = False) -> Any:
    """Every gradient of a step of accumulated micro batches."""
    model = build_model(tiny_recipe(experts), VOCAB).train()
    if checkpoint:
        enable_gradient_checkpointing(model)
    with le.shared_expert_outputs(model, BATCHES) if share else nullcontext():
        for ids in BATCHES:
            model(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def assert_same(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, gradient in exact.items():
        assert gradient.any(), name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("experts", FORMS)
@pytest.mark.parametrize(
    "way", [{"share": True}, {"checkpoint": True}, {"share": True, "checkpoint": True}]
)
def test_sharing_and_recomputing_give_the_same_gradients(
    experts: dict[str, Any], way: dict[str, bool]
) -> None:
    assert_same(gradients(experts, **way), gradients(experts))


@pytest.mark.parametrize("experts", FORMS)
def test_static_rows_and_experts_learn_in_bfloat16(experts: dict[str, Any], data: Path) -> None:
    """Autocast over float32 weights; rounding aside, the gradients of float32."""
    model = build_model(tiny_recipe(experts), VOCAB).train()
    ids = BATCHES[0]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert found[name].dtype == torch.float32
        assert (found[name] - weight.grad).norm() <= 0.1 * weight.grad.norm(), name


def assert_same_run(out: Path, expected: Path, tolerance: float = 1e-5) -> None:
    curves = [
        {
            (line["step"], kind): line[kind]
            for line in map(json.loads, (folder / "history.jsonl").read_text().splitlines())
            for kind in ("loss", "validation_loss")
            if kind in line
        }
        for folder in (out, expected)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=tolerance)
    one, two = (
        {
            name: weight
            for file in sorted(folder.glob("model*.safetensors"))
            for name, weight in load_file(file).items()
        }
        for folder in (out, expected)
    )
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=10 * tolerance)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process. Tests only read it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(tiny_recipe(MEKI, log_every=1), data, out, progress=False)
    return out


@pytest.mark.parametrize(
    ("shard", "training"),
    [
        (False, {}),
        (True, {}),
        (False, {"share_expert_outputs": True, "sequences_per_micro_batch": 1}),
        (True, {"gradient_checkpointing": True}),
    ],
)
def test_two_processes_train_what_one_does(
    shard: bool, training: dict[str, Any], data: Path, alone: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(MEKI, log_every=1, **training)
    processes_together.run(recipe, data, tmp_path / "out", 2, shard=shard)
    assert_same_run(tmp_path / "out", alone)
    le.reparameterize(tmp_path / "out", tmp_path / "folded", encoding="float32")
    torch.testing.assert_close(
        logits_of(le.load(tmp_path / "folded"), IDS),
        logits_of(le.load(alone), IDS),
        rtol=1e-3,
        atol=1e-3,
    )
