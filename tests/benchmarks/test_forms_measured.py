"""Every form of rows in the benchmarks that make tables up or build them."""

import json

import numpy as np
import pytest
from benches import bench
from result_rows import result_rows
from tiny_runs import make_data, tiny_recipe
from typer.testing import CliRunner

import lookup_experts as le
from lookup_experts import cli
from lookup_experts.benchmarks import decode, machine, memory, read
from lookup_experts.benchmarks.models import Case, dense_model
from lookup_experts.benchmarks.quality import System
from lookup_experts.errors import UserError
from lookup_experts.table.opening import open_table
from lookup_experts.training.costs import costs

MEKI = ("--form", "meki", "--row-size", 8)
NARROW = ("--experts", 2, "--row-size", 8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(decode, "SEQUENCE_STEPS", 12)
    monkeypatch.setattr(machine, "MATRIX_SIZE", 256)
    monkeypatch.setattr(machine, "LARGE_READ", 2**20)
    monkeypatch.setattr(read, "DISK_SAMPLE_BYTES", 4 * 2**20)
    monkeypatch.setattr(read, "SECONDS", 0.02)


@pytest.mark.parametrize(
    ("form", "name", "rows"),
    [
        (MEKI, "tiny-meki-r8-bfloat16", ("meki", 8)),
        (NARROW, "tiny-2e-r8-bfloat16", ("mole", 8)),
        (("--form", "meki"), "tiny-meki-bfloat16", ("meki", 64)),
        (("--row-size", 64), "tiny-4e-bfloat16", ("mole", 64)),
    ],
)
def test_steps_and_prompts_beside_dense(form, name, rows, tmp_path, ids):
    stream = ("--ids", ids, "--pairs", 2, "--cache", 0, *form)
    for what, size in (("decode", ("--batch", 2)), ("prefill", ("--tokens", 100))):
        dense, mole = bench(tmp_path, what, *stream, *size)["results"]
        assert (mole["form"], mole["row_size"]) == rows and "form" not in dense
        assert mole["ratio_to_dense"] > 0 and mole["bytes_per_step"] > 0
        assert result_rows(what, [dense, mole])
    table = open_table(tmp_path / "work" / name)
    num_experts = {"tiny-2e-r8-bfloat16": 2, "tiny-4e-bfloat16": 4}.get(name, 1)
    shape = table.layout.shape
    assert (shape.num_layers, shape.num_experts, shape.row_size) == (3, num_experts, rows[1])


def test_reading(tmp_path):
    results = bench(tmp_path, "read", "--batch", "4", *MEKI)["results"]
    assert {(result["row_size"], result["record_bytes"]) for result in results} == {(8, 3 * 8 * 2)}
    assert all(result["gb_per_second"] > 0 for result in results)


@pytest.mark.parametrize(("form", "name"), [(MEKI, "meki-r8"), (NARROW, "2e-r8")])
def test_a_table_that_was_built_is_taken(form, name, tmp_path, ids):
    (result,) = bench(tmp_path, "build", *form)["results"]
    assert result["row_size"] == 8 and result["matmul_seconds"] > 0
    built = tmp_path / "work" / f"tiny-{name}-bfloat16-built"
    assert open_table(built).layout.shape.row_size == 8
    stream = ("--ids", ids, "--pairs", 2, "--cache", 0, "--tokens", 100)
    bench(tmp_path, "prefill", *stream, *form)
    assert [path.name for path in (tmp_path / "work").glob("tiny*")] == [built.name]


@pytest.mark.parametrize(
    ("form", "numbers"), [(MEKI, 2 * 64 * 8 + 64), (NARROW, 64 * 2 + 64 * 8), ((), 4 * 64)]
)
def test_memory_tells_what_reads_the_rows(form, numbers, tmp_path, ids, monkeypatch):
    def in_this_process(what, measure, *arguments):
        return measure(*arguments)

    monkeypatch.setattr(memory, "in_fresh_process", in_this_process)
    _, mole = bench(tmp_path, "memory", "--ids", ids, *form)["results"]
    assert mole["reader_bytes"] == 3 * numbers * 2
    (prompt,) = bench(tmp_path, "memory", "--ids", ids, "--prompt", 300, *form)["results"]
    sample = len(np.unique(np.load(ids)[:300]))
    rows = {MEKI: 8, NARROW: 16}.get(form, 4 * 64)
    assert prompt["rows_bytes"] == sample * 3 * rows * 2


def test_a_case_is_what_attaching_makes():
    """The sizes that nobody named, too."""
    for case in (Case("tiny", 1, form="meki"), Case("tiny", 2, row_size=8), Case("tiny")):
        experts = {} if case.form == "meki" else {"num_experts": case.num_experts}
        attached = le.attach(dense_model(case), form=case.form, row_size=case.row_size, **experts)
        assert attached.lookup_settings == case.settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--form", "meki", "--experts", "4"), "no experts to count; leave it out"),
        (("--form", "mekki"), "Did you mean 'meki'"),
    ],
)
def test_bad_input(arguments, words, tmp_path):
    common = ["bench", "read", "--shape", "tiny", "--work", str(tmp_path)]
    done = CliRunner().invoke(cli.app, [*common, *arguments])
    assert isinstance(done.exception, UserError) and words in str(done.exception)
    done = CliRunner().invoke(cli.app, [*common, "--row-size", "0"])
    assert done.exit_code == 2 and "--row-size" in done.output


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("meki", {"form": "meki"}),
        ("meki:row_size=8,size=5", {"form": "meki", "row_size": 8, "size": 5}),
        ("mole-2e:row_size=8", {"num_experts": 2, "row_size": 8}),
    ],
)
def test_systems_of_the_quality_benchmark(name, experts):
    recipe = System.parse(name).recipe(tiny_recipe(), tokens=1000, seed=0, points=2)
    assert recipe.model.experts == tiny_recipe(experts).model.experts
    assert costs(recipe, 300).table_bytes


@pytest.mark.slow
@pytest.mark.timeout(300)  # starts a process for each run
def test_quality_trains_and_folds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "recipe.yaml").write_text(tiny_recipe().to_yaml())
    names = ["meki:row_size=8", "mole-2e:row_size=8"]
    options = {
        "--data": make_data(tmp_path / "text"),
        "--recipe": tmp_path / "recipe.yaml",
        "--work": tmp_path / "runs",
        "--json": tmp_path / "out.json",
        "--tokens": "1e3",
        "--seeds": "0",
    }
    words = [str(word) for option in options.items() for word in option]
    done = CliRunner().invoke(cli.app, ["bench", "quality", *names, *words])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["system"] for result in results] == names
    assert all(result["table_difference"] < 1e-6 for result in results)


@pytest.mark.parametrize("name", ["meki-4e", "meki:form=mole", "meki:num_experts=4"])
def test_what_is_no_system_of_a_form(name):
    with pytest.raises(UserError):
        System.parse(name).recipe(tiny_recipe(), tokens=1000, seed=0, points=2)
