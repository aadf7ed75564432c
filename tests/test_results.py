"""The tables of the README and of pages in docs/ are those of the committed JSON files."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from result_rows import result_rows

from lookup_experts.benchmarks.quality import ablation_systems
from lookup_experts.errors import UserError
from lookup_experts.evaluation.tasks import TASKS
from lookup_experts.training.recipe import load_recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'=:(,])/\w""")
REPORTS = sorted((DOCS / "results").glob("*.json"))


@pytest.fixture(scope="module")
def render_results():
    """The script `docs/render_results.py` as a module."""
    sys.path.insert(0, str(DOCS))
    try:
        import render_results

        yield render_results
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.parametrize("name", ["README.md", "results.md", "serving.md"])
def test_pages_say_what_the_files_say(render_results, name):
    (path,) = (path for path in render_results.PAGES if path.name == name)
    page = path.read_text()
    assert "<!-- results:" in page
    rendered = render_results.render(page, with_provenance=name != "README.md")
    assert rendered == page, f"{name} differs from docs/results/*.json; run `make results`."


def test_another_figure_gives_another_page(render_results, tmp_path):
    results = shutil.copytree(DOCS / "results", tmp_path / "results")
    report = json.loads((results / "decode.json").read_text())
    report["results"][1]["ratio_to_dense"] = 9.876
    (results / "decode.json").write_text(json.dumps(report))
    page = (DOCS / "results.md").read_text()
    changed = render_results.render(page, with_provenance=True, results=results)
    assert "| 9.876 |" in changed and "9.876" not in page
    assert render_results.render(changed, with_provenance=True) == page


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_a_committed_file_says_how_it_was_made_and_names_no_place(path, render_results):
    text = path.read_text()
    assert not ABSOLUTE_PATH.search(text)
    line = render_results.provenance(path.name, json.loads(text))
    assert "torch" in line and "cores" in line and ("commit" in line or "version" in line)


def test_a_table_scores_exactly_what_its_experts_do():
    """In float32, on all rows of the eight tasks, the text and the recall."""
    (experts,), (table,) = (
        json.loads((DOCS / "results" / f"{name}.json").read_text())["results"]
        for name in ("eval-mole-4e", "eval-mole-4e-table")
    )
    assert (experts.pop("form"), table.pop("form")) == ("experts", "table")
    assert (experts.pop("model"), table.pop("model")) == ("mole-4e", "mole-4e-table")
    assert experts["dtype"] == "float32"
    scores = experts["tasks"]["scores"]
    assert [score["task"] for score in scores] == list(TASKS)
    assert all(score["num_rows"] == score["official_rows"] for score in scores)
    assert experts["perplexity"] and experts["recall"]
    assert table == experts


def test_a_gpu_is_named(render_results):
    report = json.loads((DOCS / "results" / "decode.json").read_text())
    assert "GPU" not in render_results.provenance("a.json", report)
    report["machine"]["gpu"] = "some GPU"
    assert ", some GPU; " in render_results.provenance("a.json", report)


BLOCK = "<!-- results: {} -->\n<!-- /results -->\n"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (BLOCK.format("decod decode.json"), "Unknown renderer 'decod'. Did you mean 'decode'?"),
        (BLOCK.format("decode nothing.json"), "There is no nothing.json"),
        (BLOCK.format("decode"), "malformed"),
        ("<!-- results: decode decode.json -->\n" * 2 + "<!-- /results -->\n", "malformed"),
        (BLOCK.format("decode decode.json") + "<!-- /results -->\n", "malformed"),
    ],
)
def test_bad_comments_are_refused(render_results, page, message):
    with pytest.raises(UserError, match=message):
        render_results.render(page, with_provenance=True)


def test_prose_is_left_alone(render_results):
    page = "one\n" + BLOCK.format("memory memory.json") + "two | three\n"
    rendered = render_results.render(page, with_provenance=False)
    assert rendered.startswith("one\n<!-- results: memory memory.json -->\n| ")
    assert rendered.endswith("|\n<!-- /results -->\ntwo | three\n")
    assert render_results.render(rendered, with_provenance=False) == rendered


