"""The experts of a mixture as a table: one record per expert, so that one read brings it whole.

It is a table of the format of `table/format.py`, with other things in the places of that text:

| there | here |
|---|---|
| a token id | an expert's number: layer times N, plus its number in the layer |
| a layer of a record | a matrix: first `up_proj` [D, d], then `down_proj` [d, D], row by row |
| experts x row size | D x d numbers, as they are in memory |

So it has that format's checksums, shards and fingerprint; the fingerprint is a hash over
the routers, which stay with the model. L layers, N experts, d hidden size, D size of an expert.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lookup_experts import __version__
from lookup_experts.errors import TableError, UserError
from lookup_experts.model.fingerprint import hash_tensors
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.layout import RecordLayout, TableShape, plan_shards
from lookup_experts.table.manifest import TableManifest, write_manifest
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.progress import Progress
from lookup_experts.table.shard_writer import ShardWriter

MATRICES = 2
"""Of an expert: up and down."""


def expert_layout(config: Any, dtype: torch.dtype) -> RecordLayout:
    """Where things lie in the record of an expert.

    Args:
        config: a `MoeGatelessLlamaConfig`.
        dtype: of the weights: float32, bfloat16 or float16.
    """
    shape = TableShape(
        config.num_hidden_layers * config.num_experts,
        MATRICES,
        config.intermediate_size,
        config.hidden_size,
    )
    return RecordLayout(shape, get_encoding(str(dtype).removeprefix("torch.")))


def matrices_of(record: Tensor, layout: RecordLayout) -> tuple[Tensor, Tensor]:
    """`up_proj` [D, d] and `down_proj` [d, D] in a record, uint8 [stride]; nothing is copied."""
    rows, columns = layout.shape.num_experts, layout.shape.row_size
    dtype = layout.encoding.torch_dtype
    assert dtype is not None
    up, down = (record[layout.layer_slice(matrix)].view(dtype) for matrix in range(MATRICES))
    return up.view(rows, columns), down.view(columns, rows)


def write_experts(model: Any, folder: Path | str, progress: Progress | None = None) -> Table:
    """Write the experts of a mixture of experts as a table.

    Args:
        model: a `MoeGatelessLlamaForCausalLM`.
        folder: a new one; an interrupted writing goes on.
        progress: called with (experts written, experts in all).

    Raises:
        UserError: the folder holds a finished table, or the disk is full.
    """
    layout = expert_layout(model.config, model.dtype)
    num_experts = model.config.num_experts

    def matrices(number: int) -> tuple[Tensor, Tensor]:
        experts = model.moe_layers[number // num_experts].experts
        return experts.up_proj[number % num_experts], experts.down_proj[number % num_experts]

    return write_expert_records(folder, layout, router_hash(model), matrices, progress)


@torch.no_grad()
def write_expert_records(
    folder: Path | str,
    layout: RecordLayout,
    fingerprint: str,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
    progress: Progress | None = None,
) -> Table:
    """As `write_experts`, from a function that gives the two matrices of each expert's number."""
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder} holds a table already; write the experts to a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = TableManifest(
        layout=layout,
        shards=tuple(plan_shards(layout)),
        fingerprint=fingerprint,
        embedding_hash=None,
        tokenizer_hash=None,
        created_by=f"lookup-experts {__version__}",
    )
    record = torch.zeros(layout.stride, dtype=torch.uint8)
    targets = matrices_of(record, layout)
    for shard in manifest.shards:
        with ShardWriter(folder / shard.file, layout, shard, fingerprint) as writer:
            for row in range(shard.num_ids):
                for target, matrix in zip(targets, matrices(shard.first_id + row), strict=True):
                    target.copy_(matrix)
                writer.write(row, record.numpy()[np.newaxis])
                if progress:
                    progress(shard.first_id + row + 1, layout.shape.vocab_size)
            writer.finish()
    write_manifest(folder, manifest)
    return open_table(folder)


def router_hash(model: Any) -> str:
    """What ties a table of experts to its model, which keeps the routers."""
    return hash_tensors(
        (f"{number}.router", ffn.router.weight) for number, ffn in enumerate(model.moe_layers)
    )


def check_belongs(table: Table, model: Any) -> None:
    """Raise a `TableError` unless the table holds the experts of this model, in its dtype."""
    expected = expert_layout(model.config, model.dtype)
    layout = table.layout
    if (layout.shape, layout.encoding) != (expected.shape, expected.encoding):
        raise TableError(
            f"{table.folder}: holds {_in_words(table.layout)}; this model has "
            f"{_in_words(expected)}. Write its experts with write_experts."
        )
    if table.manifest.fingerprint != router_hash(model):
        raise TableError(
            f"{table.folder}: holds the experts of another model (its fingerprint is that of other "
            "routers). Write this model's experts with write_experts."
        )


def _in_words(layout: RecordLayout) -> str:
    shape = layout.shape
    return (
        f"{shape.vocab_size} records of {shape.num_layers} x {shape.num_experts} x "
        f"{shape.row_size} numbers in {layout.encoding.name}"
    )
