"""The paper's tasks: names, local copies of their rows, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
from tiny_tasks import write_tasks

from lookup_experts.errors import UserError
from lookup_experts.evaluation.tasks import TASKS, local_file, parse_tasks

REPOSITORY = Path(__file__).resolve().parents[2]
EVALUATION_DATA = REPOSITORY.parent / "shared" / "data" / "eval"


def test_names():
    assert parse_tasks("all") == list(TASKS.values()) and len(TASKS) == 8
    assert [task.name for task in parse_tasks("piqa, arc_easy")] == ["piqa", "arc_easy"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("arc_easi", "Unknown task 'arc_easi'. Did you mean 'arc_easy'?"),
        ("piqa,siqa", "Unknown task 'siqa'"),
        ("piqa,", "Unknown task ''"),
        ("piqa,race,piqa", "The task piqa is given twice."),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(UserError) as raised:
        parse_tasks(names)
    assert message in str(raised.value)


def test_local_files_are_found_packed_and_not(tmp_path):
    folder = write_tasks(tmp_path / "data")
    suffixes = {local_file(task, folder).suffix for task in TASKS.values()}
    assert suffixes == {".gz", ".jsonl"}


def spoil(folder: Path, content: bytes | None) -> None:
    """Replace BoolQ's rows, or take them away."""
    for path in folder.glob("boolq*"):
        path.unlink()
    if content is not None:
        (folder / "boolq_validation.jsonl.gz").write_bytes(content)


ROW = json.dumps({"passage": "a", "question": None, "label": 0}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lacks boolq_validation.jsonl (or .jsonl.gz), the rows of the task boolq"),
        (gzip.compress(ROW, mtime=0), "lacks 'question', a field of boolq"),
        (gzip.compress(b"[1]\n", mtime=0), "lacks 'passage', a field of boolq"),
        (gzip.compress(b"no JSON", mtime=0), "is not rows of JSON"),
        (gzip.compress(ROW, mtime=0)[:-20], "is not rows of JSON"),
        (b"not packed", "is not rows of JSON"),
        (b"", "is not rows of JSON"),
    ],
)
def test_bad_local_files(tmp_path, content, message):
    folder = write_tasks(tmp_path / "data")
    spoil(folder, content)
    with pytest.raises(UserError) as raised:
        local_file(TASKS["boolq"], folder)
    assert message in str(raised.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        local_file(TASKS["boolq"], tmp_path / "nowhere")


def test_the_page_names_every_file():
    page = (REPOSITORY / "docs" / "comparing.md").read_text()
    for task in TASKS.values():
        assert f"| `{task.name}` | `{task.file}` | {task.num_rows:,} |" in page


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_copies_of_the_data_sets_have_the_official_rows(task):
    if not EVALUATION_DATA.is_dir():
        pytest.skip("the evaluation data sets (../shared/data/eval) are not here")
    with gzip.open(local_file(task, EVALUATION_DATA)) as file:
        assert sum(1 for _ in file) == task.num_rows
