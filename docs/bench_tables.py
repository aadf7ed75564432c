"""Tables of what `mole bench` measures; each function takes the reports that a command writes."""

from collections.abc import Callable, Sequence

from markdown_tables import (
    Column,
    Result,
    loss_over_seeds,
    markdown,
    megabytes,
    results_of,
    table,
)


def cache_budget(result: Result) -> str:
    return "none" if not result["cache_bytes"] else f"{result['cache_bytes'] / 1e6:.0f} MB"


def experts_of(result: Result) -> str:
    """A system of `mole bench train`, whose dense model has no experts."""
    words = [result["system"].replace("_", " ")]
    if "form" in result:
        words.append(result["form"])
    elif "num_experts" in result:
        words.append(f"{result['num_experts']} experts")
    if "row_size" in result:
        words.append(f"rows of {result['row_size']}")
    return ", ".join(words)


SPEED: dict[str, Column] = {
    "encoding?": "{encoding}",
    "weights?": "{dtype}",
    "linear layers?": "{weights}",
    "tokens/s?": "{tokens_per_second:,.1f}",
    "faster than plain?": "{speedup_over_plain:.2f} ×",
    "ms": "{ms_per_step:.1f}",
    "× dense": "{ratio_to_dense:.3f}",
    "10–90 % of pairs": "{spread[0]:.2f}–{spread[1]:.2f}",
    "read": megabytes("bytes_per_step"),
    "cache hits?": "{hit_rate:.0%}",
    "waited, ms": "{wait_ms:.2f}",
    "of memory's bandwidth?": "{share_of_memory_bandwidth:.0%}",
    "of the disk's bandwidth?": "{share_of_disk_bandwidth:.0%}",
    "of a plain product's FLOP/s?": "{share_of_matmul_flops:.0%}",
}


def decode(reports: Sequence[Result]) -> str:
    """A row for each batch size and cache of `mole bench decode`."""
    columns = {
        "batch": "{batch}",
        "cache?": cache_budget,
        "CUDA graphs?": lambda result: "yes" if result.get("cuda_graphs") else "no",
        **SPEED,
        "at the entrance, ms?": "{entrance_ms:.2f}",
        "in the blocks, ms?": "{blocks_ms:.2f}",
    }
    return table(results_of(reports, system="mole"), columns)


def prefill(reports: Sequence[Result]) -> str:
    """A row for each length of prompt of `mole bench prefill`."""
    columns = {"prompt": "{tokens:,} tokens", "cache?": cache_budget, **SPEED}
    return table(results_of(reports, system="mole"), columns)


def systems(reports: Sequence[Result]) -> str:
    """Tokens per second of everything that `mole bench decode` or `prefill` measured, peers too."""
    columns: dict[str, Column] = {
        "": lambda result: (
            f"batch {result['batch']}" if "batch" in result else f"{result['tokens']:,} tokens"
        ),
        "system": "{system}",
        "weights?": "{dtype}",
        "linear layers?": "{weights}",
        "tokens/s": "{tokens_per_second:,.1f}",
        "faster than plain?": "{speedup_over_plain:.2f} ×",
        "× dense?": "{ratio_to_dense:.3f}",
        "of memory's bandwidth?": "{share_of_memory_bandwidth:.0%}",
    }
    return table(results_of(reports), columns)


def memory(reports: Sequence[Result]) -> str:
    """Resident bytes of `mole bench memory`."""
    columns: dict[str, Column] = {
        "": "{system}",
        "resident": megabytes("resident_bytes", ".0f"),
        "beyond dense": megabytes("beyond_dense_bytes", "+.1f"),
    }
    return table(results_of(reports), columns)


def prompt_memory(reports: Sequence[Result]) -> str:
    """A row for each report of `mole bench memory --prompt`."""
    columns: dict[str, Column] = {
        "prompt": "{tokens:,} tokens",
        "unique ids": "{unique_ids:,}",
        "encoding?": "{encoding}",
        "store?": "{store}",
        "peak": megabytes("peak_bytes", ",.0f"),
        "rows of all layers at once": megabytes("rows_bytes", ",.0f"),
    }
    return table(results_of(reports), columns)


