"""Tables of Markdown from results, whatever was measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Column = str | Callable[[Result], str]
"""A format of a result's keys, like `{ms_per_step:.1f}` or `{rows[error]:.2%}`, or a function."""


def table(results: Iterable[Result], columns: Mapping[str, Column]) -> str:
    """Markdown with a row for each result.

    A column whose header ends in `?` is empty for a result without its key, and left out where
    all its cells are the same.
    """
    results = list(results)
    cells = {
        header: [cell(result, column, header.endswith("?")) for result in results]
        for header, column in columns.items()
    }
    kept = {
        header.removesuffix("?"): column
        for header, column in cells.items()
        if not header.endswith("?") or len(set(column)) > 1
    }
    return markdown(list(kept), zip(*kept.values(), strict=True))


def loss_over_seeds(result: Result) -> str:
    """The mean validation loss, with its standard deviation where there were several seeds."""
    spread = result.get("validation_loss_std")
    return f"{result['validation_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def cell(result: Result, column: Column, optional: bool) -> str:
    """What a column says of a result."""
    try:
        return column.format_map(result) if isinstance(column, str) else column(result)
    except KeyError:
        if optional:
            return ""
        raise


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def megabytes(key: str, form: str = ".3g") -> Column:
    """A column of bytes in MB, 10^6."""
    return lambda result: f"{result[key] / 1e6:{form}} MB"


def results_of(reports: Iterable[Result], **wanted: Any) -> list[Result]:
    """The results of all reports that have these values."""
    return [
        result
        for report in reports
        for result in report["results"]
        if all(result.get(key) == value for key, value in wanted.items())
    ]
