"""The tables of the study of forms, `mole bench quality --forms`; see `result_tables.py`."""

from collections.abc import Callable, Mapping, Sequence

from markdown_tables import Result, markdown, results_of

from lookup_experts.benchmarks.forms.summary import (
    DENSE,
    Mean,
    Trained,
    main_tokens,
    paper_of,
    tables_of,
    trained,
)

BUDGETS = (1, 4, 8, 16, 32, 64)
"""Parts of the bytes of the paper's table in bfloat16."""
ENCODINGS = ("bfloat16", "int8", "nf4", "nf3")


def forms(reports: Sequence[Result]) -> str:
    """A row for each system of the main stages, in the plan's order."""
    points = results_of(reports)
    systems = trained(points, main_tokens(points))
    wide = paper_of(systems)
    rows = []
    for name, system in systems.items():
        gain = _gain(system, systems)
        rows.append(
            [
                name,
                f"{system.first['learning_rate']:g}",
                str(len(system.points)),
                _shown(system.mean(_loss), ".4f"),
                _shown(gain, "+.4f"),
                _share(gain, wide, systems),
                _shown(_gain(system, systems, "loss_after_rare"), "+.3f"),
                _shown(_gain(system, systems, "loss_after_frequent"), "+.3f"),
                _recall(system),
            ]
        )
    header = [
        "system",
        "learning rate",
        "seeds",
        "loss",
        "gain over dense",
        "of MoLE-4E's gain",
        "gain after rare ids",
        "after frequent ids",
        "recall, nats",
    ]
    return markdown(header, rows)


def forms_bytes(reports: Sequence[Result]) -> str:
    """Bytes of each system's table and its share of the gain, a column for each encoding."""
    points = results_of(reports)
    systems = trained(points, main_tokens(points))
    wide = paper_of(systems)

    def cell(system: Trained, encoding: str) -> str:
        share_of_bytes = tables_of(system.first)[encoding]["share_of_bytes"]
        gain = _gain(system, systems, in_encoding=encoding)
        return f"{share_of_bytes:.1%} → {_share(gain, wide, systems)}"

    rows = [
        [name, *(cell(system, encoding) for encoding in ENCODINGS)]
        for name, system in systems.items()
        if tables_of(system.first)
    ]
    return markdown(["bytes → of MoLE-4E's gain", *ENCODINGS], rows)


def forms_budgets(reports: Sequence[Result]) -> str:
    """The best system and encoding within each budget of bytes."""
    points = results_of(reports)
    systems = trained(points, main_tokens(points))
    wide = paper_of(systems)
    candidates = [
        (tables_of(system.first)[encoding]["share_of_bytes"], gain, name, encoding)
        for name, system in systems.items()
        for encoding in tables_of(system.first)
        if (gain := _gain(system, systems, in_encoding=encoding)) is not None
    ]
    rows = []
    for divisor in BUDGETS:
        within = [found for found in candidates if found[0] <= 1 / divisor]
        if within:
            share, gain, name, encoding = max(within, key=lambda found: found[1].mean)
            part = "all" if divisor == 1 else f"1/{divisor}"
            shown = [f"{share:.1%}", _shown(gain, "+.4f"), _share(gain, wide, systems)]
            rows.append([part, name, encoding, *shown])
    header = ["of the bytes", "best form", "encoding", "bytes", "gain over dense"]
    return markdown([*header, "of MoLE-4E's gain"], rows)


def forms_longer(reports: Sequence[Result]) -> str:
    """The gain over dense along the longest runs, by their training loss, and at their end."""
    points = results_of(reports)
    tokens = max(point["tokens"] for point in points)
    systems = trained(points, tokens)
    rows = []
    for name, system in systems.items():
        if name == DENSE or DENSE not in systems:
            continue
        curves = [s.first["training_curve"] for s in (systems[DENSE], system)]
        leads = [dense - own for dense, own in zip(*curves, strict=True)]
        quarters = [leads[len(leads) * part // 4 - 1] for part in (1, 2, 3, 4)]
        in_nf4 = _gain(system, systems, in_encoding="nf4")
        rows.append(
            [
                name,
                *(f"{lead:+.3f}" for lead in quarters),
                _shown(_gain(system, systems), "+.4f"),
                _shown(in_nf4, "+.4f"),
                _recall(system),
            ]
        )
    after = [f"{tokens * part / 4 / 1e6:g} M" for part in (1, 2, 3, 4)]
    ends = ["held-out text", "in nf4", "recall, nats"]
    return markdown(["gain over dense", *(f"after {count}" for count in after), *ends], rows)


def forms_rates(reports: Sequence[Result]) -> str:
    """The search of learning rates: validation losses, one seed."""
    points = results_of(reports)
    tokens = main_tokens(points)
    by_system: dict[str, dict[float, float]] = {}
    for point in points:
        if point["tokens"] == tokens and "failed" not in point:
            losses = by_system.setdefault(point["system"], {})
            losses.setdefault(point["learning_rate"], point["validation_loss"])
    searched = {name: losses for name, losses in by_system.items() if len(losses) > 1}
    rates = sorted({rate for losses in searched.values() for rate in losses})
    rows = [
        [name, *(f"{losses[rate]:.4f}" if rate in losses else "" for rate in rates)]
        for name, losses in searched.items()
    ]
    return markdown(["learning rate", *(f"{rate:g}" for rate in rates)], rows)


# ------------------------------------------------------------------------------------ cells


def _loss(point: Result) -> float:
    return float(point["validation_loss"])


def _gain(
    system: Trained,
    systems: Mapping[str, Trained],
    loss: str = "validation_loss",
    in_encoding: str | None = None,
) -> Mean | None:
    if DENSE not in systems:
        return None

    def value(point: Result) -> float:
        where = point if in_encoding is None else tables_of(point)[in_encoding]
        return float(where[loss])

    return system.gain(systems[DENSE], value, loss)


def _share(gain: Mean | None, wide: Trained | None, systems: Mapping[str, Trained]) -> str:
    """A gain as a part of that of the paper's form in float32."""
    whole = None if wide is None else _gain(wide, systems)
    return "" if gain is None or whole is None else f"{gain.mean / whole.mean:.0%}"


def _shown(found: Mean | None, form: str) -> str:
    if found is None:
        return ""
    return f"{found.mean:{form}}" + ("" if found.std is None else f" ± {found.std:.4f}")


def _recall(system: Trained) -> str:
    """Of the nearest and the farthest distance."""
    if any("recall" not in point for point in system.points):
        return ""

    def nats(place: int) -> Callable[[Result], float]:
        return lambda point: float(point["recall"][place]["nats"])

    return f"{system.mean(nats(0)).mean:.2f} / {system.mean(nats(-1)).mean:.2f}"
