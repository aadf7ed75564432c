"""What an encoding costs: bytes, the error of the rows, and what it does to the model's text.

A table is compared with what it was made from, the *reference*: the experts in training form, or
another table. For a text, the same model runs twice, with the rows of the reference and with
those of the table, so that nothing else can make a difference.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lookup_experts.evaluation.perplexity import (
    Progress,
    check_text,
    next_token_logits,
    window_size,
)
from lookup_experts.evaluation.predictions import TextQuality, compare_predictions
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.model.wiring import routed_experts
from lookup_experts.table.build import RowsOf, decode_records
from lookup_experts.table.encoding import ENCODINGS
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.opening import Table
from lookup_experts.table.reader import TableReader
from lookup_experts.table.store_choice import open_store
from lookup_experts.units import format_bytes

SAMPLE_IDS = 256
IDS_AT_ONCE = 32


@dataclass(frozen=True)
class RowError:
    """How far a table's rows are from the reference's, over a sample of ids."""

    sampled_ids: int
    relative_error: float
    """Norm of the difference divided by the norm of the reference, over all layers."""
    worst_layer: int
    """The layer, 0 to L - 1, whose own relative error is the largest."""
    worst_layer_error: float


@dataclass(frozen=True)
class Quality:
    """A report on one table."""

    encoding: str
    block_size: int | None
    record_bytes: int
    table_bytes: int
    """Of all records with their padding."""
    share_of_float16: float
    """Bytes of a record, divided by what it takes in float16."""
    rows: RowError
    text: TextQuality | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def quality_against_experts(
    table: Table,
    model: Any,
    token_ids: Tensor | None = None,
    progress: Progress | None = None,
) -> Quality:
    """The report on a table, against the experts of the model that was folded into it.

    Args:
        model: attached, in training form.

    See `measure_quality` for the rest.
    """
    experts = routed_experts(model)
    reference = evaluate_experts(model.get_input_embeddings(), experts)
    return measure_quality(table, reference, model, token_ids, progress)


def quality_against_table(
    table: Table,
    source: Table,
    model: Any = None,
    token_ids: Tensor | None = None,
    progress: Progress | None = None,
) -> Quality:
    """The report on a table that was re-encoded, against the table that it was made from.

    Args:
        model: attached, with the rows of `source`; for `token_ids`.

    See `measure_quality` for the rest.
    """
    with open_store(source, "direct", notify=lambda message: None) as store:
        return measure_quality(table, decode_records(store), model, token_ids, progress)


def measure_quality(
    table: Table,
    reference: RowsOf,
    model: Any = None,
    token_ids: Tensor | None = None,
    progress: Progress | None = None,
) -> Quality:
    """The report on a table.

    Args:
        table: what is measured.
        reference: the rows that it should hold.
        model: an attached model whose expert outputs come from the reference; for `token_ids`.
        token_ids: [n] int64, a text to compare on; None for none.
        progress: called with (tokens predicted, tokens in all).

    Raises:
        UserError: the text is not one for this model.
        TableError: the table can't be read.
    """
    layout = table.layout
    float16 = RecordLayout(layout.shape, ENCODINGS["float16"])
    text = None
    if token_ids is not None:
        text = compare_on_text(model, table, token_ids, window_size(model), progress=progress)
    return Quality(
        encoding=layout.encoding.name,
        block_size=layout.encoding.block_size,
        record_bytes=layout.record_bytes,
        table_bytes=layout.table_bytes,
        share_of_float16=layout.record_bytes / float16.record_bytes,
        rows=row_error(table, reference),
        text=text,
    )


@torch.inference_mode()
def row_error(table: Table, reference: RowsOf, num_ids: int = SAMPLE_IDS) -> RowError:
    """How far a table's rows are from the reference's.

    Args:
        num_ids: the size of the sample, spread evenly over the vocabulary.
    """
    shape = table.layout.shape
    ids = torch.from_numpy(
        np.unique(np.linspace(0, shape.vocab_size - 1, num_ids).astype(np.int64))
    )
    squares = torch.zeros(2, shape.num_layers, dtype=torch.float64)  # of differences, of reference
    with open_store(table, "direct", notify=lambda message: None) as store:
        rows_of = decode_records(store)
        for part in ids.split(IDS_AT_ONCE):
            pairs = zip(rows_of(part), reference(part), strict=True)
            for layer, (found, expected) in enumerate(pairs):
                expected = expected.cpu().double()
                squares[0, layer] += (found.double() - expected).square().sum()
                squares[1, layer] += expected.square().sum()
    # A layer of zeros, as experts are at first, is stored exactly: no error, whatever the norm.
    tiny = torch.finfo(torch.float64).tiny
    of_layers = (squares[0] / squares[1].clamp_min(tiny)).sqrt()
    difference, norm = squares.sum(dim=1).tolist()
    worst = int(of_layers.argmax())
    return RowError(
        len(ids), math.sqrt(difference / max(norm, tiny)), worst, float(of_layers[worst])
    )


def compare_on_text(
    model: Any,
    table: Table,
    token_ids: Tensor,
    context: int,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> TextQuality:
    """What a model makes of a text with the rows of a table, against its own rows.

    Args:
        model: an attached model in evaluation mode; it is left as it was.
        table: of the same experts.

    See `compare_predictions` for the rest.
    """
    check_text(model, token_ids, context)
    with open_source(table, model) as source:

        def with_table(inputs: Tensor) -> Tensor:
            with rows_from(source, model):
                return next_token_logits(model, inputs)

        return compare_predictions(
            partial(next_token_logits, model), with_table, token_ids, context, batch_size, progress
        )


@contextmanager
def open_source(table: Table, model: Any) -> Iterator[TableReader]:
    """The rows of a table for a model, read from the disk."""
    weight = model.get_input_embeddings().weight
    store = open_store(table, "direct", notify=lambda message: None)
    source = TableReader(table, store, weight.dtype, weight.device)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def rows_from(source: TableReader, model: Any) -> Iterator[None]:
    """Within it, a model's expert outputs come from `source`."""
    own = model.expert_source
    model.set_expert_source(source)
    try:
        yield
    finally:
        model.set_expert_source(own)


def format_quality(quality: Quality) -> str:
    """The report for a person."""
    rows, text = quality.rows, quality.text
    blocks = "" if quality.block_size is None else f" in blocks of {quality.block_size}"
    lines = [
        f"  encoding        {quality.encoding}{blocks}",
        f"  bytes           {format_bytes(quality.record_bytes)} per record, "
        f"{quality.share_of_float16:.1%} of float16; {format_bytes(quality.table_bytes)} in all, "
        "padding included",
        f"  rows            relative error {rows.relative_error:.2e} over {rows.sampled_ids} ids; "
        f"layer {rows.worst_layer} the worst, {rows.worst_layer_error:.2e}",
    ]
    if text is not None:
        lines += [
            f"  perplexity      {text.perplexity:.4f}, of the reference "
            f"{text.reference_perplexity:.4f}, on {text.predicted_tokens:,} tokens in windows of "
            f"{text.context:,}",
            f"  predictions     KL divergence {text.kl_divergence:.2e} nats per token, same "
            f"likeliest token {text.top1_agreement:.2%}, logits at most "
            f"{text.largest_logit_difference:.2e} apart",
        ]
    return "\n".join(lines)
