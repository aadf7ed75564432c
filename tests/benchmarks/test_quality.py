"""`mole bench quality`: systems by name, real tiny runs, one report."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from result_rows import result_rows
from tiny_runs import make_data, tiny_recipe
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import quality
from lookup_experts.benchmarks.quality import (
    Pace,
    System,
    ablation_systems,
    add_up,
    in_words,
    train_all,
)
from lookup_experts.errors import UserError
from lookup_experts.training.checkpoints import checkpoint_step, last_checkpoint

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In the processes of the runs, too: tiny products only wait for a second one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(tiny_recipe().to_yaml())
    return path


@pytest.mark.parametrize(
    ("name", "section", "settings"),
    [
        ("dense", None, {}),
        ("moe-34e", "moe", {"num_experts": 34}),
        ("mole-4e", "experts", {"num_experts": 4}),
        ("mole-2e:size=16,kind=swiglu", "experts", {"num_experts": 2, "size": 16}),
    ],
)
def test_a_name_says_which_experts(name, section, settings):
    system = System.parse(name)
    assert system.section == section
    assert {key: system.settings[key] for key in settings} == settings


@pytest.mark.parametrize("name", ["", "dens", "mole", "mole-4", "mole-xe", "dense:size=3"])
def test_what_is_no_system_is_refused(name):
    with pytest.raises(UserError, match="No system is called"):
        System.parse(name)


def test_a_change_without_a_value_is_refused():
    with pytest.raises(UserError, match="key=value"):
        System.parse("mole-4e:size")


def test_systems_differ_in_nothing_but_their_experts():
    base = tiny_recipe()
    recipes = [
        System.parse(name).recipe(base, tokens=1000, seed=3, points=2).to_dict()
        for name in ("dense", "mole-4e")
    ]
    assert recipes[1]["model"].pop("experts")["num_experts"] == 4
    assert recipes[0] == recipes[1]
    assert recipes[0]["training"]["seed"] == 3
    assert recipes[0]["training"]["tokens"] == 1000


def test_every_system_of_every_ablation_is_one():
    base = tiny_recipe()
    for name in ("losses", "size", "number", "path"):
        for system in ablation_systems(name, base):
            System.parse(system).recipe(base, tokens=1000, seed=0, points=2)
    with pytest.raises(UserError, match="Did you mean 'losses'"):
        ablation_systems("loses", base)


def bench(data, base, work, *arguments):
    out = work / "quality.json"
    done = run(
        cli.app,
        [
            *("bench", "quality", *arguments, "--data", str(data), "--recipe", str(base)),
            *("--tokens", "1e3", "--work", str(work / "runs"), "--json", str(out)),
        ],
    )
    return done, out


@pytest.mark.slow
@pytest.mark.timeout(300)  # starts twelve processes
def test_runs_are_trained_once_and_added_up_over_the_seeds(data, base, tmp_path):
    plot = tmp_path / "curves.png"
    arguments = ("dense", "moe-4e", "mole-2e", "--seeds", "0,1", "--plot", str(plot))
    done, out = bench(data, base, tmp_path, *arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [result["system"] for result in report["results"]] == ["dense", "moe-4e", "mole-2e"]
    for result in report["results"]:
        assert len(result["validation_losses"]) == 2
        assert math.isclose(result["validation_loss"], sum(result["validation_losses"]) / 2)
        assert result["validation_losses"][0] != result["validation_losses"][1]
        assert result["curve"][-1][0] == result["tokens"]
    # Folding is exact: float32 experts and a float32 table give the same loss.
    assert report["results"][2]["table_difference"] < 1e-6
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = result_rows("quality", report["results"])
    assert [row["seeds"] for row in rows] == ["2", "2", "2"]
    assert all("±" in row["validation loss"] for row in rows)
    curves = result_rows("quality-curves", report["results"])
    assert list(curves[0]) == ["after", "dense", "moe-4e", "mole-2e"]
    assert curves[-1]["dense"] == f"{report['results'][0]['curve'][-1][1]:.3f}"

    # A finished run is taken as it is: nothing but the summary is looked at again.
    trained_at = (tmp_path / "runs/dense-seed0/model.safetensors").stat().st_mtime_ns
    done, again = bench(data, base, tmp_path, *arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(again.read_text())["results"] == report["results"]
    assert (tmp_path / "runs/dense-seed0/model.safetensors").stat().st_mtime_ns == trained_at


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mole-4e", "--seeds", "one"), "--seeds"),
        (("mole-4e", "--ablation", "size"), "not both"),
        (("mole-4e:sise=3",), "sise"),
        (("dense", "--plot", "curves"), "curves is no name of a picture"),
        (("dense", "--set", "model.moe={num_experts: 2}"), "on a dense --recipe"),
    ],
)
def test_bad_input_is_told_in_one_line(data, base, tmp_path, arguments, words):
    done, _ = bench(data, base, tmp_path, *arguments)
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)


def test_without_held_out_text_nothing_is_trained(base, tmp_path):
    data = make_data(tmp_path / "all", validation=0.0)
    done, _ = bench(data, base, tmp_path, "dense")
    assert isinstance(done.exception, UserError)
    assert not (tmp_path / "runs").exists()


def test_a_system_without_enough_memory_is_reported_as_such(data, tmp_path):
    said = []
    system = System.parse("moe-4e:size=10000000000000")
    (failed,) = train_all([system], [0], tiny_recipe(), data, 1000, tmp_path, said.append)
    assert failed.summary is None
    assert said[1:] == [f"{system.name}, seed 0: out of memory. The others go on."]
    (result,) = add_up([failed])
    assert in_words(result) == f"  {system.name}: out of memory"
    (row,) = result_rows("quality", [result])
    assert (row["seeds"], row["validation loss"]) == ("1", "out of memory")


@contextmanager
def killing(*occasions):
    """Kill our only child, once for each occasion: when the function of it says so."""
    done = []

    def kill_all():
        for occasion in occasions:
            while not occasion():
                time.sleep(0.002)
                if done:
                    return
            (child,) = multiprocessing.active_children()
            child.kill()

    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
        yield
    finally:
        done.append(True)
        thread.join()


@pytest.mark.slow
def test_a_killed_run_is_reported_and_the_rest_goes_on(data, tmp_path):
    work, said = tmp_path / "runs", []
    base = tiny_recipe(log_every=1)
    everything = [System.parse(name) for name in ("moe-4e", "mole-2e")]

    def compare(seeds):
        return train_all(everything, seeds, base, data, 2000, work, said.append)

    training = work / "moe-4e-seed0"
    with killing(
        lambda: any((training / "checkpoints").glob("checkpoint-*")),
        (work / "mole-2e-seed0/summary.json").exists,
    ):
        runs = compare([0, 1])
    killed = "killed, as when memory runs out"
    assert [(run.system, run.seed, run.failure) for run in runs] == [
        ("moe-4e", 0, killed),
        ("mole-2e", 0, f"the check of its table: {killed}"),
        ("moe-4e", 1, None),
        ("mole-2e", 1, None),
    ]
    assert said[:2] == [
        "Run 1 of 4: moe-4e, seed 0",
        f"moe-4e, seed 0: {killed}. The others go on.",
    ]
    assert re.fullmatch(r"Run 2 of 4: mole-2e, seed 0  ETA of all runs \d:\d\d:\d\d", said[2])
    routed, lookup = add_up(runs)
    assert (routed["seeds"], lookup["seeds"]) == ([1], [0, 1])
    assert routed["failures"] == [{"seed": 0, "why": killed}]
    assert routed["validation_loss"] == runs[2].summary.validation_loss
    assert in_words(routed).endswith(f"s each); seed 0: {killed}")
    assert lookup["table_difference"] < 1e-6
    rows = result_rows("quality", [routed, lookup])
    assert rows[0]["seeds"] == f"1; seed 0: {killed}"
    assert rows[1]["seeds"] == f"2; seed 0: the check of its table: {killed}"

    # The next call takes up what failed, and nothing else.
    trained_at = (work / "mole-2e-seed0/model.safetensors").stat().st_mtime_ns
    assert last_checkpoint(training / "checkpoints") is not None
    assert not any("failures" in result for result in add_up(compare([0])))
    assert (work / "mole-2e-seed0/model.safetensors").stat().st_mtime_ns == trained_at


@pytest.mark.slow
def test_ctrl_c_ends_the_comparison_with_a_checkpoint_and_the_next_call_goes_on(
    data, base, tmp_path
):
    work = tmp_path / "runs"
    command = [
        *(str(Path(sys.executable).with_name("mole")), "bench", "quality", "dense"),
        *("--data", str(data), "--recipe", str(base), "--tokens", "3e3", "--seeds", "0"),
        *("--work", str(work), "--set", "training.log_every=1"),
    ]
    # As in a terminal: the signal goes to all processes of the command.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    history = work / "dense-seed0/history.jsonl"
    while not (history.exists() and history.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = re.search(
        r"^Stopped after step (\d+) of 47, with a checkpoint. Run the same command again",
        stderr,
        re.M,
    )
    assert stopped and "Traceback" not in stderr
    step = checkpoint_step(last_checkpoint(work / "dense-seed0/checkpoints"))
    assert step == int(stopped[1]) < 47
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert f"Going on after step {step}." in again.stderr
    assert json.loads(again.stdout)["results"][0]["seeds"] == [0]


@pytest.mark.slow
def test_runs_at_the_same_time_give_the_same_and_finished_ones_start_nothing(
    data, tmp_path, monkeypatch
):
    systems, base, said = [System.parse(name) for name in ("dense", "mole-2e")], tiny_recipe(), []

    def compare(jobs, tokens=1000):
        folder = tmp_path / str(jobs)
        runs = train_all(systems, [0], base, data, tokens, folder, said.append, jobs)
        return [(run.curve, run.table) for run in runs]

    together = compare(2)
    assert together == compare(1)
    assert together[1][1]["table"] == pytest.approx(together[1][1]["experts"])
    assert any("mole-2e: validation loss" in line for line in said)

    def nothing(work, calls, *more):
        assert not calls
        return iter(())

    monkeypatch.setattr(quality, "in_own_processes", nothing)
    assert compare(2) == together
    with pytest.raises(UserError, match="holds a run with another recipe"):
        compare(2, tokens=2000)


def test_time_left_is_that_of_the_same_system_or_else_of_all():
    pace = Pace()
    assert pace.seconds_left([("dense", 1.0)]) is None
    pace.add("dense", 0.0, 5.0)  # was trained before: says nothing
    assert pace.seconds_left([("dense", 1.0)]) is None
    pace.add("dense", 0.5, 5.0)
    pace.add("moe", 1.0, 40.0)
    assert pace.seconds_left([("dense", 1.0), ("moe", 0.25), ("mole", 1.0)]) == 10 + 10 + 25
    assert pace.seconds_left([("dense", 0.0)]) == 0


def test_a_single_seed_has_no_spread(data, base, tmp_path):
    systems = [System.parse("dense")]
    (result,) = add_up(train_all(systems, [0], tiny_recipe(), data, 500, tmp_path, print))
    assert "validation_loss_std" not in result
    assert "(1 seed," in in_words(result)