def read(reports: Sequence[Result]) -> str:
    """A row for each batch of `mole bench read`."""
    columns: dict[str, Column] = {
        "records": "{batch}",
        "batches under way?": "{under_way}",
        "encoding?": "{encoding}",
        "store?": "{store} ({backend})",
        "busy thread": lambda result: "yes" if result["busy_thread"] else "no",
        "interpreter switches after?": "{switch_interval_ms:g} ms",
        "ms": "{ms_per_batch:.2f}",
        "GB/s": "{gb_per_second:.2f}",
        "of large reads": "{share_of_disk_bandwidth:.0%}",
        "of plain random reads?": "{share_of_plain_reads:.0%}",
    }
    return table(results_of(reports), columns)


def build(reports: Sequence[Result]) -> str:
    """A row for each table of `mole bench build`."""
    columns: dict[str, Column] = {
        "encoding": "{encoding}",
        "table": megabytes("table_bytes", ",.0f"),
        "seconds": "{seconds:,.0f}",
        "matrix products, seconds": "{matmul_seconds:,.0f}",
        "× the matrix products": "{ratio_to_matmul:.2f}",
        "memory beyond the model": megabytes("peak_bytes_beyond_model", ",.0f"),
    }
    return table(results_of(reports), columns)


def train(reports: Sequence[Result]) -> str:
    """A row for each system and micro batch of `mole bench train`."""
    columns: dict[str, Column] = {
        "system": experts_of,
        "tokens": "{tokens:,}",
        "micro batches?": "{accumulate}",
        "unique ids": "{unique:,.0f}",
        "s per step": "{seconds_per_step:.2f}",
        "× dense": "{ratio_to_dense:.2f}",
        "10–90 % of rounds": "{spread[0]:.2f}–{spread[1]:.2f}",
        "× dense by FLOPs": "{flop_ratio_to_dense:.2f}",
        "faster than per position?": "{speedup_over_per_position:.2f} ×",
        "by FLOPs?": "{flop_speedup:.2f} ×",
        "faster than unshared?": "{speedup_over_unique:.2f} ×",
        "unshared, by FLOPs?": "{flop_speedup_over_unique:.2f} ×",
        "memory?": megabytes("peak_bytes", ",.0f"),
    }
    return table(results_of(reports), columns)


def trainer(reports: Sequence[Result]) -> str:
    """A row for each model and step of `mole bench train --trainer`."""
    columns: dict[str, Column] = {
        "system": experts_of,
        "tokens": "{tokens:,}",
        "s per step": "{seconds_per_step:.2f}",
        "bare loop, s": "{bare_seconds_per_step:.2f}",
        "× the bare loop": "{ratio_to_bare_loop:.3f}",
        "10–90 % of pairs": "{spread[0]:.2f}–{spread[1]:.2f}",
    }
    return table(results_of(reports), columns)


# ------------------------------------------------------------------------------------ serving


def _p50_p95(key: str) -> Callable[[Result], str]:
    """A column of two percentiles; empty where no token came."""

    def column(result: Result) -> str:
        found = result[key]
        return "" if found["p50"] is None else f"{found['p50']:,.0f} / {found['p95']:,.0f}"

    return column


SERVED: dict[str, Column] = {
    "first token, ms, median / 95 %": _p50_p95("ttft_ms"),
    "between tokens, ms, median / 95 %": _p50_p95("inter_token_ms"),
    "requests": "{requests:,}",
    "lost": "{lost}",
}


def serve(reports: Sequence[Result]) -> str:
    """A row for each system and number of streams of `mole bench serve`."""
    columns: dict[str, Column] = {
        "streams": "{streams}",
        "system": "{system}",
        "tokens/s": "{tokens_per_second:.1f}",
        "× dense": "{ratio_to_dense:.2f}",
        "× eager?": "{ratio_to_eager:.2f}",
        "× one table?": "{ratio_to_mole:.2f}",
        "beyond dense?": megabytes("beyond_dense_bytes", "+,.0f"),
        **SERVED,
    }
    return table(results_of(reports), columns)


