"""What `mole eval` found of one model or several, as JSON values and as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lookup_experts.evaluation.harness import Evaluation
from lookup_experts.evaluation.perplexity import Perplexity
from lookup_experts.evaluation.predictions import TextQuality
from lookup_experts.evaluation.recall import Recall
from lookup_experts.table.reader import ReaderStatistics


@dataclass(frozen=True)
class ModelSummary:
    """All that was asked of one model; None for what was not."""

    model: str
    """The folder, as it was given."""
    form: str
    """`dense`, `moe`, `experts` or `table`."""
    dtype: str
    tasks: Evaluation | None = None
    perplexity: Perplexity | None = None
    perplexity_unrounded: Perplexity | None = None
    """With the weights as they are in the folder, where `--weights` rounds them."""
    predictions: TextQuality | None = None
    """On the same text, against those of `reference`."""
    reference: str | None = None
    """The folder of the model that this one is compared with, as it was given."""
    recall: Recall | None = None
    reader: ReaderStatistics | None = None
    """What its table was asked for, by this process (an answer journal may hold more answers);
    None for a model without one."""
    linear_layers: str = ""
    """See `describe_linears`."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        text = None
        if self.perplexity is not None:
            text = {
                "perplexity": self.perplexity.perplexity,
                "nats_per_token": self.perplexity.nats_per_token,
                "predicted_tokens": self.perplexity.predicted_tokens,
                "context": self.perplexity.context,
            }
            if self.perplexity_unrounded is not None:
                text["perplexity_unrounded"] = self.perplexity_unrounded.perplexity
        predictions = None
        if self.predictions is not None:
            predictions = {"reference": self.reference, **asdict(self.predictions)}
        return {
            "model": self.model,
            "form": self.form,
            "dtype": self.dtype,
            "tasks": self.tasks.to_dict() if self.tasks else None,
            "perplexity": text,
            "predictions": predictions,
            "recall": self.recall.to_dict() if self.recall else None,
            "reader": self.reader.to_dict() if self.reader else None,
            "linear_layers": self.linear_layers,
        }


def format_summaries(results: Sequence[dict[str, Any]]) -> str:
    """Markdown tables of `ModelSummary.to_dict()`s, a column for each model."""
    parts = [
        table(results)
        for name, table in (
            ("tasks", tasks_table),
            ("perplexity", perplexity_table),
            ("predictions", predictions_table),
            ("recall", recall_table),
        )
        if results[0].get(name) is not None  # files of an earlier version lack some
    ]
    return "\n\n".join(parts)


def tasks_table(results: Sequence[dict[str, Any]]) -> str:
    """Accuracies in percent with their standard errors."""
    first = results[0]["tasks"]
    rows = []
    for number, score in enumerate(first["scores"]):
        for metric in score["metrics"]:
            cells = []
            for result in results:
                found = result["tasks"]["scores"][number]
                cells.append(
                    _with_error(metric, found["metrics"][metric], found["standard_errors"][metric])
                )
            rows.append([score["task"], metric, _rows(score), *cells])
    averages = [result["tasks"]["average"] for result in results]
    rows.append(
        [
            f"average of {first['average']['num_tasks']}",
            "acc",
            "",
            *(_with_error("acc", each["acc"], each["standard_error"]) for each in averages),
        ]
    )
    return _table(["task", "metric", "rows", *_columns(results)], rows)


def _rows(score: dict[str, Any]) -> str:
    num_rows, official = score["num_rows"], score["official_rows"]
    return f"{num_rows:,}" if num_rows == official else f"{num_rows:,} of {official:,}"


def _with_error(metric: str, value: float, error: float | None) -> str:
    if metric == "perplexity":
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
    return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def perplexity_table(results: Sequence[dict[str, Any]]) -> str:
    """Perplexity of a text."""
    first = results[0]["perplexity"]
    name = f"perplexity on {first['predicted_tokens']:,} tokens in windows of {first['context']:,}"
    rows = [[name, *(f"{result['perplexity']['perplexity']:.4f}" for result in results)]]
    if "perplexity_unrounded" in first:
        rows.append(
            ["with unrounded weights", *(_unrounded(each["perplexity"]) for each in results)]
        )
    return _table(["", *_columns(results)], rows)


def predictions_table(results: Sequence[dict[str, Any]]) -> str:
    """How far predictions on a text are from the reference's."""
    found = [result["predictions"] for result in results]
    first = found[0]
    name = (
        f"predictions of {first['predicted_tokens']:,} tokens in windows of {first['context']:,}, "
        f"against {first['reference']} (perplexity {first['reference_perplexity']:.4f})"
    )
    rows = [
        ["KL divergence, nats per token", *(f"{each['kl_divergence']:.2e}" for each in found)],
        ["same likeliest token", *(f"{100 * each['top1_agreement']:.2f} %" for each in found)],
        [
            "logits at most apart",
            *(f"{each['largest_logit_difference']:.2e}" for each in found),
        ],
    ]
    return _table([name, *_columns(results)], rows)


def _unrounded(text: dict[str, Any]) -> str:
    cost = text["perplexity"] / text["perplexity_unrounded"] - 1
    return f"{text['perplexity_unrounded']:.4f} (8 bits cost {100 * cost:+.2f} %)"


def recall_table(results: Sequence[dict[str, Any]]) -> str:
    """Accuracies in percent, and nats, over each distance that all models have."""
    recalls = [result["recall"] for result in results]
    rows = []
    for at_distance in zip(*(recall["distances"] for recall in recalls), strict=False):
        cells = [
            f"{100 * found['accuracy']:.1f} ± {100 * found['accuracy_error']:.1f}; "
            f"{found['nats']:.2f} ± {found['nats_error']:.2f}"
            for found in at_distance
        ]
        rows.append([f"{at_distance[0]['distance']} tokens", *cells])
    first = recalls[0]
    chance = f"{100 * first['chance_accuracy']:.1f}; {first['chance_nats']:.2f}"
    rows.append(["chance", *[chance] * len(recalls)])
    return _table(["recall over", *_columns(results)], rows)


def _columns(results: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{result['model']} ({result['form']})" for result in results]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
