"""A tokenizer that puts a token before every text: documents begin so wherever text becomes tokens.

And one that owns ids beyond the embedding's rows: text that doesn't use them trains.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_command import run_command
from tiny_models import tiny_model
from tiny_runs import CONTEXT, make_text, make_tokenizer, tiny_recipe
from tiny_texts import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lookup_experts.errors import UserError
from lookup_experts.evaluation.text import read_token_ids
from lookup_experts.training import sections
from lookup_experts.training.data import TokenDataset, TokenShards
from lookup_experts.training.inputs import find_inputs
from lookup_experts.training.prepare import prepare
from lookup_experts.training.sources import TrainingData
from lookup_experts.training.streams import RowStream, StreamedSequences
from lookup_experts.training.tokenizer import bos_token_ids, load_tokenizer, vocabulary_size
from lookup_experts.training.train import train

MOLE = Path(sys.executable).with_name("mole")
BEGIN, END, MORE = "<|begin|>", "<|end|>", "<|picture|>"
SETTINGS = [
    word
    for setting in (
        f"training.context_length={CONTEXT}",
        "training.steps=4",
        "training.sequences_per_step=4",
        "training.sequences_per_micro_batch=2",
        "training.precision=fp32",
        "training.validate_every=2",
        "training.checkpoint_every=2",
        "training.validate_sequences=1000",
    )
    for word in ("--set", setting)
]


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("bos") / "tokenizer", BEGIN, [MORE])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Documents, one of them empty, one with the token that begins a text written out."""
    texts = [make_text(number, 60) for number in range(12)]
    texts[3], texts[5] = " ", BEGIN + texts[5]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", texts)


@pytest.fixture(scope="module")
def num_rows(bos_tokenizer) -> int:
    """Of an embedding that has one for every id but the last."""
    return vocabulary_size(load_tokenizer(str(bos_tokenizer))) - 1


