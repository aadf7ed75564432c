"""The paper's two figures of latency (arXiv 2503.15798): bars per batch size (figure 3), and what
a model is worth against the memory it takes, with its latency beside (figure 1)."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.latency.systems import System
from lookup_experts.errors import UserError
from lookup_experts.units import format_bytes

COLORS = {
    "dense": "#7f8c9b",
    "mole": "#b44d12",
    "resident": "#334e68",
    "disk": "#2f7f86",
    "ram": "#6fb1a0",
    "mmap": "#a58bc4",
    "accelerate": "#d3b1d9",
}


def _color(name: str) -> str:
    system = System.parse(name)
    return COLORS[system.family if system.family in COLORS else system.way]


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_bars(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds per decoding step, a group of bars for each batch size, into a PNG or SVG."""
    batches = list(dict.fromkeys(result["batch"] for result in results))
    names = list(dict.fromkeys(result["system"] for result in results))
    found = {(result["system"], result["batch"]): result for result in results}
    figure, axes = _new_figure(2 + 0.5 * len(names) * len(batches), 4.2)
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(batches))]
        times = [found[name, batch].get("ms_per_step", 0.0) for batch in batches]
        bars = axes.bar(places, times, width * 0.92, label=name, color=_color(name))
        axes.bar_label(bars, [f"{value:.0f}" for value in times], fontsize=8, padding=1)
        for place, batch in zip(places, batches, strict=True):
            if "failed" in found[name, batch]:
                axes.text(
                    place, 0.02, found[name, batch]["failed"], transform=axes.get_xaxis_transform(),
                    rotation=90, ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("milliseconds per decoding step")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.margins(y=0.25)
    figure.savefig(path, dpi=150)


def draw_memory(results: Sequence[dict[str, Any]], quality: dict[str, Any], path: Path) -> None:
    """Validation loss against resident memory, each point with its latency, into a PNG or SVG.

    Args:
        results: of `measure_latency`; those of the smallest batch are drawn.
        quality: the report of `mole bench quality`, for the losses of dense, moe-10e, mole-4e.

    Raises:
        UserError: the report has no loss of any of the systems.
    """
    losses = {
        entry["system"]: entry["validation_loss"]
        for entry in quality["results"]
        if "validation_loss" in entry
    }
    batch = min(result["batch"] for result in results)
    points = [
        (result, losses[System.parse(result["system"]).model_name])
        for result in results
        if result["batch"] == batch
        and "failed" not in result
        and System.parse(result["system"]).model_name in losses
    ]
    if not points:
        raise UserError(
            "The quality report has no loss of any system here; it has those of "
            f"{', '.join(losses) or 'none'}."
        )
    figure, axes = _new_figure(7, 4.5)
    together, labels = Counter(loss for _, loss in points), Counter[float]()
    for result, loss in sorted(points, key=lambda point: -_megabytes(point[0])):
        place = (_megabytes(result), loss)
        axes.scatter(*place, s=70, color=_color(result["system"]), zorder=3)
        # Systems of one model have one loss: their labels stand below each other.
        height = 8 if together[loss] == 1 else -22 - 13 * labels[loss]
        axes.annotate(
            f"{result['system']}, {result['ms_per_step']:.0f} ms",
            place, xytext=(8, height), textcoords="offset points", fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.3)},
        )  # fmt: skip
        labels[loss] += 1
    axes.set_xlabel(f"resident memory at batch {batch}, MB")
    axes.set_ylabel("validation loss of small models, nats per token")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _megabytes(result: dict[str, Any]) -> float:
    """Resident, without the copy of all experts in RAM that stands for storage."""
    return (result["resident_bytes"] - result.get("host_copy_bytes", 0)) / 1e6


def table_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """The results as lines of text."""
    heads = ("batch", "system", "ms", "x dense", "prefill ms", "tokens/s", "loaded", "stall ms",
             "experts", "resident")  # fmt: skip
    rows = [heads, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))
            for row in rows]  # fmt: skip


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    start = (str(result["batch"]), result["system"])
    if "failed" in result:
        return (*start, result["failed"], *[""] * 7)
    experts = result.get("experts_loaded_per_layer")
    return (
        *start,
        f"{result['ms_per_step']:.1f}",
        f"{result['ratio_to_dense']:.2f}",
        f"{result['prefill_ms']:.0f}",
        f"{result['tokens_per_second']:.1f}",
        format_bytes(result["bytes_per_step"]),
        f"{result['stall_ms']:.1f}" if "stall_ms" in result else "",
        "" if experts is None else f"{experts:.2f}",
        format_bytes(result["resident_bytes"]),
    )
