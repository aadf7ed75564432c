"""What a token costs to train, against the tokens of a micro batch."""

from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError

NAMES = {
    "dense": "dense",
    "unique": "MoLE-{}E, unique ids",
    "per_position": "MoLE-{}E, every position",
    "shared": "MoLE-{}E, shared by micro batches",
}
COLORS = ("#334e68", "#b44d12", "#d99a6c", "#2f7d5d", "#8cbf9f", "#7a4d9c", "#b79bd0")


def draw_training(results: list[dict[str, Any]], path: Path) -> None:
    """Lines of time over dense into the PNG `path`; dotted, what FLOPs say.

    Raises:
        UserError: matplotlib is not installed, or the results are of the Trainer.
    """
    if "ratio_to_dense" not in results[0]:
        raise UserError("--plot draws systems beside dense; leave it out with --trainer.")
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "Drawing needs matplotlib: pip install 'lookup-experts[plot]', or leave --plot out."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    keys = dict.fromkeys((result["system"], result.get("num_experts")) for result in results)
    for (system, count), color in zip(keys, COLORS, strict=False):
        found = [r for r in results if (r["system"], r.get("num_experts")) == (system, count)]
        tokens = [result["tokens"] for result in found]
        label = NAMES[system].format(count)
        axes.plot(tokens, [r["ratio_to_dense"] for r in found], "o-", color=color, label=label)
        axes.plot(tokens, [r["flop_ratio_to_dense"] for r in found], ":", color=color)
    ticks = sorted({result["tokens"] for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per micro batch")
    axes.set_ylabel("time / dense (dotted: FLOPs / dense)")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
