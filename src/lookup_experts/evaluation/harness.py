"""The paper's tasks by lm-evaluation-harness, zero-shot, for any loaded causal LM.

Dense, MoE, MoLE with its experts or with its table on disk: the harness takes the model object
as it is (`language_model.py`), with rows from the hub or from a folder (`tasks.py`).
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.evaluation.answers import AnswerJournal
from lookup_experts.evaluation.perplexity import Progress
from lookup_experts.evaluation.tasks import EvaluationTask, load_tasks

METRICS = ("acc", "acc_norm", "perplexity")
BOOTSTRAP_ROUNDS = 1000
"""For the standard error of LAMBADA's perplexity; those of accuracies have a formula."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task."""

    task: str
    metrics: dict[str, float]
    """`acc` for every task; `acc_norm` (by the choices' lengths) or `perplexity` for some."""
    standard_errors: dict[str, float | None]
    """None where there is a single row."""
    num_rows: int
    """Those that were evaluated."""
    official_rows: int


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on several tasks."""

    scores: list[TaskScore]
    num_requests: int
    """Continuations whose log-likelihood was asked for."""
    cut_requests: int
    """Of them, those that didn't fit into the model's window, so that their context was cut."""
    harness: dict[str, Any]
    """The harness's own results, with every sample."""

    @property
    def average(self) -> tuple[float, float | None]:
        """Mean accuracy over the tasks and its standard error; over all eight the paper's."""
        mean = sum(score.metrics["acc"] for score in self.scores) / len(self.scores)
        squares = 0.0
        for score in self.scores:
            error = score.standard_errors["acc"]
            if error is None:
                return mean, None
            squares += error**2
        return mean, squares**0.5 / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what the harness wrote."""
        mean, error = self.average
        return {
            "scores": [asdict(score) for score in self.scores],
            "average": {"acc": mean, "standard_error": error, "num_tasks": len(self.scores)},
            "num_requests": self.num_requests,
            "cut_requests": self.cut_requests,
        }


def check_harness() -> None:
    """Raise a `UserError` unless lm-evaluation-harness is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "The tasks need lm-evaluation-harness, which isn't installed: "
            "pip install 'lookup-experts[eval]'."
        ) from error


def check_counts(limit: int | None, batch_size: int) -> None:
    """Raise a `UserError` unless both are at least 1; a limit of None is none."""
    for option, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1.")


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[EvaluationTask],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    journal: AnswerJournal | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Zero-shot scores of a causal LM.

    Args:
        model: of transformers, in evaluation mode; it stays where it is.
        tokenizer: the model's.
        tasks: of `TASKS`, at least one.
        data_dir: local copies of the rows; None fetches them from the Hugging Face hub.
        limit: rows of each task, the first ones; None for all.
        batch_size: prompts in a forward pass, at most.
        journal: answers are kept there, and those that it has aren't computed again.
        progress: called with (tokens done, tokens in all).

    Raises:
        UserError: the harness isn't installed; rows are missing, damaged or can't be fetched.
    """
    check_harness()
    check_counts(limit, batch_size)
    with _quiet_harness(), tempfile.TemporaryDirectory(prefix="mole-eval-") as work:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from lookup_experts.evaluation.language_model import LoadedLanguageModel

        # Scanning the harness's thousands of tasks takes ten seconds; ours are given as files.
        manager = TaskManager(include_defaults=False)
        loaded = load_tasks(manager, tasks, data_dir, Path(work))
        language_model = LoadedLanguageModel(model, tokenizer, batch_size, journal, progress)
        results = simple_evaluate(
            language_model,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
        )
    return Evaluation(
        scores=[_score(task, results) for task in tasks],
        num_requests=language_model.num_requests,
        cut_requests=language_model.cut_requests,
        harness=results,
    )


def _score(task: EvaluationTask, results: dict[str, Any]) -> TaskScore:
    found = results["results"][task.name]
    names = [name for name in METRICS if f"{name},none" in found]
    errors = {name: found[f"{name}_stderr,none"] for name in names}
    return TaskScore(
        task=task.name,
        metrics={name: float(found[f"{name},none"]) for name in names},
        standard_errors={
            name: None if error == "N/A" else float(error) for name, error in errors.items()
        },
        num_rows=results["n-samples"][task.name]["effective"],
        official_rows=task.num_rows,
    )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Within it the harness prints nothing on stdout, and of its log only errors come through.

    It says in its log for every prompt that it was cut; we count them. And it forks a process for
    each core to resample LAMBADA's perplexity, which takes less than starting them.
    """
    import datasets

    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with redirect_stdout(sys.stderr), _environment("DISABLE_MULTIPROC", "1"):
        try:
            yield
        finally:
            logger.setLevel(before)
            datasets.enable_progress_bars()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Within it an environment variable has that value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
