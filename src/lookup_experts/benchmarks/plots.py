"""Pictures of results: PNG, SVG or PDF. matplotlib is in the extra `plot`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError

BAR, LINE = "#b44d12", "#334e68"
FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path | None) -> None:
    """Raise a `UserError` if no picture could be drawn there: to be asked before hours of work."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is no name of a picture; expected one of {', '.join(FORMATS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Drawing needs matplotlib: pip install 'lookup-experts[plot]', or leave --plot out."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """Axes to draw on; `path`, which `check_picture` found good, is written when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, dpi=120)


def draw_bars(
    path: Path,
    title: str,
    height_of: str,
    labels: Sequence[str],
    heights: Sequence[float],
    *,
    spreads: Sequence[tuple[float, float]] | None = None,
    mark: float | None = None,
) -> None:
    """Bars with labels.

    Args:
        height_of: what the vertical axis measures.
        spreads: the 10th and 90th percentile of each.
        mark: the height that they are compared with, where a line is drawn.
    """
    with picture(path, 1.5 + max(3.0, 1.2 * len(labels)), 3.5) as axes:
        places = range(len(labels))
        bars = axes.bar(places, heights, color=BAR, width=0.6)
        axes.set_xticks(places, labels)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], label_type="center")
        if spreads is not None:
            ends = list(zip(heights, spreads, strict=True))
            errors = [[h - low for h, (low, _) in ends], [high - h for h, (_, high) in ends]]
            axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor=LINE, capsize=4)
        if mark is not None:
            axes.axhline(mark, color=LINE, linewidth=1)
        axes.set_ylabel(height_of)
        axes.set_title(title)
