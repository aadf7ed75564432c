"""Tables of format version 1, by the rules of the text of that time and none of today's code."""

import json
import zlib
from pathlib import Path

import numpy as np


def stride_of(record_bytes: int) -> int:
    """Multiples of a block, or the next power of two from 64 up."""
    if record_bytes >= 4096:
        return (record_bytes + 4095) // 4096 * 4096
    stride = 64
    while stride < record_bytes:
        stride *= 2
    return stride


def write_version_1(
    folder: Path,
    layers: list[np.ndarray],
    shape: tuple[int, int, int, int],
    encoding: tuple[str, int | None],
    ids_per_shard: int,
    fingerprint: str = "a fingerprint",
    embedding_hash: str | None = None,
) -> np.ndarray:
    """Write a table, and give back its records, uint8 [V, stride].

    Args:
        layers: the encoded rows of each, uint8 [V, layer_bytes].
        shape: V, L, N, d.
        encoding: name and block size.
    """
    vocab_size, num_layers, num_experts, hidden_size = shape
    layer_bytes = layers[0].shape[1]
    record_bytes = num_layers * layer_bytes
    stride = stride_of(record_bytes)
    records = np.zeros((vocab_size, stride), np.uint8)
    records[:, :record_bytes] = np.concatenate(layers, axis=1)
    num_shards = -(-vocab_size // ids_per_shard)
    bounds = [vocab_size * number // num_shards for number in range(num_shards + 1)]
    shards = []
    for number in range(num_shards):
        first, end = bounds[number], bounds[number + 1]
        file = f"table-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        content = shard_bytes(records[first:end], first, fingerprint)
        (folder / file).write_bytes(content)
        shards.append(
            {"file": file, "first_id": first, "num_ids": end - first, "bytes": len(content)}
        )
    manifest = {
        "format": "lookup-experts table",
        "version": 1,
        "shape": {
            "vocab_size": vocab_size,
            "num_layers": num_layers,
            "num_experts": num_experts,
            "hidden_size": hidden_size,
        },
        "encoding": {"name": encoding[0], "block_size": encoding[1]},
        "layer_bytes": layer_bytes,
        "record_bytes": record_bytes,
        "stride": stride,
        "shards": shards,
        "fingerprint": fingerprint,
        "embedding_hash": embedding_hash,
        "tokenizer_hash": None,
        "created_by": "tests",
    }
    (folder / "table.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return records


def shard_bytes(records: np.ndarray, first_id: int, fingerprint: str) -> bytes:
    num_ids, stride = records.shape
    end = num_ids * stride
    header = {
        "__metadata__": {
            "format": "lookup-experts table shard",
            "version": "1",
            "first_id": str(first_id),
            "fingerprint": fingerprint,
        },
        "records": {"dtype": "U8", "shape": [num_ids, stride], "data_offsets": [0, end]},
        "crc32": {"dtype": "U32", "shape": [num_ids], "data_offsets": [end, end + 4 * num_ids]},
    }
    text = json.dumps(header).encode()
    checksums = np.array([zlib.crc32(record) for record in records], "<u4")
    return (4088).to_bytes(8, "little") + text.ljust(4088) + records.tobytes() + checksums.tobytes()
