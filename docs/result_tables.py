"""The tables of results: a renderer for each kind of measurement, from reports to Markdown.

A report is a JSON file of `docs/results`. For another measurement write a function like those
below, mostly one call of `table`, and name it in `RENDERERS`.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

from markdown_tables import Column, Result, markdown, megabytes, results_of, table


def cache_budget(result: Result) -> str:
    return "none" if not result["cache_bytes"] else f"{result['cache_bytes'] / 1e6:.0f} MB"


SPEED: dict[str, Column] = {
    "encoding?": "{encoding}",
    "ms": "{ms_per_step:.1f}",
    "× dense": "{ratio_to_dense:.3f}",
    "10–90 % of pairs": "{spread[0]:.2f}–{spread[1]:.2f}",
    "read": megabytes("bytes_per_step"),
    "cache hits?": "{hit_rate:.0%}",
    "waited, ms": "{wait_ms:.2f}",
    "of memory's bandwidth?": "{share_of_memory_bandwidth:.0%}",
    "of the disk's bandwidth?": "{share_of_disk_bandwidth:.0%}",
}


def decode(reports: Sequence[Result]) -> str:
    """A row for each batch size and cache of `mole bench decode`."""
    columns = {"batch": "{batch}", "cache?": cache_budget, **SPEED}
    return table(results_of(reports, system="mole"), columns)


def prefill(reports: Sequence[Result]) -> str:
    """A row for each length of prompt of `mole bench prefill`."""
    columns = {"prompt": "{tokens:,} tokens", "cache?": cache_budget, **SPEED}
    return table(results_of(reports, system="mole"), columns)


def memory(reports: Sequence[Result]) -> str:
    """Resident bytes of `mole bench memory`."""
    columns: dict[str, Column] = {
        "": "{system}",
        "resident": megabytes("resident_bytes", ".0f"),
        "beyond dense": megabytes("beyond_dense_bytes", "+.1f"),
    }
    return table(results_of(reports), columns)


def read(reports: Sequence[Result]) -> str:
    """A row for each batch of `mole bench read`."""
    columns: dict[str, Column] = {
        "records": "{batch}",
        "encoding?": "{encoding}",
        "store?": "{store} ({backend})",
        "busy thread": lambda result: "yes" if result["busy_thread"] else "no",
        "ms": "{ms_per_batch:.2f}",
        "GB/s": "{gb_per_second:.2f}",
        "of large reads": "{share_of_disk_bandwidth:.0%}",
    }
    return table(results_of(reports), columns)


def build(reports: Sequence[Result]) -> str:
    """A row for each table of `mole bench build`."""
    columns: dict[str, Column] = {
        "encoding": "{encoding}",
        "table": megabytes("table_bytes", ",.0f"),
        "seconds": "{seconds:.0f}",
        "× the matrix products": "{ratio_to_matmul:.2f}",
        "memory beyond the model": megabytes("peak_bytes_beyond_model", ".0f"),
    }
    return table(results_of(reports), columns)


def losses(reports: Sequence[Result]) -> str:
    """Validation losses of several runs, a column for each."""
    runs = results_of(reports)
    steps = zip(*(run["validation"] for run in runs), strict=True)
    rows = (
        [f"{found[0]['tokens'] / 1e6:.2f} M tokens"]
        + [f"{each['validation_loss']:.3f}" for each in found]
        for found in steps
    )
    return markdown(["after", *(run["system"] for run in runs)], rows)


def quality(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench quality`; losses are means over the seeds."""

    def loss(result: Result) -> str:
        if "failed" in result:
            return result["failed"]
        spread = result.get("validation_loss_std")
        return f"{result['validation_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")

    columns: dict[str, Column] = {
        "system": "{system}",
        "seeds": lambda result: str(len(result["seeds"])),
        "tokens?": "{tokens:,}",
        "parameters, trained?": "{parameters[trained]:,}",
        "parameters, resident?": "{parameters[resident]:,}",
        "validation loss": loss,
        "training, tokens/s?": "{tokens_per_second:,.0f}",
    }
    return table(results_of(reports), columns)


def latency(reports: Sequence[Result]) -> str:
    """A row for each system and batch of `mole bench latency`."""

    def milliseconds(result: Result) -> str:
        return result["failed"] if "failed" in result else f"{result['ms_per_step']:.1f}"

    columns: dict[str, Column] = {
        "batch": "{batch}",
        "system": "{system}",
        "ms per step": milliseconds,
        "× dense?": "{ratio_to_dense:.2f}",
        "10–90 % of pairs?": "{spread[0]:.2f}–{spread[1]:.2f}",
        "tokens/s?": "{tokens_per_second:.1f}",
        "prompt, ms?": "{prefill_ms:.0f}",
        "loaded per step?": megabytes("bytes_per_step"),
        "stalled, ms?": "{stall_ms:.1f}",
        "experts loaded per layer?": "{experts_loaded_per_layer:.2f}",
        "resident?": megabytes("resident_bytes", ",.0f"),
        "beyond dense?": megabytes("beyond_dense_bytes", "+,.0f"),
    }
    return table(results_of(reports), columns)