@pytest.fixture(scope="module")
def backbone(bos_tokenizer, num_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "model"
    shutil.copytree(bos_tokenizer, folder)
    tiny_model("llama", vocab_size=num_rows).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(rows, bos_tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare([rows], tokenizer=bos_tokenizer, out=out, validation=0.3, num_workers=1)
    return out


def texts_of(rows: Path) -> list[str]:
    return [json.loads(line)["text"] for line in rows.read_text().splitlines()]


def expected_tokens(rows: Path, tokenizer_folder: Path) -> list[int]:
    """The slow reference: transformers' tokenizer on every document, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = [text.removeprefix(BEGIN) for text in texts_of(rows) if text.strip()]
    return [token for text in texts for token in [*tokenizer(text)["input_ids"], 0]]


def tokens_of(folder: Path, split: str = "train") -> list[int]:
    opened = TokenShards(folder, split)
    return opened.window(0, opened.num_tokens).tolist()


def binary(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command."""
    command = [str(MOLE), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


# --- what stands before a document ----------------------------------------------------------------


def test_what_a_tokenizer_begins_with(bos_tokenizer, tmp_path, tokenizer_folder):
    assert bos_token_ids(load_tokenizer(str(bos_tokenizer))) == [1]
    assert bos_token_ids(load_tokenizer(str(tokenizer_folder))) == []
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # No "a" in it, several tokens before a text, and one behind.
    words = Tokenizer(models.WordLevel({"[MASK]": 0, "<sop>": 1, "</s>": 2, "word": 3}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[MASK]", 0), ("<sop>", 1), ("</s>", 2)]
    words.post_processor = processors.TemplateProcessing(
        single="[MASK] <sop> $A </s>", pair="$A $B", special_tokens=special
    )
    names = {"eos_token": "</s>", "mask_token": "[MASK]", "bos_token": "<sop>"}
    assert bos_token_ids(PreTrainedTokenizerFast(tokenizer_object=words, **names)) == [0, 1]


def test_prepare_begins_documents_as_the_tokenizer_does(rows, bos_tokenizer, tmp_path):
    options = ("--tokenizer", bos_tokenizer, "--validation", 0, "--workers", 1)
    done = binary("prepare", rows, *options, "--out", tmp_path / "out")
    assert f"Each document begins with {BEGIN}, as the tokenizer begins a text." in done.stdout
    assert tokens_of(tmp_path / "out") == expected_tokens(rows, bos_tokenizer)
    told = json.loads(binary("prepare", rows, *options, "--out", tmp_path / "out", "--json").stdout)
    assert (told["bos_token_ids"], told["bos_tokens"]) == ([1], [BEGIN])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bos_token_ids"] == [1]


def test_without_bos_if_that_is_asked_for(rows, bos_tokenizer, tmp_path):
    options = ("--tokenizer", bos_tokenizer, "--validation", 0, "--workers", 1, "--no-bos")
    done = binary("prepare", rows, *options, "--out", tmp_path / "out")
    assert f"begins with its text, without the {BEGIN} that the tokenizer" in done.stdout
    found = tokens_of(tmp_path / "out")
    assert found.count(1) == 1  # the one that the text writes out
    assert [t for t in found if t != 1] == [
        t for t in expected_tokens(rows, bos_tokenizer) if t != 1
    ]
    told = json.loads(binary("prepare", rows, *options, "--out", tmp_path / "out", "--json").stdout)
    assert (told["bos_token_ids"], told["tokenizer_bos_tokens"]) == ([], [BEGIN])
    with pytest.raises(UserError, match=r"another beginning of the documents \(--no-bos\)"):
        prepare([rows], tokenizer=bos_tokenizer, out=tmp_path / "out", validation=0)


def test_a_document_in_many_sections_begins_once(bos_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "SECTION_CHARACTERS", 500)
    monkeypatch.setattr(sections, "PIECE_CHARACTERS", 900)
    (tmp_path / "a.txt").write_text(make_text(0, 1000))
    out = tmp_path / "out"
    prepare([tmp_path / "a.txt"], tokenizer=bos_tokenizer, out=out, validation=0, num_workers=1)
    found = tokens_of(out)
    assert (found[0], found.count(1), found[-1]) == (1, 1, 0)


def made_before_there_was_a_choice(folder: Path) -> None:
    """As the version before wrote manifests and jobs."""
    for name in ("manifest.json", "job.json"):
        content = json.loads((folder / name).read_text())
        content.pop("bos_token_ids", None)
        for shards in content.get("splits", {}).values():
            for shard in shards:
                shard.pop("largest_token_id", None)
        (folder / name).write_text(json.dumps(content))


def test_folders_from_before_there_was_a_choice(rows, tokenizer_folder, bos_tokenizer, tmp_path):
    for tokenizer, options in ((tokenizer_folder, {}), (bos_tokenizer, {"bos": False})):
        out = tmp_path / str(len(options))
        run = {"tokenizer": tokenizer, "out": out, "num_workers": 1}
        before = prepare([rows], **run, **options)
        made_before_there_was_a_choice(out)
        assert TokenShards(out).manifest.bos_token_ids == []
        again = prepare([rows], **run, **options)
        assert again.was_complete
        assert again.manifest.num_tokens("train") == before.manifest.num_tokens("train")
    with pytest.raises(UserError, match="another beginning of the documents"):
        prepare([rows], tokenizer=bos_tokenizer, out=out, num_workers=1)


def test_streams_and_evaluated_texts_begin_so_too(rows, bos_tokenizer):
    tokenizer = load_tokenizer(str(bos_tokenizer))
    expected = expected_tokens(rows, bos_tokenizer)
    assert read_token_ids(rows, tokenizer).tolist() == expected
    stream = TrainingData([f"stream:{rows}"], bos_tokenizer).sequences(tiny_recipe().training)
    found = torch.cat([stream[n]["input_ids"] for n in range(len(expected) // CONTEXT)]).tolist()
    assert found == expected[: len(found)]


def test_a_mixture_has_one_beginning(rows, prepared, bos_tokenizer, tmp_path):
    without = tmp_path / "without"
    prepare([rows], tokenizer=bos_tokenizer, out=without, bos=False, num_workers=1)
    with pytest.raises(UserError, match=r"begin with different tokens \(\[1\] and \[\]\)"):
        TrainingData([f"{prepared}=0.5", f"{without}=0.5"])
    for folder, begin in ((prepared, [1]), (without, [])):
        data = TrainingData([f"{folder}=0.5", f"stream:{rows}=0.5"])
        assert data.vocabulary.bos_token_ids == begin
        stream = data.identity()["source 1"]
        assert stream.get("bos_token_ids", []) == begin


def test_a_model_from_scratch_begins_as_its_text(prepared, tmp_path):
    train(tiny_recipe(steps=1), prepared, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)


# --- upcycling ------------------------------------------------------------------------------------


def loss_of(model_folder: Path, data: Path) -> float:
    """What transformers alone gives on the contexts that are held out, one by one."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    contexts = TokenDataset(TokenShards(data, "validation"), CONTEXT)
    with torch.no_grad():
        losses = [
            model(input_ids=c["input_ids"][None], labels=c["labels"][None]).loss for c in contexts
        ]
    return float(torch.stack(losses).mean())


def history_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_the_loss_before_the_first_step_is_the_backbones_own(backbone, prepared, tmp_path):
    done = binary("upcycle", backbone, "--data", prepared, "--out", tmp_path / "out", *SETTINGS)
    expected = loss_of(backbone, prepared)
    first = history_of(tmp_path / "out")[0]
    assert first["step"] == 0
    assert first["validation_loss"] == pytest.approx(expected, abs=1e-5)
    shown = f"Step 0: validation loss of the backbone as it comes {expected:.4f}"
    assert shown in done.stderr
    assert "Warning" not in done.stderr


def test_data_that_begins_otherwise_than_the_backbone_is_warned_of(
    backbone, rows, bos_tokenizer, tmp_path, capsys
):
    data, out = tmp_path / "data", tmp_path / "out"
    prepare([rows], tokenizer=bos_tokenizer, out=data, bos=False, validation=0.3, num_workers=1)
    code, _, said = run_command(
        capsys, "upcycle", backbone, "--data", data, "--out", out, *SETTINGS
    )
    assert code == 0, said
    assert f"Warning: the tokenizer of {backbone} begins a text with {BEGIN}, the documents" in said
    assert "begin with nothing" in said


def test_killed_before_a_checkpoint_the_first_loss_is_told_once(backbone, prepared, tmp_path):
    out = tmp_path / "out"
    command = ["upcycle", backbone, "--data", prepared, "--out", out, *SETTINGS]
    command += ["--set", "training.checkpoint_every=100", "--set", "training.steps=40"]
    command += ["--set", "training.validate_every=20"]
    process = subprocess.Popen(
        [str(MOLE), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "history.jsonl").exists() or not history_of(out):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    binary(*command)
    steps = [line["step"] for line in history_of(out) if "validation_loss" in line]
    assert steps == sorted(set(steps)) and steps[0] == 0


# --- ids beyond the embedding's rows --------------------------------------------------------------


@pytest.fixture(scope="module")
def picture_rows(tmp_path_factory) -> Path:
    texts = [make_text(number, 60) for number in range(12)]
    texts[7] = f"look here {MORE} " + texts[7]
    return write_rows(tmp_path_factory.mktemp("pictures") / "rows.jsonl", texts)


def test_text_that_uses_such_an_id_is_refused_with_document_and_token(
    backbone, num_rows, picture_rows, bos_tokenizer, tmp_path, capsys
):
    data, out = tmp_path / "data", tmp_path / "out"
    prepare([picture_rows], tokenizer=bos_tokenizer, out=data, validation=0, num_workers=1)
    message = (
        f"Document 8 of the train text of {data}, which begins 'look here', has the token "
        f"'{MORE}' (id {num_rows}), and the model's embedding has rows for the ids below {num_rows}"
    )
    for _ in range(2):
        command = ("upcycle", backbone, "--data", data, "--out", out, *SETTINGS)
        code, _, said = run_command(capsys, *command)
        assert code == 2
        assert message in said
        made_before_there_was_a_choice(data)  # the second time
    with pytest.raises(UserError, match=r"Document 8 of .*rows\.jsonl, has the token '<.picture"):
        read_token_ids(picture_rows, load_tokenizer(str(bos_tokenizer)), num_ids=num_rows)


def test_a_stream_names_the_row(backbone, num_rows, picture_rows, tmp_path, capsys):
    data = f"stream:{picture_rows}"
    command = ("upcycle", backbone, "--data", data, "--out", tmp_path / "out", *SETTINGS)
    code, _, said = run_command(capsys, *command)
    assert code == 2
    assert f"rows.jsonl, row 8, has the token '{MORE}' (id {num_rows})" in said


def test_from_scratch_likewise(prepared, num_rows, picture_rows, bos_tokenizer, tmp_path):
    recipe = tiny_recipe(steps=1)
    stated = {**recipe.to_dict(), "model": {**recipe.to_dict()["model"], "vocab_size": num_rows}}
    chosen = type(recipe).from_dict(stated)
    assert train(chosen, prepared, tmp_path / "fits", progress=False).steps == 1
    data = tmp_path / "data"
    prepare([picture_rows], tokenizer=bos_tokenizer, out=data, validation=0, num_workers=1)
    with pytest.raises(UserError, match=r"Document 8 .*has the token '<.picture"):
        train(chosen, data, tmp_path / "out", progress=False)


def test_a_row_stream_says_where_each_text_stands(rows):
    first = RowStream(find_inputs([str(rows)]), "text").texts(5)
    assert [text.place.rpartition(", ")[2] for text in first] == [f"row {n}" for n in (1, 2, 3, 5)]


def test_the_id_of_a_stream_is_looked_for_only_where_one_can_be(rows, bos_tokenizer):
    tokenizer = load_tokenizer(str(bos_tokenizer))
    open_rows = RowStream(find_inputs([str(rows)]), "text")
    stream = StreamedSequences(open_rows, tokenizer, CONTEXT, 4, bos=[1], num_ids=2)
    with pytest.raises(UserError, match=r"row 1, has the token .* below 2 only"):
        stream[0]
