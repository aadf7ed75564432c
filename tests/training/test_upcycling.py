"""Lookup experts on models that are trained already: the command, its runs, what it refuses."""

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

import pytest
import torch
from fake_hub import MODEL, serve_hub
from run_command import run_command
from safetensors.torch import load_file
from tiny_models import logits_of, tiny_model, token_ids
from tiny_runs import CONTEXT, make_data, make_text, tiny_recipe

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.training.checkpoints import last_checkpoint
from lookup_experts.training.recipe import load_recipe
from lookup_experts.training.train import train
from lookup_experts.training.trainer import RecipeTrainer
from lookup_experts.training.upcycling import UpcycleRecipe, for_backbone, upcycled_model

SETTINGS = [
    f"training.context_length={CONTEXT}",
    "training.steps=6",
    "training.sequences_per_step=4",
    "training.sequences_per_micro_batch=2",
    "training.learning_rate=1e-2",
    "training.precision=fp32",
    "training.log_every=1",
    "training.checkpoint_every=2",
    "training.validate_sequences=1000",
]


def recipe(*settings: str) -> UpcycleRecipe:
    return load_recipe("upcycle", [*SETTINGS, *settings], kind=UpcycleRecipe)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dense run. Tests only read it."""
    out = tmp_path_factory.mktemp("dense") / "out"
    train(tiny_recipe(steps=30), data, out, progress=False)
    return out


@pytest.fixture(scope="module")
def upcycled(data: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with frozen backbone, saved in full. Tests only read it."""
    out = tmp_path_factory.mktemp("upcycled") / "out"
    train(for_backbone(recipe(), str(dense)), data, out, progress=False)
    return out


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """The optimizers of the runs in a test."""
    made: list[torch.optim.Optimizer] = []
    create = RecipeTrainer.create_optimizer

    def record(self: Any, model: Any = None) -> torch.optim.Optimizer:
        made.append(create(self, model))
        return made[-1]

    monkeypatch.setattr(RecipeTrainer, "create_optimizer", record)
    return made


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


# --- the beginning ------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["nothing", "all"])
def test_before_the_first_step_it_is_the_backbone_to_the_bit(dense: Path, trained: str) -> None:
    model = upcycled_model(for_backbone(recipe(), str(dense), trained=trained)).eval()
    ids = token_ids(3, CONTEXT, vocab_size=300)
    assert torch.equal(logits_of(model, ids), logits_of(le.load(dense), ids))


def test_a_frozen_backbone_keeps_its_dtype_and_experts_are_float32(
    dense: Path, tmp_path: Path
) -> None:
    le.load(dense, dtype="bfloat16").save_pretrained(tmp_path)
    chosen = for_backbone(recipe("training.precision=bf16"), str(tmp_path))
    model = upcycled_model(chosen).eval()
    dtypes = {".lookup_experts." in name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    ids = token_ids(3, CONTEXT, vocab_size=300)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(model, ids), logits_of(le.load(tmp_path), ids))
    thawed = upcycled_model(for_backbone(chosen, str(tmp_path), trained="all"))
    assert {p.dtype for p in thawed.parameters()} == {torch.float32}


# --- what comes out -----------------------------------------------------------------------------


def test_the_backbone_stays_and_the_experts_learn(dense: Path, upcycled: Path) -> None:
    before, after = weights(dense), weights(upcycled)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(after[n].any() for n in after if n.endswith("routed.down_proj"))
    one, two = (json.loads((out / "summary.json").read_text()) for out in (dense, upcycled))
    assert two["validation_loss"] < one["validation_loss"]
    trained = sum(t.numel() for n, t in after.items() if ".lookup_experts." in n)
    assert two["parameters"]["trained"] == trained


