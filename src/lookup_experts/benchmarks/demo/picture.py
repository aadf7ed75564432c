"""The report's picture: what training gained, and what decoding costs."""

import io
import logging
import textwrap
from typing import Any

from lookup_experts.benchmarks.demo.systems import SYSTEMS

COLORS = ("#7f7f7f", "#f2a65a", "#6baed6", "#2171b5")
"""Of the systems, in their order."""
LABEL_WIDTH = 9


def draw(report: dict[str, Any]) -> bytes:
    """A PNG: validation loss against tokens, and milliseconds per token."""
    # It would announce that it builds a list of the machine's fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, speeds = figure.subplots(1, 2)
    _draw_losses(losses, report)
    _draw_speeds(speeds, report)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    for name, words, color in (("dense", "Dense", COLORS[0]), ("mole", "MoLE", COLORS[3])):
        curve = report["training"][name]["validation_curve"]
        tokens = [point["tokens"] / 1000 for point in curve]
        loss = [point["validation_loss"] for point in curve]
        axes.plot(tokens, loss, marker="o", color=color, label=words)
        axes.annotate(
            f"{loss[-1]:.2f}", (tokens[-1], loss[-1]), xytext=(6, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    axes.set_xlabel("training tokens, thousands")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title("The same tokens for both")
    axes.margins(x=0.12)
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_speeds(axes: Any, report: dict[str, Any]) -> None:
    speeds = [report["systems"][system.name]["ms_per_token"] for system in SYSTEMS]
    words = [textwrap.fill(system.words, LABEL_WIDTH) for system in SYSTEMS]
    bars = axes.bar(words, speeds, color=COLORS)
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_ylabel("milliseconds per token")
    axes.set_title("Decoding, one sequence: median step")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