def train(reports: Sequence[Result]) -> str:
    """A row for each system and micro batch of `mole bench train`."""
    columns: dict[str, Column] = {
        "system": lambda result: result["system"].replace("_", " "),
        "experts?": "{num_experts}",
        "tokens": "{tokens:,}",
        "micro batches?": "{accumulate}",
        "unique ids": "{unique:,.0f}",
        "s per step": "{seconds_per_step:.2f}",
        "× dense": "{ratio_to_dense:.2f}",
        "10–90 % of rounds": "{spread[0]:.2f}–{spread[1]:.2f}",
        "× dense by FLOPs": "{flop_ratio_to_dense:.2f}",
        "faster than per position?": "{speedup_over_per_position:.2f} ×",
        "faster than unshared?": "{speedup_over_unique:.2f} ×",
        "memory?": megabytes("peak_bytes", ",.0f"),
    }
    return table(results_of(reports), columns)


def upcycling(reports: Sequence[Result]) -> str:
    """A row for each way of training on."""

    def rate(result: Result) -> str:
        return "" if result["learning_rate"] is None else f"{result['learning_rate']:g}"

    columns: dict[str, Column] = {
        "what is trained": "{system}",
        "learning rate": rate,
        "tokens": "{tokens:,}",
        "parameters trained": "{parameters_trained:,}",
        "validation loss": "{validation_loss:.4f}",
        "gain": "{gain:+.4f}",
    }
    return table(results_of(reports), columns)


def encodings(reports: Sequence[Result]) -> str:
    """What each encoding costs."""

    def perplexity(result: Result) -> str:
        text = result["text"]
        change = text["perplexity"] / text["reference_perplexity"] - 1
        return f"{text['perplexity']:.2f} ({change:+.2%})"

    results = results_of(reports)
    reference = results[0]["text"]["reference_perplexity"]
    columns: dict[str, Column] = {
        "encoding": "{encoding}",
        "bytes, of float16": "{share_of_float16:.1%}",
        "error of rows": "{rows[relative_error]:.2%}",
        f"perplexity (experts: {reference:.2f})": perplexity,
        "KL, nats per token": "{text[kl_divergence]:.1e}",
        "same likeliest token": "{text[top1_agreement]:.2%}",
        "largest logit difference": "{text[largest_logit_difference]:.4f}",
    }
    return table(results, columns)


CAPACITIES = {1024: "1,024 records", 3640: "3,640 (256 MB)", 8192: "8,192"}


def cache_policies(reports: Sequence[Result]) -> str:
    """Hit rates, a column for each capacity."""

    def policy(result: Result) -> tuple[int, str]:
        return result["streams"], result["policy"]

    places = [policy(result) for result in results_of(reports)]
    rows = []
    for key, group in groupby(
        sorted(results_of(reports), key=lambda r: places.index(policy(r))), policy
    ):
        hits = {result["capacity"]: f"{result['hit_rate']:.1%}" for result in group}
        rows.append([str(key[0]), key[1], *(hits[capacity] for capacity in CAPACITIES)])
    return markdown(["streams", "policy", *CAPACITIES.values()], rows)


def evaluation(reports: Sequence[Result]) -> str:
    """The tables of `mole eval`, as the command prints them."""
    from lookup_experts.evaluation.summary import format_summaries

    return format_summaries(results_of(reports))


def readme_speed(reports: Sequence[Result]) -> str:
    """The ratios to dense of decoding with and without a cache, and of prompts."""
    rows = []
    for report in reports:
        found = results_of([report], system="mole")
        ratios = " / ".join(f"{result['ratio_to_dense']:.2f}" for result in found)
        rows.append([_speed_title(found), ratios])
    return markdown(["", "time, × dense"], rows)


def _speed_title(found: Sequence[Result]) -> str:
    if found[0]["what"] == "prefill":
        return f"prompts of {' / '.join(format(result['tokens'], ',') for result in found)} tokens"
    budget = cache_budget(found[0])
    cached = "no row cache" if budget == "none" else f"{budget} row cache"
    return f"decoding, batch {' / '.join(str(result['batch']) for result in found)}, {cached}"


def readme_beside(reports: Sequence[Result]) -> str:
    """Dense and MoLE beside each other: resident memory, and the last validation losses."""
    memory_report, training_report = reports
    held = [f"{result['resident_bytes'] / 1e6:.0f} MB" for result in results_of([memory_report])]
    runs = results_of([training_report])
    losses = [f"{run['validation'][-1]['validation_loss']:.2f}" for run in runs]
    after = f"validation loss of a small model, {runs[0]['tokens'] / 1e6:.1f} M tokens"
    return markdown(
        ["", "dense", "MoLE, table on disk"],
        [["resident memory, no row cache", *held], [after, *losses]],
    )


RENDERERS: dict[str, Callable[[Sequence[Result]], str]] = {
    "build": build,
    "cache-policies": cache_policies,
    "decode": decode,
    "encodings": encodings,
    "evaluation": evaluation,
    "latency": latency,
    "losses": losses,
    "memory": memory,
    "prefill": prefill,
    "quality": quality,
    "read": read,
    "readme-beside": readme_beside,
    "readme-speed": readme_speed,
    "train": train,
    "upcycling": upcycling,
}
