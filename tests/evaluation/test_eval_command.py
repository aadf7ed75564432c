"""`mole eval`: Markdown, JSON, the harness's own files, and what is refused."""

import json
import shutil
import sys

import pytest
from tiny_models import gateless_model, moe_model
from tiny_tasks import write_tasks

import lookup_experts as le
from lookup_experts import cli
from lookup_experts.errors import UserError
from lookup_experts.evaluation import run as evaluation
from lookup_experts.evaluation.summary import format_summaries

pytestmark = pytest.mark.usefixtures("brief_harness")


@pytest.fixture
def mole(monkeypatch, capsys):
    """Run `mole eval` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mole", "eval", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "data")


def test_two_models_beside_each_other(mole, training_folder, table_folder, data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out"
    arguments = (training_folder, table_folder, "--tasks", "piqa,lambada", "--data-dir", data)
    code, stdout, stderr = mole(*arguments, "--perplexity", text, "--out", out, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    experts, table = report["results"]
    assert (experts["form"], table["form"]) == ("experts", "table")
    assert experts["dtype"] == "float32"
    assert report["what"] == "eval" and {"torch", "lm-eval"} <= set(report["machine"]["versions"])
    assert experts["recall"] is None and experts["reader"] is None
    assert table["reader"]["ids_asked"] >= table["reader"]["ids_unique"] > 0
    assert experts["perplexity"]["perplexity"] == pytest.approx(table["perplexity"]["perplexity"])
    for one, other in zip(experts["tasks"]["scores"], table["tasks"]["scores"], strict=True):
        assert one["metrics"]["acc"] == other["metrics"]["acc"]
        assert one["num_rows"] == 3
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 2 and all(name.endswith(".json") for name in files)
    written = json.loads((out / files[0]).read_text())
    assert written["results"]["piqa"]["acc,none"] == experts["tasks"]["scores"][0]["metrics"]["acc"]
    assert written["n-samples"]["piqa"] == {"original": 3, "effective": 3}
    assert "samples" not in written

    lines = format_summaries(report["results"]).splitlines()
    assert lines[0].startswith(f"| task | metric | rows | {training_folder} (experts) | ")
    assert any(line.startswith("| piqa | acc_norm | 3 of 1,838 | ") for line in lines)
    assert any(line.startswith("| average of 2 | acc | ") and "±" in line for line in lines)
    assert any("perplexity on" in line for line in lines)
    assert "recall" not in stdout.replace('"recall": null', "")


def test_without_names_all_tasks(mole, training_folder, table_folder, data):
    asked = (training_folder, table_folder, "--data-dir", data, "--limit", 1)
    code, stdout, stderr = mole(*asked, "--stats", "--store", "direct")
    assert code == 0, stderr
    assert f"{training_folder}, no table" in stderr
    assert f"{table_folder}, table: direct (" in stderr and " ids asked" in stderr
    assert "| average of 8 | acc |" in stdout


def test_all_four_kinds_of_model(mole, tokenizer, training_folder, table_folder, data, tmp_path):
    for name, model in (("dense", gateless_model()), ("moe", moe_model())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = (tmp_path / "dense", tmp_path / "moe", training_folder, table_folder)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    asked = ("--tasks", "boolq,lambada", "--data-dir", data, "--perplexity", tmp_path / "text.txt")
    code, stdout, stderr = mole(*folders, *asked)
    assert code == 0, stderr
    forms = ("dense", "moe", "experts", "table")
    names = [f"{folder} ({form})" for folder, form in zip(folders, forms, strict=True)]
    tasks, text = stdout.strip().split("\n\n")
    assert tasks.startswith(f"| task | metric | rows | {' | '.join(names)} |\n")
    rows = [line.split(" | ") for line in (*tasks.splitlines()[2:], text.splitlines()[2])]
    assert [row[0] for row in rows[:2]] == ["| boolq", "| lambada"] and len(rows) == 5
    for row in rows:
        assert row[-2] == row[-1].removesuffix(" |")  # the table says what its experts say
    assert len(set(rows[-1][-4:-1])) == 3  # the three models differ


def test_recall_alone(mole, own_words):
    code, stdout, stderr = mole(own_words, "--recall")
    assert code == 0, stderr
    lines = stdout.splitlines()
    assert lines[0].startswith("| recall over | ")
    assert lines[2].startswith("| 16 tokens | ") and lines[-1] == "| chance | 12.5; -2.08 |"
    assert "average" not in stdout


@pytest.fixture
def own_words(table_folder, tmp_path):
    """The model in table form with a tokenizer of 96 whole words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefgh"
    words = [f"Ġ{a}{b}{c}" for a in letters for b in letters[:4] for c in letters[:3]]
    vocabulary = {word: number for number, word in enumerate(["<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    folder = shutil.copytree(table_folder, tmp_path / "words")
    for path in folder.glob("*token*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "hellaswg"), "Unknown task 'hellaswg'. Did you mean 'hellaswag'?"),
        (("--data-dir", "nowhere"), "--data-dir nowhere is no folder"),
        (("--limit", "0"), "--limit is 0; it must be at least 1."),
        (("--batch-size", "-1"), "--batch-size is -1; it must be at least 1."),
        (("--recall",), "words that are one token each"),
    ],
)
def test_refused(mole, table_folder, arguments, message):
    code, stdout, stderr = mole(table_folder, *arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr.splitlines()[-1]


@pytest.fixture
def loaded(monkeypatch):
    """The folders whose weights were loaded, none of which is then evaluated."""
    folders: list[str] = []

    def load(folder, **options):
        folders.append(folder)
        raise UserError("Nothing is to be loaded in this test.")

    monkeypatch.setattr(evaluation, "load", load)
    return folders


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "config.json").unlink(), "not a model folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "not a model folder"),
        (lambda folder: shutil.rmtree(folder / "table"), "table"),
        (shutil.rmtree, "No such folder"),
    ],
    ids=["no tokenizer", "damaged tokenizer", "no config", "no weights", "no table", "no folder"],
)
def test_the_second_folder_is_looked_at_before_the_first_is_evaluated(
    mole, loaded, table_folder, data, tmp_path, spoil, message
):
    spoil(second := shutil.copytree(table_folder, tmp_path / "second"))
    code, stdout, stderr = mole(table_folder, second, "--data-dir", data)
    assert (code, stdout, loaded) == (2, "", []), stderr
    assert message in stderr.splitlines()[-1]


