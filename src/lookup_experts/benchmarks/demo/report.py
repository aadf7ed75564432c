"""The report: what is compared, one table, what it means, and on what it was measured.

A report is plain JSON values, as `report.json` has them. `rows` and `remarks` put it into words,
for the terminal and for `report.md` alike.
"""

import io
import logging
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lookup_experts.units import format_bytes

Report = dict[str, Any]

DENSE, MOLE, TABLE = "dense", "mole", "mole-table"
"""The folders of the models, in the demo's folder."""
NOT_APPLICABLE = "–"
SAMPLE_LINES = 12
LABEL_WIDTH = 9


@dataclass(frozen=True)
class System:
    """One way to run a model: which one, and where its expert outputs come from."""

    name: str
    words: str
    folder: str
    color: str
    store: str = "auto"


SYSTEMS = (
    System("dense", "Dense", DENSE, "#7f7f7f"),
    System("mole_experts", "MoLE: experts computed", MOLE, "#f2a65a"),
    System("mole_memory", "MoLE: table in memory", TABLE, "#6baed6", "memory"),
    System("mole_disk", "MoLE: table on disk", TABLE, "#2171b5", "direct"),
)
"""What is compared."""


def header() -> list[str]:
    """The names of the columns: what is measured, and every system."""
    return ["", *(system.words for system in SYSTEMS)]


def rows(report: Report) -> list[list[str]]:
    """A row for each thing that was measured."""
    measured = [report["systems"][system.name] for system in SYSTEMS]
    return [
        [words, *(in_words(system) if key in system else NOT_APPLICABLE for system in measured)]
        for words, key, in_words in _MEASURES
    ]


def _spread(system: dict[str, Any]) -> str:
    low, high = system["ratio_spread"]
    return f"{low:.2f}–{high:.2f}"


# In words, the key that a system has if the measure applies to it, and the cell.
_MEASURES: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("Validation loss", "validation_loss", lambda s: f"{s['validation_loss']:.3f}"),
    (
        "Parameters resident",
        "resident_parameters",
        lambda s: format_count(s["resident_parameters"]),
    ),
    ("… on disk", "disk_parameters", lambda s: format_count(s["disk_parameters"])),
    (
        "… loaded per token",
        "loaded_parameters_per_token",
        lambda s: format_count(s["loaded_parameters_per_token"]),
    ),
    ("Decoding, ms per token", "ms_per_token", lambda s: f"{s['ms_per_token']:.2f}"),
    ("… × dense", "ratio_to_dense", lambda s: f"{s['ratio_to_dense']:.2f}"),
    ("… 10 to 90 % of pairs", "ratio_spread", _spread),
    ("… ms waiting for table", "wait_ms_per_token", lambda s: f"{s['wait_ms_per_token']:.2f}"),
    ("Model's memory", "model_bytes", lambda s: format_bytes(s["model_bytes"])),
    ("Process's memory", "process_bytes", lambda s: format_bytes(s["process_bytes"])),
]


def format_count(number: float) -> str:
    """`18.4 k`, `11.5 M`, `4.71 G`: three digits."""
    for unit in ("", " k", " M", " G"):
        if number < 1000 or unit == " G":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def remarks(report: Report) -> list[str]:
    """What the table means, each in a sentence or two, by its numbers alone."""
    return [_on_loss(report), _on_speed(report), _on_bounds(report), _on_tokens(report)]


def _on_loss(report: Report) -> str:
    dense, mole = (report["training"][name] for name in ("dense", "mole"))
    gain = dense["validation_loss"] - mole["validation_loss"]
    relation = "lower" if gain > 0 else "higher"
    cost = dense["tokens_per_second"] / mole["tokens_per_second"]
    return (
        f"After the same {dense['tokens']:,} tokens MoLE's validation loss is {abs(gain):.3f} "
        f"{relation} than the dense model's (perplexity {mole['validation_perplexity']:.1f} and "
        f"{dense['validation_perplexity']:.1f}). Training took {cost:.2f} times as long per token; "
        "the two were trained one after the other, so other load on the machine is in this figure."
    )


def _on_speed(report: Report) -> str:
    disk = report["systems"]["mole_disk"]
    bypassed = (
        "past the page cache"
        if report["page_cache_bypassed"]
        else "through the page cache, because the file system has no direct reads (O_DIRECT)"
    )
    return (
        f"From disk a token takes {disk['ratio_to_dense']:.2f} times as long as with the dense "
        f"model: the median over {disk['steps']} pairs of neighbouring steps on held-out text. "
        f"Records were read {bypassed} ({disk['backend']}) and without a row cache."
    )