def test_columns(render_results):
    from markdown_tables import table

    rows = [{"a": 1, "b": {"c": 0.5}, "d": 7}, {"a": 2, "b": {"c": 0.25}, "d": 7}]
    columns = {"a": "{a}", "c": "{b[c]:.0%}", "d?": "{d}", "sum": lambda row: f"{row['a'] + 7}"}
    assert table(rows, columns).splitlines() == [
        "| a | c | sum |",
        "| --- | --- | --- |",
        "| 1 | 50% | 8 |",
        "| 2 | 25% | 9 |",
    ]
    assert "| a | c | d | sum |" in table([rows[0], {**rows[1], "d": 8}], columns)
    without = {key: value for key, value in rows[1].items() if key != "d"}
    assert "| 2 | 25% |  | 9 |" in table([rows[0], without], columns)
    with pytest.raises(KeyError):
        table(rows, {"nothing": "{nothing}"})


def test_what_failed_has_a_row_as_well():
    trained = {
        "system": "dense",
        "seeds": [0, 1],
        "tokens": 1000,
        "validation_loss": 5.25,
        "validation_loss_std": 0.125,
        "tokens_per_second": 10.0,
        "parameters": {"trained": 7, "resident": 7},
    }
    failed = {"system": "moe", "seeds": [0, 1], "failed": "out of memory"}
    first, second = result_rows("quality", [trained, failed])
    assert (first["validation loss"], first["resident"]) == ("5.2500 ± 0.1250", "7")
    assert (second["validation loss"], second["resident"]) == ("out of memory", "")
    assert list(result_rows("quality-curves", [trained | {"curve": [[0, 1]]}, failed])[0]) == [
        "after",
        "dense",
    ]


def test_an_ablation_stands_beside_the_papers():
    trained = {
        "seeds": [0, 1],
        "validation_loss": 5.25,
        "validation_loss_std": 0.125,
        "parameters": {"trained": 7, "resident": 7},
    }
    names = ablation_systems("size", load_recipe("dense-tiny"))
    results = [trained | {"system": name} for name in names[:2]]
    results.append({"system": names[2], "seeds": [0], "failed": "out of memory"})
    first, _, third = result_rows("ablation-size", results)
    assert list(first) == ["size", "paper, accuracy", "validation loss", "seeds",
                           "parameters, trained", "resident"]  # fmt: skip
    assert (first["size"], first["paper, accuracy"]) == ("d", "40.8")
    assert first["validation loss"] == "5.2500 ± 0.1250"
    assert (third["size"], third["validation loss"]) == ("16d", "out of memory")


@pytest.mark.parametrize("name", ["path", "losses", "size", "number"])
def test_every_system_of_an_ablation_has_a_name(name):
    loss = {"seeds": [0], "validation_loss": 5.0, "parameters": {"trained": 7, "resident": 7}}
    names = ablation_systems(name, load_recipe("dense-tiny"))
    rows = result_rows(f"ablation-{name}", [loss | {"system": system} for system in names])
    assert len(rows) == len(names)


def test_rows_of_a_prompt():
    found = {"tokens": 2048, "unique_ids": 700, "peak_bytes": 16_000_000, "rows_bytes": 48_000_000}
    (row,) = result_rows("prompt-memory", [found])
    assert (row["prompt"], row["peak"]) == ("2,048 tokens", "16 MB")


def test_no_token_no_latency():
    nothing = {"p50": None, "p95": None}
    results = [
        {"system": name, "streams": 1, "tokens_per_second": speed, "ratio_to_dense": speed / 50,
         "ttft_ms": times, "inter_token_ms": times, "requests": 3, "lost": lost, "errors": []}
        for name, speed, times, lost in (
            ("dense", 50.0, {"p50": 20.0, "p95": 30.0}, 0), ("mole", 0.0, nothing, 3))
    ]  # fmt: skip
    first, second = result_rows("serve", results)
    assert first["first token, ms, median / 95 %"] == "20 / 30"
    assert (second["first token, ms, median / 95 %"], second["lost"]) == ("", "3")
