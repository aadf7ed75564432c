"""Results as files: one JSON object with the machine and the versions that gave it, and a plot."""

import json
import sys
from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.machine import describe_machine


def make_report(what: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that `--json` gives: what was measured, by which command, where, and results."""
    return {
        "what": what,
        "command": " ".join(["mole", *sys.argv[1:]]),
        "machine": describe_machine().to_dict(),
        "results": results,
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report to a file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def draw_ratios(report: dict[str, Any], path: Path) -> None:
    """Bars of each measured ratio to dense, with the spread of its pairs, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [result for result in report["results"] if result["system"] != "dense"]
    labels = [
        f"batch {result['batch']}" if "batch" in result else f"{result['tokens']} tokens"
        for result in found
    ]
    ratios = [result["ratio_to_dense"] for result in found]
    low, high = zip(*(result["spread"] for result in found), strict=True)
    figure, axes = plt.subplots(figsize=(1.5 + 1.2 * len(found), 3.5), layout="constrained")
    axes.bar(labels, ratios, color="#b44d12", width=0.6)
    errors = [
        [ratio - least for ratio, least in zip(ratios, low, strict=True)],
        [most - ratio for ratio, most in zip(ratios, high, strict=True)],
    ]
    axes.errorbar(labels, ratios, yerr=errors, fmt="none", ecolor="#334e68", capsize=4)
    axes.axhline(1.0, color="#334e68", linewidth=1)
    for label, ratio in zip(labels, ratios, strict=True):
        axes.annotate(f"{ratio:.3f}", (label, 0.05), ha="center", color="white")
    axes.set_ylabel("time / dense")
    axes.set_title(f"{report['what']}: table on disk against dense")
    figure.savefig(path, dpi=150)
    plt.close(figure)