def serve_by_streams(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench serve`, a column of tokens per second for each number of
    streams, and what the servers' processes hold after the most."""
    found = {(result["system"], result["streams"]): result for result in results_of(reports)}
    systems, streams = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))

    def speed(name: str, number: int) -> str:
        result = found.get((name, number))
        if result is None:
            return ""
        ratio = f" ({result['ratio_to_dense']:.2f} ×)" if name.startswith("mole") else ""
        return f"{result['tokens_per_second']:,.0f}{ratio}"

    def memory(name: str) -> list[str]:
        result = found.get((name, streams[-1]), {})
        if "resident_bytes" not in result:
            return ["", ""]
        beyond = f"{result['beyond_dense_bytes'] / 1e6:+.0f} MB"
        held = f"{result['resident_bytes'] / 1e6:,.0f} MB"
        return [held, beyond if name.startswith("mole") else ""]

    words = [f"{number} stream{'s' if number > 1 else ''}" for number in streams]
    return markdown(
        ["tokens/s (× dense)", *words, "resident", "beyond dense"],
        [[name, *(speed(name, number) for number in streams), *memory(name)] for name in systems],
    )


def soak(reports: Sequence[Result]) -> str:
    """A row for each report of `mole bench serve --soak`."""
    columns: dict[str, Column] = {
        "streams": "{streams}",
        "system?": "{system}",
        "minutes": "{soak_minutes:.0f}",
        "tokens/s": "{tokens_per_second:.1f}",
        **SERVED,
        "95 % between tokens, halves, ms": lambda result: " / ".join(
            "" if half is None else f"{half:,.0f}" for half in result["inter_token_ms_p95_halves"]
        ),
        "resident": megabytes("resident_bytes_after_warm_up", ",.0f"),
        "changed by at most": "{resident_bytes_change:.2%}",
    }
    return table(results_of(reports), columns)


# ------------------------------------------------------------------------- latency and quality


def _milliseconds(result: Result) -> str:
    """Of a decoding step, or why there is none."""
    return result["failed"] if "failed" in result else f"{result['ms_per_step']:.1f}"


def _without_host_copy(key: str, form: str) -> Column:
    """Bytes in MB, without the RAM in which offloaded experts lie: there it stands for storage."""
    return lambda result: f"{(result[key] - result.get('host_copy_bytes', 0)) / 1e6:{form}} MB"


def latency(reports: Sequence[Result]) -> str:
    """A row for each system and batch of `mole bench latency`."""
    columns: dict[str, Column] = {
        "batch": "{batch}",
        "system": "{system}",
        "weights?": "{dtype}",
        "ms per step": _milliseconds,
        "× dense?": "{ratio_to_dense:.2f}",
        "× MoLE?": "{ratio_to_mole:.2f}",
        "10–90 % of pairs?": "{spread[0]:.2f}–{spread[1]:.2f}",
        "tokens/s?": "{tokens_per_second:.1f}",
        "prompt, ms?": "{prefill_ms:,.0f}",
        "prompt, × dense?": "{prefill_ratio_to_dense:.2f}",
        "loaded per step?": megabytes("bytes_per_step"),
        "stalled, ms?": "{stall_ms:.1f}",
        "disk alone, ms?": "{disk_floor_ms:.1f}",
        "experts used per layer?": "{experts_used_per_layer:.2f}",
        "loaded per layer?": "{experts_loaded_per_layer:.2f}",
        "resident?": _without_host_copy("resident_bytes", ",.0f"),
        "beyond dense?": _without_host_copy("beyond_dense_bytes", "+,.0f"),
        "experts in RAM beside?": megabytes("host_copy_bytes", ",.0f"),
    }
    return table(results_of(reports), columns)


def latency_by_batch(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench latency`, a column of times for each batch."""

    def time_of(result: Result) -> str:
        if "failed" in result:
            return result["failed"]
        return f"{result['ms_per_step']:,.0f} ms ({result['ratio_to_dense']:.2f} ×)"

    found = {(result["system"], result["batch"]): result for result in results_of(reports)}
    systems, batches = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    return markdown(
        ["ms per step (× dense)", *(f"batch {batch}" for batch in batches)],
        [[name, *(time_of(found[name, batch]) for batch in batches)] for name in systems],
    )


def quality(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench quality`; losses are means over the seeds."""

    def loss(result: Result) -> str:
        if "failed" in result:
            return result["failed"]
        return loss_over_seeds(result)

    def seeds(result: Result) -> str:
        if "failed" in result:
            return str(len(result["seeds"]))
        failures = [f"seed {f['seed']}: {f['why']}" for f in result.get("failures", [])]
        return "; ".join([str(len(result["seeds"])), *failures])

    columns: dict[str, Column] = {
        "system": "{system}",
        "seeds": seeds,
        "tokens?": "{tokens:,}",
        "parameters, trained?": "{parameters[trained]:,}",
        "active?": "{parameters[active]:,}",
        "resident?": "{parameters[resident]:,}",
        "validation loss": loss,
        "table − experts, nats?": "{table_difference:.1e}",
        "training, minutes?": lambda result: f"{result['training_seconds'] / 60:.1f}",
        "tokens/s?": "{tokens_per_second:,.0f}",
    }
    return table(results_of(reports), columns)


def quality_curves(reports: Sequence[Result]) -> str:
    """Validation loss against tokens of `mole bench quality`, a column for each system."""
    trained = [result for result in results_of(reports) if "curve" in result]
    rows = (
        [f"{points[0][0] / 1e6:.2f} M tokens", *(f"{loss:.3f}" for _, loss in points)]
        for points in zip(*(result["curve"] for result in trained), strict=True)
    )
    return markdown(["after", *(result["system"] for result in trained)], rows)


def scale(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench scale`."""

    def recalled(result: Result) -> str:
        distances = result["recall"]["distances"]
        return ", ".join(f"{at['distance']}: {at['accuracy']:.0%}" for at in distances)

    columns: dict[str, Column] = {
        "system": "{system}",
        "tokens?": "{tokens:,}",
        "parameters, trained?": "{parameters[trained]:,}",
        "resident?": "{parameters[resident]:,}",
        "validation loss": lambda result: (
            result.get("failed") or f"{result['validation_loss']:.4f}"
        ),
        "tokens/s?": "{tokens_per_second:,.0f}",
        "time, × dense?": "{ratio_to_dense:.2f}",
        "FLOPs, × dense?": "{flop_ratio_to_dense:.2f}",
        "memory?": megabytes("peak_bytes", ",.0f"),
        "recall over distances?": recalled,
    }
    return table(results_of(reports), columns)


def lead_curves(reports: Sequence[Result]) -> str:
    """Dense's validation loss against tokens, and how many nats below it each other system is."""
    trained = [result for result in results_of(reports) if "curve" in result]
    dense, *others = sorted(trained, key=lambda result: result["system"] != "dense")
    losses = [dict(result["curve"]) for result in others]
    rows = [
        [
            f"{tokens / 1e6:.2f} M tokens",
            f"{loss:.3f}",
            *(f"{loss - found[tokens]:+.3f}" if tokens in found else "" for found in losses),
        ]
        for tokens, loss in dense["curve"]
    ]
    return markdown(["after", dense["system"], *(r["system"] for r in others)], rows)


ABLATIONS: dict[str, dict[str, float | None]] = {
    "path": {
        "MoE: 2 of 10 experts": 40.3,
        "all 10 active": 41.8,
        "1 shared and 4 routed experts of twice the size, all active": 41.5,
        "routed experts see the embedding: MoLE": 40.8,
    },
    "losses": {
        "of the language model alone": 41.9,
        "and load balance": 41.7,
        "and z-loss": 40.6,
    },
    "size": {"d": 40.8, "4d": 41.9, "16d": 41.7},
    "number": {"2": 39.7, "4": 40.8, "8": None, "16": 41.9, "32": 42.3},
}
"""The paper's ablations (section 4.3), in the order of `mole bench quality --ablation`: what each
system is, and its average accuracy over eight tasks there, in percent."""


def ablation(name: str, reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench quality --ablation NAME`, beside the paper's figure."""
    found = zip(ABLATIONS[name].items(), results_of(reports), strict=True)
    rows = [{**result, "what": what, "paper": paper} for (what, paper), result in found]
    columns: dict[str, Column] = {
        name: "{what}",
        "paper, accuracy": lambda row: "" if row["paper"] is None else f"{row['paper']:.1f}",
        "validation loss": lambda row: row.get("failed") or loss_over_seeds(row),
        "seeds": lambda row: str(len(row["seeds"])),
        "parameters, trained?": "{parameters[trained]:,}",
        "resident?": "{parameters[resident]:,}",
    }
    return table(rows, columns)
