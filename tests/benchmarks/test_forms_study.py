"""`mole bench quality --forms`: the study's parts against what the product does, and real tiny
studies, killed and taken up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from result_rows import result_rows
from tiny_runs import make_data, tiny_recipe
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks.forms.measure import measure, rare_ids
from lookup_experts.benchmarks.forms.parts import MEKI
from lookup_experts.benchmarks.forms.plan import RATES, Point, Study, best_rate, least_loss
from lookup_experts.benchmarks.forms.systems import (
    System,
    fitting_row,
    main_systems,
    meki,
    paper,
    taken_apart,
)
from lookup_experts.benchmarks.forms.training import (
    Text,
    Trainee,
    evaluate_every_id,
    forward_nats,
    learning_rates,
    train_side_by_side,
)
from lookup_experts.evaluation.perplexity import perplexity
from lookup_experts.folders.load import load
from lookup_experts.generation.folding import reparameterize
from lookup_experts.table.encoding import get_encoding
from lookup_experts.training.train import train

run = CliRunner().invoke
CPU = torch.device("cpu")
VOCAB = 320
"""Of tiny text, rounded up."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("study"))


def trainee_of(system, base, text, seed=0, rate=1e-2):
    recipe = system.recipe(
        base, tokens=base.training.num_sequences * 16, seed=seed, learning_rate=rate
    )
    model = system.build(recipe, VOCAB, CPU).train()
    evaluate_every_id(model)
    return Trainee(model, recipe, text, graph=False)