@pytest.mark.timeout(180)
def test_a_backbone_by_its_name_on_the_hub(data: Path, dense: Path, tmp_path: Path) -> None:
    """The real client, and a hub on this machine: the experts name it and fold beside it."""
    mole = Path(sys.executable).with_name("mole")
    out, folded = tmp_path / "out", tmp_path / "folded"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    with serve_hub(dense) as environment:
        for command in (
            ["upcycle", MODEL, "--data", data, "--out", out, "--save", "experts", *settings],
            ["reparameterize", out, folded, "--encoding", "float32"],
        ):
            done = subprocess.run(
                [str(word) for word in (mole, *command)],
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
                env={**environment, "HF_HOME": str(tmp_path / "cache")},
            )
            assert done.returncode == 0, done.stderr
    settings = json.loads((out / "config.json").read_text())["lookup_experts"]
    assert settings["backbone"]["name"] == MODEL
    assert not any(".mlp." in name and "lookup_experts" not in name for name in weights(out))
    by_folder = tmp_path / "by-folder"
    train(for_backbone(recipe(), str(dense), save="experts"), data, by_folder, progress=False)
    ids = token_ids(3, CONTEXT, vocab_size=300)
    expected = logits_of(le.load(by_folder), ids)
    torch.testing.assert_close(logits_of(le.load(folded), ids), expected, rtol=1e-4, atol=1e-4)


def test_only_what_is_trained_has_optimizer_state(
    data: Path, dense: Path, tmp_path: Path, optimizers: list[Any]
) -> None:
    chosen = for_backbone(recipe(), str(dense), num_experts=1, layers="1")
    summary = train(chosen, data, tmp_path / "out", progress=False)
    moments = [state["exp_avg"] for state in optimizers[0].state.values()]
    assert sum(tensor.numel() for tensor in moments) == summary.parameters.trained
    # A layer: a router, the norm, and two matrices for the one expert.
    assert summary.parameters.trained == 32 + 32 + 2 * 32 * 64
    checkpoint = last_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size < 12 * summary.parameters.trained + 100_000, size  # with everything else of it


@pytest.mark.parametrize("trained", ["ffn", "all"])
def test_a_trained_backbone_has_its_own_learning_rate(
    data: Path, dense: Path, tmp_path: Path, optimizers: list[Any], trained: str
) -> None:
    chosen = for_backbone(recipe(), str(dense), trained=trained, learning_rate=1e-3)
    train(chosen, data, tmp_path / "out", progress=False)
    rates = [group["initial_lr"] for group in optimizers[0].param_groups]
    assert set(rates) == {1e-2, 1e-3}
    assert rates[0] == 1e-2  # the one that the history shows
    before, after = weights(dense), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    ffns = {name for name in before if ".mlp." in name}
    assert changed == (ffns if trained == "ffn" else set(before))


def test_without_experts_the_backbone_is_trained_further(
    data: Path, dense: Path, tmp_path: Path
) -> None:
    chosen = for_backbone(recipe(), str(dense), num_experts=0, trained="ffn", learning_rate=1e-2)
    summary = train(chosen, data, tmp_path / "out", progress=False)
    assert set(weights(tmp_path / "out")) == set(weights(dense))
    assert summary.parameters.trained == 2 * 2 * 32 * 64
    before = json.loads((dense / "summary.json").read_text())
    assert summary.validation_loss is not None
    assert summary.validation_loss < before["validation_loss"]


def test_a_mixture_with_a_stream_is_cut_by_the_tokenizer_of_the_model(
    data: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"t": make_text(n, 60)}) + "\n" for n in range(9)))
    where = ["--data", f"{data}=0.5", "--data", f"stream:{rows}=0.5", "--text-field", "t"]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    out = tmp_path / "out"
    code, _, errors = run_command(capsys, "upcycle", dense, *where, "--out", out, *settings)
    assert code == 0, errors
    given = [source["tokenizer"] for source in json.loads((out / "data.json").read_text()).values()]
    assert given == [json.loads((data / "manifest.json").read_text())["tokenizer"]["hash"]] * 2