def test_a_bare_table_is_no_model(mole, loaded, table_folder, data):
    code, _, stderr = mole(table_folder, table_folder / "table", "--data-dir", data)
    assert (code, loaded) == (2, [])
    assert "table is not a model folder" in stderr.splitlines()[-1]


def test_the_tokenizer_of_another_folder_is_looked_at_in_place_of_theirs(
    mole, loaded, table_folder, training_folder, data, tmp_path
):
    without = shutil.copytree(table_folder, tmp_path / "without")
    (without / "tokenizer.json").unlink()
    arguments = (without, "--data-dir", data, "--tokenizer")
    code, _, stderr = mole(*arguments, without)
    assert (code, loaded) == (2, []) and "has no tokenizer" in stderr.splitlines()[-1]
    mole(*arguments, training_folder)
    assert loaded == [str(without)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "is no file"),
        ("text.csv", b"one, two", "unknown file type"),
        ("text.txt", b"caf\xe9 " * 9, "is not UTF-8 text"),
        ("text.txt.gz", b"no gzip", "text.txt.gz"),
        ("text.jsonl", b'{"words": "one two"}', "no field 'text'"),
        ("empty.txt", b"", "has 0 tokens"),
    ],
)
def test_the_text_is_read_before_anything_is_evaluated(
    mole, loaded, table_folder, data, tmp_path, name, content, message
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = ("--perplexity", tmp_path / name)
    code, stdout, stderr = mole(table_folder, "--tasks", "piqa", "--data-dir", data, *text)
    assert (code, stdout, loaded) == (2, "", []), stderr
    assert message in stderr.splitlines()[-1]


def test_words_for_recall_are_looked_for_before_anything_is_evaluated(
    mole, loaded, own_words, training_folder
):
    code, stdout, stderr = mole(own_words, training_folder, "--recall")
    assert (code, stdout, loaded) == (2, "", []), stderr
    assert "words that are one token each" in stderr.splitlines()[-1]


def test_refused_folders(mole, table_folder, data):
    for arguments, message in (
        ((table_folder, table_folder, "--data-dir", data), "is given twice"),
        ((table_folder, "--data-dir", data, "--out", table_folder / "config.json"), "is a file"),
    ):
        code, stdout, stderr = mole(*arguments)
        assert (code, stdout) == (2, ""), stderr
        assert message in stderr.splitlines()[-1]


def test_what_8_bits_cost_is_said_beside_the_perplexity(mole, tokenizer, tmp_path):
    folder = tmp_path / "large"
    gateless_model(hidden_size=256, intermediate_size=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    code, plain, stderr = mole(folder, "--perplexity", text, "--json")
    assert code == 0, stderr
    expected = json.loads(plain)["results"][0]["perplexity"]
    assert "perplexity_unrounded" not in expected
    code, stdout, stderr = mole(folder, "--perplexity", text, "--weights", "int8", "--json")
    assert code == 0, stderr
    (result,) = json.loads(stdout)["results"]
    found = result["perplexity"]
    assert found["perplexity_unrounded"] == expected["perplexity"] != found["perplexity"]
    assert "int8" in result["linear_layers"]
    cost = 100 * (found["perplexity"] / expected["perplexity"] - 1)
    assert f"{expected['perplexity']:.4f} (8 bits cost {cost:+.2f} %)" in format_summaries([result])
    code, _, stderr = mole(folder, "--perplexity", text, "--weights", "int4")
    assert code == 2 and "int4" in stderr


def test_what_an_encoding_costs_against_the_resident_model(mole, tokenizer, tmp_path):
    """Tables of embeddings: exact in float32, the coarser the further off in fewer bits."""
    resident = tmp_path / "resident"
    gateless_model(tie_word_embeddings=False).save_pretrained(resident)
    tokenizer.save_pretrained(resident)
    folders = []
    for encoding in ("float32", "int8", "nf4"):
        folders.append(tmp_path / encoding)
        le.offload(resident, folders[-1], ["model.embed_tokens"], encoding, notify=lambda _: None)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    code, stdout, stderr = mole(*folders, "--perplexity", text, "--against", resident, "--json")
    assert code == 0, stderr
    results = json.loads(stdout)["results"]
    exact, int8, nf4 = (result["predictions"] for result in results)
    assert exact["reference"] == str(resident)
    assert (exact["top1_agreement"], exact["largest_logit_difference"]) == (1, 0)
    assert exact["perplexity"] == exact["reference_perplexity"]
    assert 0 < int8["kl_divergence"] < nf4["kl_divergence"] / 3
    code, stdout, stderr = mole(folders[1], "--perplexity", text, "--json")
    alone = json.loads(stdout)["results"][0]
    assert results[1]["perplexity"] == pytest.approx(alone["perplexity"])
    assert alone["predictions"] is None
    table = format_summaries(results).split("\n\n")[1].splitlines()
    assert f"against {resident} (perplexity {exact['reference_perplexity']:.4f})" in table[0]
    assert table[3].startswith("| same likeliest token | 100.00 % | ")


def test_what_8_bits_cost_is_told_in_the_windows_of_the_comparison(mole, tokenizer, tmp_path):
    """Those of a reference that takes less at once."""
    for name, context in (("large", 128), ("short", 32)):
        model = gateless_model(
            hidden_size=256, intermediate_size=512, max_position_embeddings=context
        )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    asked = (tmp_path / "large", "--perplexity", text, "--against", tmp_path / "short", "--json")
    found = []
    for more in ((), ("--weights", "int8")):
        code, stdout, stderr = mole(*asked, *more)
        assert code == 0, stderr
        found.append(json.loads(stdout)["results"][0]["perplexity"])
    exact, rounded = found
    assert exact["context"] == rounded["context"] == 32
    assert rounded["perplexity_unrounded"] == pytest.approx(exact["perplexity"], rel=1e-6)
    assert rounded["perplexity"] != exact["perplexity"]


def test_the_reference_is_looked_for_before_anything_is_evaluated(
    mole, loaded, table_folder, tmp_path
):
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 5)
    text = ("--perplexity", tmp_path / "text.txt")
    for arguments, message in (
        (("--recall", "--against", table_folder), "compares predictions on the text"),
        ((*text, "--against", tmp_path / "nowhere"), "nowhere"),
    ):
        code, stdout, stderr = mole(table_folder, *arguments)
        assert (code, stdout, loaded) == (2, "", []), stderr
        assert message in stderr.splitlines()[-1]