SYSTEMS = [System("dense"), System("mole", 4, 32), System("mole", 3, 7), meki(8)]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_training_is_that_of_mole_train(system, data, tmp_path):
    """Weights, order, schedule, decay, clipping: the same losses as the Trainer's."""
    base = tiny_recipe(
        steps=8, warmup_fraction=0.3, log_every=1, sequences_per_micro_batch=4, clip=0.5
    )
    text = Text.load(data, base.training, CPU)
    trainee = trainee_of(system, base, text)
    train_side_by_side([trainee])
    recipe = system.recipe(base, tokens=8 * 4 * 16, seed=0, learning_rate=1e-2)
    summary = train(recipe, data, tmp_path / "run", progress=False)
    lines = map(json.loads, (tmp_path / "run/history.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    torch.testing.assert_close(trainee.losses, torch.tensor(losses), rtol=2e-5, atol=2e-5)
    result = measure(Point(system, 512, 0, 1e-2), trainee, text, recipe.model, None)
    assert result["validation_loss"] == pytest.approx(summary.validation_loss, abs=2e-5)


@pytest.mark.parametrize("system", SYSTEMS[1:], ids=lambda system: system.name)
def test_the_whole_vocabulary_gives_the_gradients_of_the_unique_ids(system, data):
    base = tiny_recipe()
    recipe = system.recipe(base, tokens=64, seed=1, learning_rate=1e-2)
    batch = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for every_id in (False, True):
        model = system.build(recipe, VOCAB, CPU)
        if every_id:
            evaluate_every_id(model)
        forward_nats(model, batch).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7)


def test_all_parts_together_are_meki():
    base = tiny_recipe()
    batch = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    whole, parts = meki(8), System("parts", 1, 8, None, MEKI)
    recipe = whole.recipe(base, tokens=64, seed=1, learning_rate=1e-2)
    reference, model = (system.build(recipe, VOCAB, CPU) for system in (whole, parts))
    state = {
        name: value.squeeze(0) if value.dim() == 3 else value
        for name, value in model.state_dict().items()
    }
    names = {name.replace("_proj", "_proj.weight") if "routed" in name else name for name in state}
    assert {n.replace(".weight.weight", ".weight") for n in names} == set(reference.state_dict())
    reference.load_state_dict(
        {
            name.replace("_proj", "_proj.weight")
            if "routed" in name and "_proj" in name
            else name: value
            for name, value in state.items()
        }
    )
    torch.testing.assert_close(forward_nats(model, batch), forward_nats(reference, batch))


@pytest.mark.parametrize("left_out", [None, *MEKI])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_part_that_is_there_learns(left_out, num_rows):
    parts = tuple(part for part in MEKI if part != left_out)
    system = System("parts", num_rows, 8, None, parts)
    recipe = system.recipe(tiny_recipe(), tokens=64, seed=1, learning_rate=1e-2)
    model = system.build(recipe, VOCAB, CPU)
    evaluate_every_id(model)
    batch = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    forward_nats(model, batch).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    # A table gains nothing but rows.
    folded = {name for name, _ in model.named_parameters() if ".routed." in name}
    assert any("static" in name for name in folded) is ("static" in parts)
    assert any("down_proj" in name for name in folded) is ("computed" in parts)


@pytest.mark.parametrize("system", SYSTEMS[1:], ids=lambda system: system.name)
def test_folded_losses_are_those_of_a_folded_table(system, data, tmp_path):
    base = tiny_recipe(steps=8, sequences_per_micro_batch=4)
    text = Text.load(data, base.training, CPU)
    trainee = trainee_of(system, base, text)
    train_side_by_side([trainee])
    recipe = system.recipe(base, tokens=512, seed=0, learning_rate=1e-2)
    result = measure(Point(system, 512, 0, 1e-2), trainee, text, recipe.model, None)
    train(recipe, data, tmp_path / "run", progress=False)
    for table in result["tables"]:
        name = table["encoding"]
        if name not in ("bfloat16", "nf4"):
            continue
        reparameterize(tmp_path / "run", tmp_path / name, encoding=name)
        model = load(tmp_path / name, store="direct")
        assert model.expert_source.table.layout.table_bytes == table["bytes"]
        losses = [
            perplexity(model, sequence, 16, batch_size=1).nats_per_token
            for sequence in text.held_out
        ]
        assert table["validation_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_rare_ids_make_up_a_tenth_of_the_text():
    use = torch.tensor([50.0, 0.0, 5.0, 41.0, 4.0])
    assert rare_ids(use).tolist() == [False, True, True, False, True]


def test_a_fitting_row_is_the_longest():
    encoding = get_encoding("nf4")
    for width in (32, 64, 128):
        for divisor in (16, 32):
            row, budget = fitting_row(width, divisor), 2 * 4 * width // divisor
            assert encoding.layer_bytes(1, row) <= budget < encoding.layer_bytes(1, row + 4)


def test_systems_have_names_of_their_own():
    systems = [*main_systems(128), *taken_apart(128, 512)]
    assert len({system.name for system in systems}) == len(systems)
    files = {Point(system, 10, 0, 1e-3).file_name for system in systems}
    assert len(files) == len(systems)


# ------------------------------------------------------------------------------------- the plan


def loss_of(point):
    """Best at 4e-3; wide rows do more."""
    spread = {1e-3: 0.3, 2e-3: 0.1, 4e-3: 0.0, 8e-3: 0.2}[point.learning_rate]
    return 5 - point.system.row_size / 1000 + spread + point.seed / 100


def result_of(point):
    tables = [{"encoding": "nf4", "share_of_bytes": point.system.row_size / 128}]
    for table in tables:
        table["validation_loss"] = loss_of(point)
    return {"validation_loss": loss_of(point), "tables": tables if point.system.row_size else []}


def test_the_plan_goes_by_what_was_found():
    study = Study(tiny_recipe(), 1000, (3, 4))
    found, order = {}, []
    while True:
        groups, waiting = study.groups(found)
        if not groups:
            break
        order.append(groups[0])
        found |= {point: result_of(point) for point in groups[0]}
    assert waiting == 0
    assert [[point.learning_rate for point in group] for group in order[:3]] == [list(RATES)] * 3
    later = [point for group in order[3:] for point in group]
    assert {point.learning_rate for point in later} == {4e-3}
    # What the search trained already isn't trained again.
    assert Point(System("dense"), 1000, 3, 4e-3) not in later
    assert Point(System("dense"), 1000, 4, 4e-3) in later
    longer = [point for point in later if point.tokens == 5000]
    assert [point.system for point in longer[:2]] == [System("dense"), paper(32)]
    assert [point.system.row_size for point in longer[2:]] == [8, 4]
    assert all(point.seed == 3 for point in longer)


def test_neighbours_are_trained_side_by_side():
    study = Study(tiny_recipe(), 1000, (3, 4))
    alone, _ = study.groups({})
    assert [len(group) for group in alone] == [4, 4, 4]
    wide, waiting = study.groups({}, side_by_side=9)
    assert [len(group) for group in wide] == [8, 4]
    # What has begun isn't begun again, and counts as nobody's neighbour.
    rest, same = study.groups({}, under_way=wide[0], side_by_side=9)
    assert rest == wide[1:] and waiting == same
    found = {point: result_of(point) for group in wide for point in group}
    wide, _ = study.groups(found, side_by_side=9)
    whole = [point for group in study.groups(found)[0] for point in group]
    assert [point for group in wide for point in group] == whole
    assert max(map(len, wide)) > 6
    assert len(set(whole)) == len(whole)


def test_families_whose_rate_is_unknown_wait_and_others_go_on():
    study = Study(tiny_recipe(), 1000, (0, 1))
    groups, waiting = study.groups({})
    assert len(groups) == 3
    assert waiting > 0
    dense = groups[0]
    found = {point: result_of(point) for point in dense}
    assert best_rate(dense, found) == 4e-3
    groups, less = study.groups(found)
    assert {group[0].system.form for group in groups[2:]} == {"dense"}
    assert less < waiting
    assert best_rate(dense, {point: {"failed": "no number"} for point in dense}) is None


def test_the_least_loss_is_of_encodings_within_the_bytes():
    results = [
        {
            "tables": [
                {"encoding": "bfloat16", "share_of_bytes": 0.1, "validation_loss": 1 + seed},
                {"encoding": "nf4", "share_of_bytes": 0.03, "validation_loss": 2 + seed},
            ]
        }
        for seed in (0, 1)
    ]
    assert least_loss(results, 1 / 8) == 1.5
    assert least_loss(results, 1 / 32) == 2.5
    assert least_loss(results, 1 / 64) is None
    assert least_loss([{}], 1) is None


def test_the_schedule_is_the_trainers():
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    training = tiny_recipe(steps=20, warmup_fraction=0.2, min_lr_ratio=0.1).training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 4, 20, min_lr_rate=0.1)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(learning_rates(training), torch.tensor(expected))


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(tiny_recipe().to_yaml())
    return path


def command(data, base, work, *more):
    return [
        *("bench", "quality", "--forms", "--data", str(data), "--recipe", str(base)),
        *("--tokens", "300", "--seeds", "0,1", "--work", str(work / "runs")),
        *("--json", str(work / "forms.json"), *more),
    ]


def started(arguments):
    """The command in a process of its own, its messages in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "lookup_experts.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_points(process, number):
    """Let it finish so many points; gives the lines that tell of them."""
    lines = []
    for line in process.stderr:
        if ", seed " in line:
            lines.append(line)
        if len(lines) == number:
            return lines
    raise AssertionError("it ended before")


def children_of(process):
    folder = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in folder.read_text().split()]


def is_gone(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.timeout(600)  # trains some 90 models
def test_a_study_is_killed_interrupted_and_finished(data, base, tmp_path):
    arguments = command(
        data,
        base,
        tmp_path,
        "--jobs",
        "2",
        "--side-by-side",
        "5",
        "--plot",
        str(tmp_path / "forms.png"),
    )
    process = started(arguments)
    wait_for_points(process, 8)
    children = children_of(process)
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not all(map(is_gone, children)):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.1)
    points = tmp_path / "runs/points"
    kept = {path: path.stat().st_mtime_ns for path in points.glob("*.json")}
    assert len(kept) >= 8
    partial = json.loads((tmp_path / "forms.json.partial").read_text())
    assert len(partial["results"]) >= 7  # a line may come before the file

    process = started(arguments)
    wait_for_points(process, len(kept) + 6)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == cli.EXIT_INTERRUPTED
    report = json.loads((tmp_path / "forms.json").read_text())
    assert len(kept) + 6 <= len(report["results"]) < 60

    done = run(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    report = json.loads((tmp_path / "forms.json").read_text())
    assert len(report["results"]) == len(list(points.glob("*.json")))
    assert (tmp_path / "forms.png").read_bytes().startswith(b"\x89PNG")

    # Everything again is nothing but reading.
    again = run(cli.app, arguments)
    assert again.exit_code == 0, again.output
    assert {p: p.stat().st_mtime_ns for p in kept} == kept

    check_tables(report["results"])


def check_tables(results):
    rows = result_rows("forms", results)
    assert [row["system"] for row in rows[:4]] == [
        "dense",
        "dense, FFN + 8",
        "dense, FFN + 32",
        "mole-1e, r 32",
    ]
    assert all(row["seeds"] == "2" for row in rows)
    of = {row["system"]: row for row in rows}
    assert of["mole-4e, r 32"]["of MoLE-4E's gain"] == "100%"
    assert of["dense"]["gain over dense"] == "+0.0000 ± 0.0000"
    for row in result_rows("forms-budgets", results)[1:]:
        divisor = int(row["of the bytes"].removeprefix("1/"))
        assert float(row["bytes"].rstrip("%")) <= 100 / divisor + 0.05
    in_bytes = result_rows("forms-bytes", results)
    paper_row = next(r for r in in_bytes if r["bytes → of MoLE-4E's gain"] == "mole-4e, r 32")
    assert paper_row["bfloat16"].startswith("100.0% → ")
    rates = result_rows("forms-rates", results)
    assert {row["learning rate"] for row in rates} == {"dense", "mole-4e, r 32", "meki, r 8"}
    longer = result_rows("forms-longer", results)
    assert longer[0]["gain over dense"] == "mole-4e, r 32"
    assert len(longer) in (2, 3)


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_of(data, base, tmp_path):
    process = started(command(data, base, tmp_path))
    wait_for_points(process, 4)
    for child in children_of(process):
        os.kill(child, signal.SIGKILL)
    _, messages = process.communicate()
    assert process.returncode == 2
    assert "killed, as when memory runs out. Run the command again" in messages


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("dense",), "--forms names its own systems"),
        (("--ablation", "size"), "--forms names its own systems"),
        (("--device", "tpu"), "Unknown device 'tpu'"),
        (("--graphs",), "--graphs captures CUDA graphs"),
    ],
)
def test_what_makes_no_sense_is_refused(more, words, data, base, tmp_path):
    done = run(cli.app, command(data, base, tmp_path, *more))
    assert words in str(done.exception), done.output


def test_options_of_the_study_are_for_the_study(data, base, tmp_path):
    arguments = [word for word in command(data, base, tmp_path) if word != "--forms"]
    for option in (("--side-by-side", "2"), ("--device", "cpu"), ("--no-graphs",)):
        done = run(cli.app, [*arguments, *option])
        assert "is of --forms" in str(done.exception), done.output


def test_points_of_another_recipe_are_refused(data, base, tmp_path):
    (tmp_path / "runs/points").mkdir(parents=True)
    (tmp_path / "runs/points/recipe.yaml").write_text("model: {}\n")
    done = run(cli.app, command(data, base, tmp_path))
    assert "has points of another recipe" in str(done.exception), done.output


def test_a_recipe_with_experts_is_refused(data, tmp_path):
    path = tmp_path / "mole.yaml"
    path.write_text(tiny_recipe({"num_experts": 4}).to_yaml())
    done = run(cli.app, command(data, path, tmp_path))
    assert "compares forms on a dense --recipe" in str(done.exception), done.output