def test_saved_as_experts_it_is_the_same_model(
    data: Path, dense: Path, upcycled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(for_backbone(recipe(), str(dense), save="experts"), data, out, progress=False)
    assert (out / "model.safetensors").stat().st_size < (
        (upcycled / "model.safetensors").stat().st_size
        - (dense / "model.safetensors").stat().st_size
        + 4096
    )
    ids = token_ids(3, CONTEXT, vocab_size=300)
    expected = logits_of(le.load(upcycled), ids)
    assert torch.equal(logits_of(le.load(out), ids), expected)
    le.reparameterize(out, tmp_path / "table", encoding="float32")
    torch.testing.assert_close(logits_of(le.load(tmp_path / "table"), ids), expected)


def test_killed_it_comes_to_the_same_bits(
    data: Path, dense: Path, upcycled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, killed for real after a checkpoint and then given again."""
    out = tmp_path / "out"
    command = ["upcycle", dense, "--data", data, "--out", out]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    mole = Path(sys.executable).with_name("mole")
    process = subprocess.Popen(
        [str(part) for part in (mole, *command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while last_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    code, stdout, stderr = run_command(capsys, *command, "--json")
    assert code == 0, stderr
    assert "Going on after step" in stderr
    assert (out / "model.safetensors").read_bytes() == (upcycled / "model.safetensors").read_bytes()
    summary = json.loads(stdout)
    expected = json.loads((upcycled / "summary.json").read_text())
    for timing in ("seconds", "tokens_per_second"):
        summary.pop(timing), expected.pop(timing)
    assert summary == expected


# --- what is refused ----------------------------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    """Only the model of a run folder."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target


def test_another_tokenizer(dense: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "other")
    tokenizer = other / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    model = copied(dense, tmp_path / "model")
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another tokenizer.*than that of .*model"):
        train(for_backbone(recipe(), str(model)), other, tmp_path / "out", progress=False)


def test_the_same_tokenizer_written_otherwise_is_fine(
    data: Path, dense: Path, tmp_path: Path
) -> None:
    model = copied(dense, tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content))  # on one line
    chosen = for_backbone(recipe("training.steps=1"), str(model))
    assert train(chosen, data, tmp_path / "out", progress=False).steps == 1


def test_no_tokenizer(data: Path, dense: Path, tmp_path: Path) -> None:
    model = copied(dense, tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        train(for_backbone(recipe(), str(model)), data, tmp_path / "out", progress=False)


def with_tokenizer(folder: Path, data: Path, **config: Any) -> Path:
    tiny_model("llama", **config).save_pretrained(folder)
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, folder)
    return folder


def test_more_token_ids_than_the_embedding_has_rows(data: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tmp_path / "model", data, vocab_size=200)
    with pytest.raises(UserError, match=r"Document 1 of the train text.*below 200 only"):
        train(for_backbone(recipe(), str(model)), data, tmp_path / "out", progress=False)


def test_sequences_longer_than_the_model_takes(data: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tmp_path / "model", data, vocab_size=320, max_position_embeddings=8)
    with pytest.raises(UserError, match=r"context_length is 16, but .* takes at most 8"):
        train(for_backbone(recipe(), str(model)), data, tmp_path / "out", progress=False)


def test_experts_upon_experts(data: Path, upcycled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has lookup experts already"):
        train(for_backbone(recipe(), str(upcycled)), data, tmp_path / "out", progress=False)


def test_a_backbone_that_changed_since_the_run_began(
    data: Path, dense: Path, tmp_path: Path
) -> None:
    model = copied(dense, tmp_path / "model")
    short = recipe("training.steps=1")
    train(for_backbone(short, str(model)), data, tmp_path / "out", progress=False)
    (tmp_path / "out" / "summary.json").unlink()
    tiny_model("llama", vocab_size=320).save_pretrained(model)
    with pytest.raises(UserError, match=r"another recipe: backbone\.fingerprint was"):
        train(for_backbone(short, str(model)), data, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_experts": 0}, "There is nothing to train"),
        ({"trained": "ffn", "save": "experts"}, "save: experts leaves the backbone out"),
        ({"num_experts": 0, "layers": "0"}, "says where experts go, but there are none"),
        ({"trained": "some"}, r"Unknown value of backbone\.trained 'some'"),
        ({"learning_rate": -1.0}, r"backbone\.learning_rate is -1\.0; expected a number above 0"),
        ({"save": "all"}, "Unknown value of save 'all'"),
    ],
)
def test_choices_that_contradict(dense: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        for_backbone(recipe(), str(dense), **choices)


def test_choices_that_only_go_together(dense: Path) -> None:
    chosen = for_backbone(recipe("save=experts"), str(dense), trained="ffn", save="full")
    assert (chosen.backbone.trained, chosen.save) == ("ffn", "full")


def said_to_be_quantised(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantised_backbone_is_not_saved(dense: Path, tmp_path: Path) -> None:
    model = said_to_be_quantised(copied(dense, tmp_path / "model"))
    with pytest.raises(UserError, match="quantised, so its experts are saved without it"):
        for_backbone(recipe(), str(model))
    assert for_backbone(recipe(), str(model), save="experts").save == "experts"


def test_the_package_of_a_quantised_backbone_is_missing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    model = said_to_be_quantised(copied(dense, tmp_path / "model"))
    with pytest.raises(UserError, match=r"can't be loaded.*pip install.*bitsandbytes"):
        upcycled_model(for_backbone(recipe(), str(model), save="experts"))


def test_recipes_of_the_other_command(
    data: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data", data, "--out", tmp_path / "out"]
    code, _, errors = run_command(capsys, "train", "upcycle", *where)
    assert (code, "is a recipe for `mole upcycle`" in errors) == (2, True)
    code, _, errors = run_command(capsys, "upcycle", dense, *where, "--recipe", "dense-tiny")
    assert (code, "is a recipe for `mole train`" in errors) == (2, True)
    code, _, errors = run_command(capsys, "upcycle", tmp_path / "nothing", *where)
    assert (code, "No such folder" in errors) == (2, True)
    code, _, errors = run_command(capsys, "upcycle", dense, *where, "--recipe", "upcicle")
    assert (code, "Did you mean 'upcycle'?" in errors) == (2, True)


def test_a_folder_with_a_run_of_the_other_command(data: Path, dense: Path, tmp_path: Path) -> None:
    out = copied(dense, tmp_path / "out")
    (out / "summary.json").unlink()
    with pytest.raises(UserError, match="is a recipe for `mole train`"):
        train(for_backbone(recipe(), str(dense)), data, out, progress=False)


def test_the_recipe_survives_its_file(dense: Path, tmp_path: Path) -> None:
    chosen = for_backbone(recipe(), str(dense), layers="every:2", trained="all")
    (tmp_path / "recipe.yaml").write_text(chosen.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml", kind=UpcycleRecipe) == chosen
    assert chosen.experts == replace(chosen.experts, layers=(0,))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_backbone(data: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = tmp_path / "plain"
    tiny_model("llama", vocab_size=320, hidden_size=64, intermediate_size=128).save_pretrained(
        plain
    )
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    how = BitsAndBytesConfig(**(how if kind == "nf4" else {"load_in_8bit": True}))
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how)
    model.save_pretrained(tmp_path / "model")
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "model")
    chosen = for_backbone(
        recipe("training.precision=bf16"), str(tmp_path / "model"), save="experts"
    )
    summary = train(chosen, data, tmp_path / "out", progress=False)
    assert summary.validation_loss is not None
    lines = map(json.loads, (tmp_path / "out/history.jsonl").read_text().splitlines())
    untrained = next(line["loss"] for line in lines if "loss" in line)
    assert summary.training_loss < untrained
    assert summary.validation_loss < untrained
    assert le.load(tmp_path / "out").is_quantized
