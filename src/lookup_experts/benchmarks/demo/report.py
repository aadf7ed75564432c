"""The report: one table, what it means, and on what it was measured.

A report is plain JSON values, as `report.json` has them. `rows` and `remarks` put it into words,
for the terminal and for `report.md` alike.
"""

from collections.abc import Callable
from typing import Any

from lookup_experts.benchmarks.demo.systems import SYSTEMS
from lookup_experts.units import format_bytes

Report = dict[str, Any]

NOT_APPLICABLE = "–"
SAMPLE_LINES = 12


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
