"""What a trained model of the study is worth: its loss on held-out text, on what follows frequent
and rare ids, with its rows folded in each encoding, and what it recalls from its context."""

from typing import Any

import torch
from torch import Tensor

from lookup_experts.benchmarks.forms.every_id import MadeRows
from lookup_experts.benchmarks.forms.plan import Point
from lookup_experts.benchmarks.forms.systems import paper
from lookup_experts.benchmarks.forms.training import Text, Trainee, forward_nats
from lookup_experts.benchmarks.results import Result
from lookup_experts.evaluation.recall import measure_recall
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.model.wiring import routed_experts
from lookup_experts.table.encoding import get_encoding
from lookup_experts.training.models import count_parameters
from lookup_experts.training.recipe import ModelRecipe

ENCODINGS = ("bfloat16", "int8", "nf4", "nf3")
RARE_SHARE = 0.1
"""Rare are the least frequent ids that together make up that part of the training text."""
CURVE_POINTS = 20
SEQUENCES_AT_ONCE = 32


@torch.no_grad()
def measure(
    point: Point, trainee: Trainee, text: Text, sizes: ModelRecipe, words: Tensor | None
) -> Result:
    """Losses are nats per token; `tables` are the model's rows folded, `share_of_bytes` is of the
    paper's table in bfloat16.

    Args:
        words: what recall is measured with, see `word_ids`; None: not at all.
    """
    system, model = point.system, trainee.model.eval()
    result: Result = {
        "system": system.name,
        "form": system.form,
        "num_rows": system.num_rows,
        "row_size": system.row_size,
        "parts": list(system.parts),
        "widened_by": system.widened_by,
        "tokens": point.tokens,
        "seed": point.seed,
        "learning_rate": point.learning_rate,
        "parameters": vars(count_parameters(model)),
        "training_curve": _curve(trainee.losses),
    }
    if system.expert_size is not None:
        result["expert_size"] = system.expert_size
    if not bool(trainee.losses.isfinite().all()):
        result["failed"] = "the loss was no number any more"
        result["training_curve"] = []
        return result
    vocab_size = model.get_input_embeddings().weight.shape[0]
    is_rare = rare_ids(text.use)
    layers = _made_rows(model, vocab_size)
    result |= _losses(model, layers, text.held_out, is_rare)
    if layers:
        whole = paper(sizes.hidden_size).table_bytes(sizes, vocab_size, "bfloat16")
        result["tables"] = []
        for name in ENCODINGS:
            num_bytes = system.table_bytes(sizes, vocab_size, name)
            folded = [_as_stored(rows, name) for rows in layers]
            found = _losses(model, folded, text.held_out, is_rare)
            share = num_bytes / whole
            table = {"encoding": name, "bytes": num_bytes, "share_of_bytes": share, **found}
            result["tables"].append(table)
        model.set_expert_source(MadeRows(layers))
    if words is not None:
        recall = measure_recall(model, words, batch_size=256)
        result["recall"] = [
            {"distance": d.distance, "accuracy": d.accuracy, "nats": d.nats}
            for d in recall.distances
        ]
    return result


def _curve(losses: Tensor) -> list[float]:
    """Training loss, the mean of each twentieth of the steps: text that was new to the model."""
    return [
        round(float(part.mean()), 4)
        for part in losses.cpu().tensor_split(CURVE_POINTS)
        if len(part)
    ]


def rare_ids(use: Tensor) -> Tensor:
    """bool [V]: the least frequent ids, which make up `RARE_SHARE` of the text at most.

    Args:
        use: [V], how often each is there.
    """
    ascending = use.argsort(stable=True)
    together = use[ascending].cumsum(0)
    is_rare = torch.zeros(len(use), dtype=torch.bool)
    is_rare[ascending] = together <= RARE_SHARE * use.sum()
    return is_rare


def _made_rows(model: Any, vocab_size: int) -> list[Tensor]:
    """The rows of all ids, [N, V, r] for each layer; none of a dense model."""
    if not hasattr(model, "expert_source"):
        return []
    embedding = model.get_input_embeddings()
    rows_of = evaluate_experts(embedding, routed_experts(model))
    every = torch.arange(vocab_size, device=embedding.weight.device)
    return [rows.transpose(0, 1).contiguous() for rows in rows_of(every)]


def _as_stored(rows: Tensor, name: str) -> Tensor:
    """What is read of rows [N, V, r] that were written in an encoding; float32 as well."""
    encoding = get_encoding(name)
    num_rows, _, row_size = rows.shape
    records = encoding.encode(rows.transpose(0, 1).contiguous())
    return encoding.decode(records, num_rows, row_size, rows.dtype).transpose(0, 1).contiguous()


def _losses(model: Any, layers: list[Tensor], held_out: Tensor, is_rare: Tensor) -> Result:
    """Of all tokens, and of those that follow a rare id and a frequent one."""
    if layers:
        model.set_expert_source(MadeRows(layers))
    parts = [forward_nats(model, batch) for batch in held_out.split(SEQUENCES_AT_ONCE)]
    nats = torch.cat(parts).double().cpu()
    after_rare = is_rare[held_out[:, :-1].cpu()]
    return {
        "validation_loss": float(nats.mean()),
        "loss_after_rare": _mean(nats[after_rare]),
        "loss_after_frequent": _mean(nats[~after_rare]),
    }


def _mean(nats: Tensor) -> float | None:
    """None of nothing."""
    return float(nats.mean()) if len(nats) else None
