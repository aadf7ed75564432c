"""The study's picture: the gain over dense, against the bytes of the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lookup_experts.benchmarks.forms.summary import (
    DENSE,
    Point,
    Trained,
    main_tokens,
    tables_of,
    trained,
)
from lookup_experts.benchmarks.plots import picture

LINES = {
    ("mole", 1): ("MoLE-1E", "#d99a6c"),
    ("mole", 4): ("MoLE-4E", "#b44d12"),
    ("mole", 16): ("MoLE-16E", "#7a4d9c"),
    ("meki", 1): ("MeKi", "#2f7d5d"),
}
STYLES = {"bfloat16": "o-", "nf4": "s:"}


def draw(points: Sequence[Point], path: Path) -> None:
    """A line for each form and number of rows; dotted in nf4."""
    tokens = main_tokens(points)
    systems = trained(points, tokens)
    with picture(path, 7, 4.5) as axes:
        for (form, num_rows), (name, color) in LINES.items():
            for encoding, style in STYLES.items():
                line = _line(systems, form, num_rows, encoding)
                if line:
                    shares, gains = zip(*line, strict=True)
                    label = f"{name}, {encoding}"
                    axes.plot(shares, gains, style, color=color, label=label)
        axes.axhline(0, color="#334e68", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes of the table / MoLE-4E's in bfloat16")
        axes.set_ylabel(f"gain over dense after {tokens / 1e6:g} M tokens, nats")
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")


def _line(
    systems: Mapping[str, Trained], form: str, num_rows: int, encoding: str
) -> list[tuple[float, float]]:
    """(share of bytes, gain) of a form's row sizes."""
    if DENSE not in systems:
        return []

    def loss(point: Point) -> float:
        return float(tables_of(point)[encoding]["validation_loss"])

    line = []
    for system in systems.values():
        first = system.first
        if (first["form"], first["num_rows"]) == (form, num_rows) and "expert_size" not in first:
            gain = system.gain(systems[DENSE], loss, "validation_loss")
            if gain is not None:
                line.append((tables_of(first)[encoding]["share_of_bytes"], gain.mean))
    return sorted(line)
