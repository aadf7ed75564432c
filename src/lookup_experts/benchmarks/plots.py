"""Results as pictures: the bars of one report in a PNG or an SVG.

What a bar shows depends on what was measured; `draw` knows by the report. matplotlib is in the
extra `plot`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError

BAR, LINE = "#b44d12", "#334e68"
FORMATS = (".png", ".svg", ".pdf")

Result = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """Bars with labels, and the height that they are compared with."""

    title: str
    height_of: str
    """What the vertical axis measures."""
    labels: Sequence[str]
    heights: Sequence[float]
    spreads: Sequence[tuple[float, float]] | None = None
    """10th and 90th percentile of each bar."""
    mark: float | None = None
    """Where a line is drawn."""


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


def draw(report: Result, path: Path) -> None:
    """The chart of a report of `mole bench` into the PNG or SVG `path`.

    Raises:
        UserError: matplotlib is not installed, or `path` is no name of a picture.
    """
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chart = CHARTS[report["what"]](report["results"])
    width = 1.5 + max(3.0, 1.2 * len(chart.labels))
    figure, axes = plt.subplots(figsize=(width, 3.5), layout="constrained")
    places = range(len(chart.labels))
    bars = axes.bar(places, chart.heights, color=BAR, width=0.6)
    axes.set_xticks(places, chart.labels)
    axes.bar_label(bars, [f"{height:.3g}" for height in chart.heights], label_type="center")
    if chart.spreads is not None:
        pairs = list(zip(chart.heights, chart.spreads, strict=True))
        errors = [[height - low for height, (low, _) in pairs]]
        errors.append([high - height for height, (_, high) in pairs])
        axes.errorbar(places, chart.heights, yerr=errors, fmt="none", ecolor=LINE, capsize=4)
    if chart.mark is not None:
        axes.axhline(chart.mark, color=LINE, linewidth=1)
    axes.set_ylabel(chart.height_of)
    axes.set_title(chart.title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ratios(results: Sequence[Result]) -> Chart:
    """Decoding and prefill: time over that of the dense backbone."""
    found = [result for result in results if result["system"] != "dense"]
    what = found[0]["what"]
    return Chart(
        title=f"{what}: {found[0]['encoding']} table, store {found[0]['store']}",
        height_of="time / dense",
        labels=[
            f"batch {result['batch']}" if "batch" in result else f"{result['tokens']} tokens"
            for result in found
        ],
        heights=[result["ratio_to_dense"] for result in found],
        spreads=[result["spread"] for result in found],
        mark=1.0,
    )


def reading(results: Sequence[Result]) -> Chart:
    """Reading: share of what large sequential reads reach."""
    return Chart(
        title=f"Reading records of {results[0]['record_bytes'] / 1e3:.0f} kB",
        height_of="share of the disk's bandwidth",
        labels=[
            f"{result['under_way']} × {result['batch']} records"
            + ("\nbusy thread" if result["busy_thread"] else "")
            + (f", {result['switch_interval_ms']:g} ms" if result["busy_thread"] else "")
            for result in results
        ],
        heights=[result["share_of_disk_bandwidth"] for result in results],
        mark=1.0,
    )


def building(results: Sequence[Result]) -> Chart:
    """Building: seconds beside those of the bare matrix products."""
    labels, heights = [], []
    for result in results:
        labels += ["matrix products", f"{result['encoding']} table"]
        heights += [result["matmul_seconds"], result["seconds"]]
    return Chart("Building a table", "seconds", labels, heights)


def caching(results: Sequence[Result]) -> Chart:
    """Cache policies: hit rate of each at the middle capacity and one stream."""
    capacities = sorted({result["capacity"] for result in results})
    capacity = capacities[len(capacities) // 2]
    streams = min(result["streams"] for result in results)
    found = [
        result
        for result in results
        if result["capacity"] == capacity and result["streams"] == streams
    ]
    return Chart(
        title=f"{capacity} records cached, {streams} stream{'s' if streams > 1 else ''}",
        height_of="hit rate",
        labels=[result["policy"] for result in found],
        heights=[result["hit_rate"] for result in found],
    )


def serving(results: Sequence[Result]) -> Chart:
    """Serving: tokens per second of each system, by the number of streams."""
    return Chart(
        title="mole serve, OpenAI's client",
        height_of="tokens per second",
        labels=[f"{result['system']}\n{result['streams']} streams" for result in results],
        heights=[result["tokens_per_second"] for result in results],
    )


CHARTS: dict[str, Callable[[Sequence[Result]], Chart]] = {
    "bench decode": ratios,
    "bench prefill": ratios,
    "bench read": reading,
    "bench build": building,
    "bench cache": caching,
    "bench serve": serving,
}
"""By the `what` of a report."""
