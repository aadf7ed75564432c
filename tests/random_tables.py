"""Small tables of random numbers on disk, and their plain reading for comparison."""

import json
from pathlib import Path

import numpy as np
import torch
from version_1 import write_version_1

from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape, plan_shards
from lookup_experts.table.manifest import TableManifest, write_manifest
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.shard_writer import ShardWriter


def random_records(layout: RecordLayout, seed: int = 0) -> np.ndarray:
    """Valid records of the whole table, uint8 [V, stride]."""
    shape = layout.shape
    generator = torch.Generator().manual_seed(seed)
    records = np.zeros((shape.vocab_size, layout.stride), np.uint8)
    for layer in range(shape.num_layers):
        rows = torch.randn(shape.vocab_size, shape.num_experts, shape.row_size, generator=generator)
        records[:, layout.layer_slice(layer)] = layout.encoding.encode(rows).numpy()
    return records


def make_table(
    folder: Path,
    *,
    vocab_size: int = 40,
    num_layers: int = 2,
    num_experts: int = 2,
    row_size: int = 8,
    encoding: str = "float16",
    block_size: int | None = None,
    ids_per_shard: int | None = None,
    version: int = 2,
) -> tuple[Table, np.ndarray]:
    """A table of random numbers in `folder`, and its records, uint8 [V, stride]."""
    shape = TableShape(vocab_size, num_layers, num_experts, row_size)
    layout = RecordLayout(shape, get_encoding(encoding, block_size))
    records = random_records(layout)
    folder.mkdir(parents=True, exist_ok=True)
    if version == 1:
        layers = [records[:, layout.layer_slice(layer)] for layer in range(num_layers)]
        sizes = (vocab_size, num_layers, num_experts, row_size)
        stored = (encoding, layout.encoding.block_size)
        records = write_version_1(folder, layers, sizes, stored, ids_per_shard or vocab_size)
        return open_table(folder), records
    shards = plan_shards(layout, layout.shard_bytes(ids_per_shard or vocab_size))
    for shard in shards:
        with ShardWriter(folder / shard.file, layout, shard, "a fingerprint") as writer:
            writer.write(0, records[shard.first_id : shard.first_id + shard.num_ids])
            writer.finish()
    manifest = TableManifest(layout, tuple(shards), "a fingerprint", None, "a tokenizer", "tests")
    write_manifest(folder, manifest)
    return open_table(folder), records


def edit_json(path: Path, edit) -> None:
    """Change the object in a JSON file by calling `edit` with it."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def flip_bit(path: Path, offset: int) -> None:
    """Change one bit of the byte at `offset`."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
