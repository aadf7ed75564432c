"""From a model's folder to all that `mole eval` was asked for."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lookup_experts import console
from lookup_experts.errors import UserError
from lookup_experts.evaluation.answers import AnswerJournal, folder_identity
from lookup_experts.evaluation.harness import (
    Evaluation,
    check_counts,
    check_harness,
    evaluate_tasks,
)
from lookup_experts.evaluation.perplexity import Perplexity, perplexity, window_size
from lookup_experts.evaluation.predictions import TextQuality, compare_models
from lookup_experts.evaluation.recall import Recall, measure_recall, word_ids
from lookup_experts.evaluation.summary import ModelSummary
from lookup_experts.evaluation.tasks import EvaluationTask, local_file
from lookup_experts.evaluation.text import find_text, read_token_ids
from lookup_experts.folders.load import load
from lookup_experts.folders.model_folder import local_folder, read_config
from lookup_experts.folders.readers import table_readers
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation.inspection import inspect_folder
from lookup_experts.model.fast_linears import describe_linears
from lookup_experts.table.reader import ReaderStatistics

UNROUNDED = {"weights": "auto"}
"""For `load`: weights as they are in the folder."""


@dataclass(frozen=True)
class Request:
    """What is asked of every model."""

    tasks: Sequence[EvaluationTask]
    data_dir: Path | None = None
    """Local copies of the tasks' rows; None for the hub."""
    limit: int | None = None
    """Rows of each task; None for all."""
    text: Path | None = None
    """Its perplexity, too."""
    reference: str | None = None
    """A model whose predictions on the text are compared with; None for no comparison."""
    recall: bool = False
    batch_size: int = 8
    out: Path | None = None
    """Where the harness's results are written; None for nowhere."""

    def check(
        self,
        folders: Sequence[str],
        tokenizer_folder: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Raise a `UserError` for what can be known to fail before a model is loaded.

        Of the models, headers and tokenizers are read; those on the hub are fetched.
        """
        check_counts(self.limit, self.batch_size)
        if self.tasks:
            check_harness()
        if self.data_dir is not None:
            for task in self.tasks:
                local_file(task, self.data_dir)
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder.")
        names = [_file_name(folder) for folder in folders]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise UserError(f"The model {folders[position]} is given twice.")
        if self.text is not None:
            find_text(self.text)
        elif self.reference is not None:
            raise UserError(
                f"--against {self.reference} compares predictions on the text of --perplexity; "
                "give one."
            )
        for folder in folders if self.reference is None else [*folders, self.reference]:
            read_config(local_folder(folder))  # a bare table has none, and can be inspected
            inspect_folder(folder)
        for folder in folders if tokenizer_folder is None else [str(tokenizer_folder)]:
            self._check_tokenizer(load_tokenizer(folder, trust_remote_code))

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """Read what the tokenizer is needed for, once before it is needed."""
        if self.text is not None:
            read_token_ids(self.text, tokenizer)
        if self.recall:
            word_ids(tokenizer)


def evaluate_folders(
    folders: Sequence[str],
    request: Request,
    tokenizer_folder: Path | None,
    loading: dict[str, Any],
) -> list[ModelSummary]:
    """Load one model after the other and measure what is asked, with progress on stderr.

    Args:
        folders: of the models, or their names on the hub.
        request: what is asked.
        tokenizer_folder: where the models' own folders have no tokenizer.
        loading: keyword arguments of `load`.

    Raises:
        UserError: no such model; no tokenizer; rows or a text that can't be read.
    """
    request.check(folders, tokenizer_folder, loading.get("trust_remote_code", False))
    reference = None
    if request.reference is not None:
        reference = load(request.reference, notify=console.say, **loading | UNROUNDED)
    found = [_evaluate(folder, request, tokenizer_folder, loading, reference) for folder in folders]
    if reference is not None:
        _close(reference)
    # Kept up to here: interrupted at the last model, the others needn't be asked again.
    for folder in folders:
        if request.out is not None:
            _journal_path(request.out, folder).unlink(missing_ok=True)
    return found


def _evaluate(
    folder: str,
    request: Request,
    tokenizer_folder: Path | None,
    loading: dict[str, Any],
    reference: Any,
) -> ModelSummary:
    trusted = loading.get("trust_remote_code", False)
    tokenizer = load_tokenizer(tokenizer_folder or folder, trusted)
    unrounded = None
    if request.text is not None and loading.get("weights") == "int8":
        model = load(folder, notify=console.say, **loading | UNROUNDED)
        unrounded = _perplexity(model, tokenizer, request, reference)
        _close(model)
        del model  # before it is loaded again
    model = load(folder, notify=console.say, **loading)
    text, predictions = None, None
    if reference is not None:
        predictions = _predictions(model, reference, tokenizer, request)
        text = predictions.of_model
    elif request.text is not None:
        text = _perplexity(model, tokenizer, request, reference)
    found = ModelSummary(
        model=folder,
        form=inspect_folder(folder)["form"],
        dtype=str(model.dtype).removeprefix("torch."),
        tasks=_tasks(folder, model, tokenizer, request, loading) if request.tasks else None,
        perplexity=text,
        perplexity_unrounded=unrounded,
        predictions=predictions,
        reference=request.reference,
        recall=_recall(model, tokenizer, request) if request.recall else None,
        linear_layers=describe_linears(model),
    )
    return replace(found, reader=_close(model))


def _close(model: Any) -> ReaderStatistics | None:
    """Close a model's tables, where it has some, and say what they were asked for."""
    tables = table_readers(model)
    if tables is None:
        return None
    found: ReaderStatistics = tables.stats()
    tables.close()
    return found


def _tasks(
    folder: str, model: Any, tokenizer: Any, request: Request, loading: dict[str, Any]
) -> Evaluation:
    with _journal(folder, request, loading) as journal:
        with console.progress_bar(f"Tasks, {folder}") as progress:
            found = evaluate_tasks(
                model,
                tokenizer,
                request.tasks,
                data_dir=request.data_dir,
                limit=request.limit,
                batch_size=request.batch_size,
                journal=journal,
                progress=progress,
            )
        if request.out is not None:
            write_harness_results(found.harness, request.out / f"{_file_name(folder)}.json")
    return found


@contextmanager
def _journal(
    folder: str, request: Request, loading: dict[str, Any]
) -> Iterator[AnswerJournal | None]:
    if request.out is None:
        yield None
        return
    identity = folder_identity(local_folder(folder), **loading)
    with AnswerJournal(_journal_path(request.out, folder), identity) as journal:
        yield journal


def _journal_path(out: Path, folder: str) -> Path:
    return out / f"{_file_name(folder)}.answers.jsonl"


def write_harness_results(results: dict[str, Any], path: Path) -> None:
    """Write what the harness found, as the harness writes it, all or nothing.

    The samples stay out, as with the harness: with their prompts they take 100 MB.
    """
    from lm_eval.utils import handle_non_serializable

    temporary = path.with_name(f"{path.name}.tmp")
    kept = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _file_name(folder: str) -> str:
    """As the harness names files: `owner/name` -> `owner__name`."""
    return folder.strip("/").replace("/", "__") or "root"


def _perplexity(model: Any, tokenizer: Any, request: Request, reference: Any) -> Perplexity:
    """In the windows that predictions are compared in, where there is a reference."""
    token_ids = _read_text(model, tokenizer, request)
    context = min(window_size(each) for each in (model, reference) if each is not None)
    with console.progress_bar("Perplexity") as progress:
        return perplexity(model, token_ids, context, progress=progress)


def _predictions(model: Any, reference: Any, tokenizer: Any, request: Request) -> TextQuality:
    token_ids = _read_text(model, tokenizer, request)
    with console.progress_bar("Comparing predictions") as progress:
        return compare_models(model, reference, token_ids, progress)


def _read_text(model: Any, tokenizer: Any, request: Request) -> Tensor:
    assert request.text is not None
    num_ids = model.get_input_embeddings().weight.shape[0]
    return read_token_ids(request.text, tokenizer, num_ids=num_ids)


def _recall(model: Any, tokenizer: Any, request: Request) -> Recall:
    prefix = tokenizer("")["input_ids"]
    with console.progress_bar("Recall") as progress:
        return measure_recall(
            model,
            word_ids(tokenizer),
            prefix=prefix,
            batch_size=request.batch_size,
            progress=progress,
        )
