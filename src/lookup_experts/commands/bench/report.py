"""What the measurements do alike: read sizes and token ids, say and write results."""

from pathlib import Path
from typing import Any

from lookup_experts import console

DTYPES = ("float32", "bfloat16")


def id_stream(ids: Path | None, case: Any, work: Path) -> Any:
    from lookup_experts.benchmarks.ids import load_ids, standard_library_ids

    vocab_size = case.layout.shape.vocab_size
    return load_ids(ids, vocab_size) if ids else standard_library_ids(work)


def counts(text: str) -> list[int]:
    from lookup_experts.errors import UserError

    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"Expected numbers like 1,8,32; got {text!r}.") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"Sizes must be at least 1; got {text!r}.")
    return numbers


def dtype_of(name: str) -> Any:
    """The torch dtype of `--dtype`."""
    import torch

    from lookup_experts.errors import unknown_name

    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return getattr(torch, name)


def line(result: dict[str, Any]) -> str:
    """One result in one line."""
    words = []
    for key, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{key} {shown}")
    return "  " + ", ".join(words)


def partial_file(json: Path) -> Path:
    """Where a run keeps its results until it has all of them."""
    return json.with_name(f"{json.name}.partial")


def keep(what: str, results: list[dict[str, Any]], json: Path | None) -> None:
    """Write what is measured so far beside `json`, so that a run that is broken off leaves it."""
    from lookup_experts.benchmarks.results import make_report, write_report

    if json:
        write_report(make_report(f"bench {what}", results), partial_file(json))


def report(what: str, results: list[dict[str, Any]], json: Path | None, plot: Path | None) -> None:
    """Write the results to `json`, to the standard output if there is none, and draw `plot`.

    Warns of results that were to come from the disk and didn't.
    """
    from lookup_experts.benchmarks.plots import draw
    from lookup_experts.benchmarks.results import make_report, write_report

    found = make_report(f"bench {what}", results)
    if any(result.get("page_cache_bypassed") is False for result in results):
        console.say("Warning: the page cache answered reads, so these figures are not the disk's.")
    if json:
        write_report(found, json)
        partial_file(json).unlink(missing_ok=True)
    else:
        console.json_result(found)
    if plot:
        draw(found, plot)
