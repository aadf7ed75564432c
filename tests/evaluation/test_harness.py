"""The paper's tasks by lm-evaluation-harness: against the harness's own bridge, by hand, from a
table, without network, interrupted."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_tasks import write_tasks

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.evaluation import harness, language_model
from lookup_experts.evaluation.answers import AnswerJournal, folder_identity
from lookup_experts.evaluation.harness import evaluate_tasks
from lookup_experts.evaluation.tasks import TASKS, parse_tasks

pytestmark = pytest.mark.usefixtures("brief_harness")
ROWS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "data", ROWS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"tried to reach {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def answers_of(evaluation: harness.Evaluation) -> dict[str, list]:
    """Log-likelihoods of every row's continuations, by task."""
    return {
        task: [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
        for task, samples in evaluation.harness["samples"].items()
    }


@pytest.fixture(scope="module")
def undisturbed(model, tokenizer, data, brief_harness):
    return evaluate_tasks(model, tokenizer, parse_tasks("all"), data_dir=data, batch_size=4)


def test_all_tasks_without_network(no_network, model, tokenizer, data, undisturbed):
    found = evaluate_tasks(model, tokenizer, parse_tasks("all"), data_dir=data, batch_size=4)
    assert [score.task for score in found.scores] == list(TASKS)
    assert answers_of(found) == answers_of(undisturbed)
    for score in found.scores:
        assert score.num_rows == ROWS and score.official_rows == TASKS[score.task].num_rows
        assert 0 <= score.metrics["acc"] <= 1 and score.standard_errors["acc"] >= 0
    assert {name for score in found.scores for name in score.metrics} == set(harness.METRICS)
    assert found.num_requests == ROWS * (4 + 4 + 2 + 4 + 2 + 4 + 3 + 1)
    mean, error = found.average
    accuracies = [score.metrics["acc"] for score in found.scores]
    errors = [score.standard_errors["acc"] for score in found.scores]
    assert mean == pytest.approx(sum(accuracies) / 8)
    assert error == pytest.approx(sum(each**2 for each in errors) ** 0.5 / 8)
    json.dumps(found.to_dict())


def test_as_the_harness_own_bridge_scores(model, tokenizer, data, undisturbed, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lookup_experts.evaluation.tasks import load_tasks

    manager = TaskManager(include_defaults=False)
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=load_tasks(manager, parse_tasks("all"), data, tmp_path),
        task_manager=manager,
        num_fewshot=0,
    )
    reference = harness.Evaluation([], 0, 0, results)
    for task, rows in answers_of(reference).items():
        for row, found in zip(rows, answers_of(undisturbed)[task], strict=True):
            assert found == pytest.approx(row, abs=1e-4)
    for score in undisturbed.scores:
        for metric, value in score.metrics.items():
            assert value == pytest.approx(results["results"][score.task][f"{metric},none"])


@torch.no_grad()
def test_a_row_by_hand(model, tokenizer, undisturbed):
    sample = undisturbed.harness["samples"]["social_iqa"][1]
    assert sample["doc"]["answerB"] == "table"
    context, wanted = f"Q: {sample['doc']['context']} {sample['doc']['question']}\nA:", " table"
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + wanted)["input_ids"]])
    scores = model(ids).logits.log_softmax(-1)[0]
    nats = sum(float(scores[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
    assert float(sample["resps"][1][0][0]) == pytest.approx(nats, abs=1e-4)


def test_a_table_on_disk_scores_what_its_experts_do(training_folder, table_folder, tokenizer, data):
    """All eight tasks: each accuracy exactly, log-likelihoods nearly.

    Where a matrix product sums in another order for another number of ids, as MKL's does with
    `MKL_CBWR=COMPATIBLE`, the last bits differ; elsewhere these are equal too.
    """
    experts, table = (
        evaluate_tasks(loaded, tokenizer, parse_tasks("all"), data_dir=data)
        for loaded in (le.load(training_folder), le.load(table_folder, store="direct"))
    )
    for one, other in zip(experts.scores, table.scores, strict=True):
        for metric, value in one.metrics.items():
            if metric == "perplexity":
                assert other.metrics[metric] == pytest.approx(value, rel=1e-5)
            else:
                assert other.metrics[metric] == value
    for task, rows in answers_of(experts).items():
        for row, found in zip(rows, answers_of(table)[task], strict=True):
            assert found == pytest.approx(row, rel=1e-6, abs=1e-5)


def test_a_limit_takes_the_first_rows(model, tokenizer, data, undisturbed):
    found = evaluate_tasks(model, tokenizer, parse_tasks("piqa"), data_dir=data, limit=2)
    assert found.scores[0].num_rows == 2
    for one, other in zip(
        answers_of(found)["piqa"], answers_of(undisturbed)["piqa"][:2], strict=True
    ):
        assert one == pytest.approx(other, abs=1e-4)


def test_one_row_has_no_standard_error(model, tokenizer, data):
    found = evaluate_tasks(model, tokenizer, parse_tasks("piqa"), data_dir=data, limit=1)
    assert found.scores[0].standard_errors == {"acc": None, "acc_norm": None}
    assert found.average == (found.scores[0].metrics["acc"], None)


def test_batches_keep_within_their_memory(model, tokenizer, data, undisturbed, monkeypatch):
    """With room for the logits of a single prompt, every prompt goes alone; scores stay."""
    widths = []
    monkeypatch.setattr(language_model, "LOGITS_BYTES", 1)
    monkeypatch.setattr(model, "forward", watched(model.forward, widths))
    found = evaluate_tasks(model, tokenizer, parse_tasks("arc_easy"), data_dir=data)
    assert {prompts for prompts, _ in widths} == {1}
    assert [width for _, width in widths] == sorted((width for _, width in widths), reverse=True)
    for one, other in zip(
        answers_of(found)["arc_easy"], answers_of(undisturbed)["arc_easy"], strict=True
    ):
        assert one == pytest.approx(other, abs=1e-4)


def watched(forward, shapes: list):
    """A forward that notes the shapes of what it is given."""

    def call(ids, *arguments, **options):
        shapes.append(tuple(ids.shape))
        return forward(ids, *arguments, **options)

    return call


def test_prompts_that_are_cut_are_counted(tokenizer, data):
    short = tiny_model("llama", max_position_embeddings=40)
    found = evaluate_tasks(short, tokenizer, parse_tasks("race,piqa"), data_dir=data)
    assert 0 < found.cut_requests < found.num_requests


@torch.no_grad()
def test_a_continuation_longer_than_the_window(tokenizer, data):
    """It is scored in parts of half a window, each after the tokens before it."""
    window = 6
    tiny = tiny_model("llama", max_position_embeddings=window)
    found = evaluate_tasks(tiny, tokenizer, parse_tasks("hellaswag"), data_dir=data)
    sample = found.harness["samples"]["hellaswag"][0]
    context, wanted = sample["arguments"][0]
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + wanted)["input_ids"]
    assert len(ids) - start > window
    nats = 0.0
    for begin in range(start, len(ids), window // 2):
        end = min(begin + window // 2, len(ids))
        seen = ids[max(end - 1 - window, 0) : end - 1]
        scores = tiny(torch.tensor([seen])).logits.log_softmax(-1)[0]
        places = range(len(seen) - (end - begin), len(seen))
        nats += sum(
            float(scores[place, ids[at]])
            for place, at in zip(places, range(begin, end), strict=True)
        )
    assert float(sample["resps"][0][0][0]) == pytest.approx(nats, abs=1e-4)


def test_interrupted_it_goes_on(model, tokenizer, data, undisturbed, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    shapes: list = []
    monkeypatch.setattr(model, "forward", watched(model.forward, shapes))

    def run(progress=None):
        with AnswerJournal(path, "one model") as journal:
            return evaluate_tasks(
                model,
                tokenizer,
                parse_tasks("all"),
                data_dir=data,
                batch_size=4,
                journal=journal,
                progress=progress,
            )

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupt)
    first = len(shapes)
    with path.open("a") as file:  # as a kill in the middle of a line leaves it
        file.write('{"key": "')
    found = run()
    assert answers_of(found) == answers_of(undisturbed)
    second = len(shapes) - first
    assert first > 0 and second > 0
    run()
    assert len(shapes) == first + second
    with pytest.raises(UserError, match="answers of another model"):
        AnswerJournal(path, "another model")
    path.write_text("{}\n")
    with pytest.raises(UserError, match="is no journal of answers"):
        AnswerJournal(path, "one model")


def test_a_folder_that_changed_is_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = folder_identity(tmp_path, dtype="float32")
    assert folder_identity(tmp_path, dtype="float32") == first
    assert folder_identity(tmp_path, dtype="bfloat16") != first
    (tmp_path / "config.json").write_text("{ }")
    assert folder_identity(tmp_path, dtype="float32") != first


def test_nothing_is_printed_and_the_log_is_as_before(model, tokenizer, data, capsys):
    import logging

    level = logging.getLogger("lm_eval").level
    evaluate_tasks(model, tokenizer, parse_tasks("lambada"), data_dir=data)
    assert capsys.readouterr().out == ""
    assert logging.getLogger("lm_eval").level == level


def test_damage_after_the_first_row_names_the_file(model, tokenizer, tmp_path):
    folder = write_tasks(tmp_path / "data")
    path = folder / f"{TASKS['race'].file}.jsonl"
    path.write_text(path.read_text() + "damage\n")
    with pytest.raises(UserError, match=r"race_high_test.jsonl can't be read as rows of race"):
        evaluate_tasks(model, tokenizer, parse_tasks("race"), data_dir=folder)


def test_without_the_hub_local_copies_are_asked_for(model, tokenizer, no_network, tmp_path):
    with pytest.raises(UserError, match=r"piqa can't be had .* --data-dir"):
        evaluate_tasks(model, tokenizer, parse_tasks("piqa"))


def test_without_the_harness_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'lookup-experts\[eval\]'"):
        evaluate_tasks(model, tokenizer, parse_tasks("piqa"))


@pytest.mark.parametrize("counts", [{"limit": 0}, {"batch_size": 0}])
def test_counts_below_one(model, tokenizer, counts):
    with pytest.raises(UserError, match="must be at least 1"):
        evaluate_tasks(model, tokenizer, parse_tasks("piqa"), **counts)
