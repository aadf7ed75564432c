"""Mixtures and streams in a run: who comes when, going on, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_command import run_command
from tiny_runs import make_data, make_text, tiny_recipe

from lookup_experts.errors import UserError
from lookup_experts.training import order, streams
from lookup_experts.training.order import MixedSequences, share_out
from lookup_experts.training.prepare import prepare
from lookup_experts.training.sources import SourceName, TrainingData
from lookup_experts.training.tokenizer import load_tokenizer
from lookup_experts.training.train import train

RECIPE = tiny_recipe({"num_experts": 2})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [make_text(number, 60) for number in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Numbered:
    """Gives the numbers that it is asked for."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(index)}


def test_every_source_has_its_share_and_comes_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "BLOCK_SEQUENCES", 20)
    mixed = MixedSequences([Numbered(), Numbered(), Numbered()], [5, 3, 2], 70, seed=1)
    places = [mixed.place(index) for index in range(70)]
    for source, share in enumerate((10, 6, 4)):
        numbers = [number for chosen, number in places if chosen == source]
        assert numbers == list(range(len(numbers)))
        for block in range(3):
            within = places[20 * block : 20 * block + 20]
            assert sum(chosen == source for chosen, _ in within) == share
    assert [s for s, _ in places[:20]] != [s for s, _ in places[20:40]]
    for index in (0, 1, 19, 20, 33, 69):
        taken = [sum(s == source for s, _ in places[:index]) for source in range(3)]
        assert mixed.taken(index) == taken
        assert int(mixed[index]["input_ids"]) == places[index][1]
    # A place depends on nothing but its number and the seed.
    jumped = MixedSequences([Numbered()] * 3, [5, 3, 2], 70, seed=1)
    assert [jumped.place(index) for index in (66, 3)] == [places[66], places[3]]
    other = MixedSequences([Numbered()] * 3, [5, 3, 2], 70, seed=2)
    assert [other.place(index) for index in range(70)] != places


def test_shares_are_whole_and_nearest() -> None:
    assert share_out(10, [0.7, 0.3]).tolist() == [7, 3]
    assert share_out(10, [1, 1, 1]).sum() == 10
    with pytest.raises(UserError, match=r"weight of 1e-09 .* less than one sequence in 10,000"):
        share_out(10_000, [1, 1e-9])


def test_names_and_weights(tmp_path: Path) -> None:
    odd = tmp_path / "a=1"
    odd.mkdir()
    assert SourceName.parse("d=0.7") == SourceName("d", 0.7)
    assert SourceName.parse("stream:owner/name:config=2") == SourceName(
        "stream:owner/name:config", 2.0
    )
    assert SourceName.parse(odd) == SourceName(str(odd), None)  # it exists
    assert SourceName.parse("a=b") == SourceName("a=b", None)
    for bad in ("d=0", "d=-1", "d=nan", "d=inf"):
        with pytest.raises(UserError, match="expected a number above 0"):
            SourceName.parse(bad)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mixed", [True, False])
def test_a_run_on_streams_goes_on_to_the_same_bits(
    data: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    monkeypatch.setattr(streams, "BATCH_ROWS", 2)
    names = [f"{data}=0.6", f"stream:{rows}=0.4"] if mixed else [f"stream:{rows}"]
    tokenizer = None if mixed else data / "tokenizer"
    recipe = tiny_recipe({"num_experts": 2}, keep_checkpoints=5)
    out = tmp_path / "out"
    summary = train(recipe, TrainingData(names, tokenizer), out, progress=False)
    assert (summary.validation_loss is not None) == mixed  # what is streamed is not held out
    assert (out / "tokenizer.json").exists()

    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "summary.json").unlink()
    for step in (4, 6):
        shutil.rmtree(again / f"checkpoints/checkpoint-{step}")
    position = json.loads((again / "checkpoints/checkpoint-2/data.json").read_text())
    assert list(position) == ["1" if mixed else "0"]
    train(recipe, TrainingData(names, tokenizer), again, progress=False)
    assert weights(again) == weights(out)
    if mixed:
        with pytest.raises(UserError, match="another data"):
            other = TrainingData([f"{data}=0.5", f"stream:{rows}=0.5"])
            train(recipe, other, again, progress=False)


def test_held_out_text_of_a_mixture_is_shared_by_weight(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(data, folder)
    mixed = TrainingData([f"{data}=3", f"{folder}=1"])
    held_out: Any = mixed.held_out(tiny_recipe(validate_sequences=8).training)
    assert [len(part) for part in held_out.datasets] == [6, 2]


def test_keys_that_change_no_result_may_change_when_a_run_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train(RECIPE, data, out, progress=False)
    before = weights(out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints/checkpoint-6")
    changed = tiny_recipe(
        {"num_experts": 2}, log_every=1, checkpoint_every=1, keep_checkpoints=1, validate_every=5
    )
    train(changed, data, out)
    assert "training.log_every was 2, is 1 from here on." in capsys.readouterr().err
    assert weights(out) == before
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 5, 6]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-6"]
    with pytest.raises(UserError, match=r"training.weight_decay was 0.1, is 0.2\."):
        train(tiny_recipe({"num_experts": 2}, weight_decay=0.2, log_every=7), data, out)


@pytest.fixture(scope="module")
def other_tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same text, prepared with another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "tokenizer")
    options: dict[str, Any] = {"validation": 0.2, "num_workers": 1}
    texts = data.parent / "texts"
    prepare([texts], tokenizer=folder / "tokenizer", out=folder / "data", **options)
    return folder / "data"


def test_tokenizers_that_differ_are_refused(
    data: Path, rows: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="different tokenizers"):
        TrainingData([f"{data}=1", f"{other_tokenizer}=1"])
    with pytest.raises(UserError, match="different tokenizers"):
        TrainingData([f"{other_tokenizer}=1", f"stream:{rows}=1"], data / "tokenizer")
    # A run that goes on with the text of another tokenizer.
    train(tiny_recipe(steps=1), data, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="another data: tokenizer was"):
        train(tiny_recipe(steps=1), other_tokenizer, tmp_path / "out", progress=False)


@pytest.mark.parametrize("swapped", [True, False])
def test_shards_whose_tokenizer_was_swapped_or_removed_are_refused(
    data: Path,
    other_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    swapped: bool,
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(folder / "tokenizer")
    if swapped:
        shutil.copytree(other_tokenizer / "tokenizer", folder / "tokenizer")
    out = tmp_path / "out"
    code, _, errors = run_command(capsys, "train", "mole-tiny-4e", "--data", folder, "--out", out)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert ("is not the one" if swapped else "is missing") in errors
    assert not out.exists()


def test_what_else_is_refused(data: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="has no weight"):
        TrainingData([data, f"stream:{rows}"])
    with pytest.raises(UserError, match="name its --tokenizer"):
        TrainingData([f"stream:{rows}"])
    with pytest.raises(UserError, match="--tokenizer is for streams"):
        TrainingData([data], data / "tokenizer")


def test_a_mixture_of_folders_is_no_stream(data: Path) -> None:
    training = RECIPE.training
    mixed: Any = TrainingData([f"{data}=1", f"{data}=1"]).sequences(training)
    found = np.stack([mixed[index]["input_ids"].numpy() for index in range(len(mixed))])
    assert found.shape == (training.num_sequences, training.context_length)
    assert mixed.position(5) == {}
