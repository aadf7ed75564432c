"""The paper's eight tasks, as lm-evaluation-harness defines them.

Prompts, choices and metrics are the harness's own files. What can be swapped is where the rows
come from: the Hugging Face hub, or a folder of local copies, with no network at all. A local copy
of a task is `FILE.jsonl` or `FILE.jsonl.gz` with the fields of the data set on the hub, one row a
line; which file and which fields: `TASKS`.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError, unknown_name


@dataclass(frozen=True)
class EvaluationTask:
    """One of the paper's tasks."""

    name: str
    """The paper's name, in the harness's spelling."""
    definition: str
    """The harness's file, below its folder of tasks."""
    split: str
    """The one that is evaluated: `test` or `validation`."""
    num_rows: int
    """Of that split, officially."""
    file: str
    """Of a local copy, without its suffix."""
    fields: tuple[str, ...]
    """Those that the harness reads."""


_ARC = ("question", "choices", "answerKey")
TASKS = {
    task.name: task
    for task in (
        EvaluationTask(
            "arc_challenge", "arc/arc_challenge.yaml", "test", 1172, "arc_challenge_test", _ARC
        ),
        EvaluationTask("arc_easy", "arc/arc_easy.yaml", "test", 2376, "arc_easy_test", _ARC),
        EvaluationTask(
            "boolq",
            "super_glue/boolq/default.yaml",
            "validation",
            3270,
            "boolq_validation",
            ("passage", "question", "label"),
        ),
        EvaluationTask(
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            "validation",
            10042,
            "hellaswag_validation",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ),
        EvaluationTask(
            "piqa",
            "piqa/piqa.yaml",
            "validation",
            1838,
            "piqa_validation",
            ("goal", "sol1", "sol2", "label"),
        ),
        # The harness asks the last question of each of the 1,045 articles of `high`.
        EvaluationTask(
            "race", "race/race.yaml", "test", 1045, "race_high_test", ("article", "problems")
        ),
        EvaluationTask(
            "social_iqa",
            "siqa/siqa.yaml",
            "validation",
            1954,
            "siqa_validation",
            ("context", "question", "answerA", "answerB", "answerC", "label"),
        ),
        EvaluationTask(
            "lambada",
            "lambada/lambada_openai.yaml",
            "test",
            5153,
            "lambada_openai_test",
            ("text",),
        ),
    )
}


def parse_tasks(names: str) -> list[EvaluationTask]:
    """`arc_easy,piqa` as tasks, in the given order; `all` is all eight.

    Raises:
        UserError: a name is none of the tasks' (the nearest is named), or is given twice.
    """
    if names == "all":
        return list(TASKS.values())
    words = [word.strip() for word in names.split(",")]
    for position, word in enumerate(words):
        if word not in TASKS:
            raise unknown_name("task", word, TASKS)
        if word in words[:position]:
            raise UserError(f"The task {word} is given twice.")
    return [TASKS[word] for word in words]


def local_file(task: EvaluationTask, data_dir: Path) -> Path:
    """The copy of a task's rows in a folder.

    Raises:
        UserError: the folder has none, or its first row isn't one of the task's.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is no folder; give one with {task.file}.jsonl.gz.")
    for suffix in (".jsonl.gz", ".jsonl"):
        path = data_dir / f"{task.file}{suffix}"
        if path.is_file():
            _check_first_row(task, path)
            return path
    raise UserError(
        f"{data_dir} lacks {task.file}.jsonl (or .jsonl.gz), the rows of the task {task.name}."
    )


def _check_first_row(task: EvaluationTask, path: Path) -> None:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            row = json.loads(file.readline())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is not rows of JSON, one a line ({error}).") from error
    missing = [
        field for field in task.fields if not isinstance(row, dict) or row.get(field) is None
    ]
    if missing:
        raise UserError(f"The first row of {path} lacks {missing[0]!r}, a field of {task.name}.")


def load_tasks(
    manager: Any, tasks: Sequence[EvaluationTask], data_dir: Path | None, work: Path
) -> list[Any]:
    """The harness's task objects, named as in `TASKS`, with their rows.

    Args:
        manager: the harness's `TaskManager`.
        tasks: which.
        data_dir: local copies of the rows; None fetches them from the hub.
        work: an empty folder for the definitions and, with `data_dir`, the converted rows.

    Raises:
        UserError: rows are missing or damaged, or can't be fetched.
    """
    files = [None if data_dir is None else local_file(task, data_dir) for task in tasks]
    definitions = [
        _write_definition(task, file, work) for task, file in zip(tasks, files, strict=True)
    ]
    loaded = []
    for task, file, definition in zip(tasks, files, definitions, strict=True):
        try:
            loaded += manager.load([str(definition)])["tasks"].values()
        except Exception as error:  # datasets and the hub's client raise many kinds
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if file is not None:
                raise UserError(f"{file} can't be read as rows of {task.name}: {reason}") from error
            raise UserError(
                f"The rows of {task.name} can't be had from the Hugging Face hub ({reason}). "
                "Give local copies: --data-dir."
            ) from error
    return loaded


def _write_definition(task: EvaluationTask, file: Path | None, work: Path) -> Path:
    """A task file of the harness that takes all but the rows from the harness's own."""
    import lm_eval.tasks

    official = Path(lm_eval.tasks.__file__).parent / task.definition
    definition: dict[str, Any] = {"include": str(official), "task": task.name}
    if file is not None:
        definition |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {task.split: str(file.resolve())},
                "cache_dir": str(work / "rows"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            "fewshot_split": task.split,
            f"{task.split}_split": task.split,
        }
    path = work / f"{task.name}.yaml"
    path.write_text(json.dumps(definition))  # JSON is YAML
    return path