def _on_bounds(report: Report) -> str:
    """What the ratio is made of, so that nobody takes it for that of a large model."""
    memory, dense = (report["systems"][name] for name in ("mole_memory", "dense"))
    extra = memory["ms_per_token"] - dense["ms_per_token"]
    layers = report["sizes"]["num_layers"]
    return (
        f"With its table in memory MoLE takes {extra:+.2f} ms per token against dense, "
        f"{extra / layers * 1000:+.0f} µs per layer: a few small operations (router, softmax, "
        "weighted sum) whose time is mostly that of starting them, while the layer's own grows "
        "with its width. That bounds the ratio of so small a model; it says little of large ones."
    )


def _on_tokens(report: Report) -> str:
    agreement = report["agreement"]
    return (
        f"The trained experts and the table on disk gave the same {agreement['num_tokens']} "
        f"tokens greedily, after {agreement['num_prompts']} prompts: model and table are float32, "
        "so nothing is rounded on the way."
    )


def markdown(report: Report) -> str:
    """The whole report as `report.md`."""
    lines = ["# Lookup experts, measured by `mole demo`", ""]
    lines += _markdown_table([header(), *rows(report)])
    lines += ["", "![Validation loss and decoding speed](report.png)", ""]
    lines += [f"- {remark}" for remark in remarks(report)]
    lines += ["", "## A sample", "", *_sample(report["agreement"])]
    lines += ["", "## Measured on", "", *_markdown_table(_circumstances(report))]
    return "\n".join(lines) + "\n"


def _markdown_table(cells: list[list[str]]) -> list[str]:
    first, *rest = (f"| {' | '.join(row)} |" for row in cells)
    return [first, "|---" * len(cells[0]) + "|", *rest]


def _sample(agreement: dict[str, Any]) -> list[str]:
    """Prompt and continuations, indented, which is code in Markdown whatever they contain."""
    parts = (
        (
            "Held-out text (the prompt whose continuation repeats itself least):",
            agreement["prompt"],
        ),
        ("Continued by the trained experts:", agreement["experts_text"]),
        ("Continued by the table on disk:", agreement["table_text"]),
    )
    lines: list[str] = []
    for title, text in parts:
        lines += [title, "", *(f"    {line}" for line in shorten(text).splitlines()), ""]
    return lines


def shorten(text: str) -> str:
    """Its first lines; where there is nothing to see, the characters by their names."""
    if not text.strip():
        return repr(text)
    lines = text.rstrip().splitlines()
    return "\n".join(lines[:SAMPLE_LINES] + ["…"] * (len(lines) > SAMPLE_LINES))


def _circumstances(report: Report) -> list[list[str]]:
    machine, text, tokens, sizes = (report[key] for key in ("machine", "text", "tokens", "sizes"))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [
        ["", ""],
        ["Command", f"`{report['command']}`"],
        ["Date", machine["date"]],
        ["Machine", f"{machine['cpu']}, {machine['cores']} cores"],
        ["Memory", format_bytes(machine["memory_bytes"])],
        ["System", machine["system"]],
        ["Versions", versions],
        ["Commit", machine["commit"] or "not in a checkout"],
        ["Text", f"{text['source']}, {format_bytes(text['num_bytes'])}"],
        ["Tokens", f"{tokens['train_tokens']:,}, held out {tokens['validation_tokens']:,}"],
        [
            "Models",
            f"hidden size {sizes['hidden_size']}, {sizes['num_layers']} layers, "
            f"{sizes['num_experts']} routed experts per layer in MoLE, float32",
        ],
        ["Trained on", report["training"]["mole"]["device"]],
        ["Time taken", f"{sum(report['seconds'].values()):.0f} s"],
    ]


# ------------------------------------------------------------------------------------ terminal


def show_sample(agreement: dict[str, Any]) -> None:
    """The prompt, and what the experts and the table say next, side by side."""
    console = Console(stderr=True, highlight=False)
    width = max(30, (console.width - 3) // 2)
    console.print(Panel(Text(shorten(agreement["prompt"])), title="held-out text", box=box.SIMPLE))
    console.print(
        Columns(
            [
                Panel(Text(shorten(agreement[f"{name}_text"])), title=title, width=width)
                for name, title in (("experts", "trained experts"), ("table", "table on disk"))
            ]
        )
    )


def show_report(report: Report) -> None:
    """The table, on stdout, and what it means."""
    first, *others = header()
    table = Table(first, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for name in others:
        table.add_column(name, justify="right")
    for row in rows(report):
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    console.print(table)
    for remark in remarks(report):
        console.print(Text(f"• {remark}"))


# ------------------------------------------------------------------------------------- picture


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
    for name, words, color in (
        (DENSE, "Dense", SYSTEMS[0].color),
        (MOLE, "MoLE", SYSTEMS[3].color),
    ):
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
    bars = axes.bar(words, speeds, color=[system.color for system in SYSTEMS])
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_ylabel("milliseconds per token")
    axes.set_title("Decoding, one sequence: median step")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
