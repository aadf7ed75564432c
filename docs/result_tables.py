"""The tables of results: a renderer for each kind of measurement, from reports to Markdown.

A report is a JSON file of `docs/results`. For another measurement write a function like those
here and in `bench_tables.py`, mostly one call of `table`, and name it in `RENDERERS`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import bench_tables as bench
import embedding_tables as embeddings
import forms_tables as forms
from bench_tables import cache_budget
from markdown_tables import Column, Result, loss_over_seeds, markdown, results_of, table


def upcycling(reports: Sequence[Result]) -> str:
    """A row for each way of training on."""

    def rates(result: Result) -> str:
        return ", ".join(f"{rate:g}" for rate in result["learning_rates"])

    columns: dict[str, Column] = {
        "what is trained": "{system}",
        "learning rate?": rates,
        "tokens?": "{tokens:,}",
        "parameters trained?": "{parameters_trained:,}",
        "seeds?": "{seeds}",
        "validation loss": loss_over_seeds,
        "gain?": "{gain:+.4f}",
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
    """Hit rates of `mole bench cache`, over all and at first, a column for each capacity; of the
    default ones, three."""

    def policy(result: Result) -> tuple[int, str]:
        return result["streams"], result["policy"]

    measured = sorted({result["capacity"] for result in results_of(reports)})
    capacities = [size for size in measured if size in CAPACITIES] or measured
    places = [policy(result) for result in results_of(reports)]
    rows = []
    for key, group in groupby(
        sorted(results_of(reports), key=lambda r: places.index(policy(r))), policy
    ):
        hits = {
            result["capacity"]: f"{result['hit_rate']:.1%} / {result['hit_rate_at_first']:.1%}"
            for result in group
        }
        rows.append([str(key[0]), key[1], *(hits[capacity] for capacity in capacities)])
    names = [CAPACITIES.get(capacity, f"{capacity:,} records") for capacity in capacities]
    return markdown(["streams", "policy", *names], rows)


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
    encoding = found[0]["encoding"]
    table = "" if encoding == "bfloat16" else f", {encoding} table"
    if found[0]["what"] == "prefill":
        lengths = " / ".join(format(result["tokens"], ",") for result in found)
        return f"prompts of {lengths} tokens{table}"
    budget = cache_budget(found[0])
    cached = "no row cache" if budget == "none" else f"{budget} row cache"
    sizes = " / ".join(str(result["batch"]) for result in found)
    return f"decoding, batch {sizes}, {cached}{table}"


def readme_quality(reports: Sequence[Result]) -> str:
    """Sizes and validation losses of `mole bench quality`, a column for each system."""
    results = results_of(reports)
    tokens = results[0]["tokens"] / 1e6
    rows = {
        "parameters per token": "{parameters[active]:,}",
        "resident while generating": "{parameters[resident]:,}",
        f"validation loss after {tokens:.1f} M tokens": "{validation_loss:.3f} "
        "± {validation_loss_std:.3f}",
    }
    return markdown(
        ["", *(result["system"] for result in results)],
        [[name, *(form.format(**result) for result in results)] for name, form in rows.items()],
    )


RENDERERS: dict[str, Callable[[Sequence[Result]], str]] = {
    **{f"ablation-{name}": partial(bench.ablation, name) for name in bench.ABLATIONS},
    "build": bench.build,
    "cache-policies": cache_policies,
    "decode": bench.decode,
    "systems": bench.systems,
    "embedding-memory": embeddings.embedding_memory,
    "embedding-steps": embeddings.embedding_steps,
    "encodings": encodings,
    "evaluation": evaluation,
    "forms": forms.forms,
    "forms-budgets": forms.forms_budgets,
    "forms-bytes": forms.forms_bytes,
    "forms-longer": forms.forms_longer,
    "forms-rates": forms.forms_rates,
    "latency": bench.latency,
    "latency-by-batch": bench.latency_by_batch,
    "lead-curves": bench.lead_curves,
    "memory": bench.memory,
    "prefill": bench.prefill,
    "prompt-memory": bench.prompt_memory,
    "quality": bench.quality,
    "quality-curves": bench.quality_curves,
    "read": bench.read,
    "readme-quality": readme_quality,
    "readme-speed": readme_speed,
    "scale": bench.scale,
    "serve": bench.serve,
    "serve-by-streams": bench.serve_by_streams,
    "soak": bench.soak,
    "train": bench.train,
    "trainer": bench.trainer,
    "upcycling": upcycling,
}
