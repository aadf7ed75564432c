"""Runs added up over their seeds, as JSON values, in words, and drawn."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.quality.runs import TrainedRun


def add_up(runs: Sequence[TrainedRun]) -> list[dict[str, Any]]:
    """One object per system, in the order of the runs.

    Losses are nats per token on held-out text; `validation_loss_std` is the sample's standard
    deviation over the seeds, and absent for a single one. `seeds` are those that were trained, or
    all where none was; `failures` tells what failed, `failed` why nothing was trained.
    """
    names = list(dict.fromkeys(run.system for run in runs))
    return [_add_up_system([run for run in runs if run.system == name]) for name in names]


def _add_up_system(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    trained = [run for run in runs if run.summary is not None]
    counted = trained or runs
    result: dict[str, Any] = {"system": runs[0].system, "seeds": [run.seed for run in counted]}
    failures = [(run.seed, run.failure) for run in runs if run.failure is not None]
    if failures:
        result["failures"] = [{"seed": seed, "why": why} for seed, why in failures]
    if not trained:
        return {**result, "failed": "; ".join(dict.fromkeys(why for _, why in failures))}
    summaries = [run.summary for run in trained if run.summary is not None]
    losses = [s.validation_loss for s in summaries if s.validation_loss is not None]
    seconds = [summary.seconds for summary in summaries]
    result |= {
        "tokens": summaries[0].tokens,
        "validation_loss": statistics.mean(losses),
        "validation_losses": losses,
        # Medians: a run that was interrupted counts the pause.
        "training_seconds": statistics.median(seconds),
        "tokens_per_second": statistics.median(s.tokens_per_second for s in summaries),
        "parameters": summaries[0].to_dict()["parameters"],
        "curve": _mean_curve(trained),
    }
    if len(losses) > 1:
        result["validation_loss_std"] = statistics.stdev(losses)
    tables = [run.table for run in trained if run.table is not None]
    if tables:
        result["table_difference"] = max(abs(found["table"] - found["experts"]) for found in tables)
    return result


def _mean_curve(runs: Sequence[TrainedRun]) -> list[list[float]]:
    """[tokens, validation loss], the mean over the seeds."""
    points = zip(*(run.curve for run in runs), strict=True)
    return [[point[0][0], statistics.mean(loss for _, loss in point)] for point in points]


def in_words(result: dict[str, Any]) -> str:
    """One system in one line."""
    if "failed" in result:
        return f"  {result['system']}: {result['failed']}"
    spread = f" ± {result['validation_loss_std']:.4f}" if "validation_loss_std" in result else ""
    seeds = len(result["seeds"])
    return (
        f"  {result['system']}: validation loss {result['validation_loss']:.4f}{spread} "
        f"({seeds} seed{'s' if seeds > 1 else ''}, {result['tokens']:,} tokens, "
        f"{result['training_seconds']:,.0f} s each)"
        + "".join(f"; seed {f['seed']}: {f['why']}" for f in result.get("failures", []))
    )


def draw_curves(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Validation loss against tokens, a line per system, into a PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for result in results:
        if "failed" in result:
            continue
        tokens, losses = zip(*result["curve"], strict=True)
        axes.plot([count / 1e6 for count in tokens], losses, marker="o", label=result["system"])
    axes.set_xlabel("million tokens trained on")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
