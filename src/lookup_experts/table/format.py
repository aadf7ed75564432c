"""The table on disk, format version 2. This text is the specification.

A table is a folder: `table.json` and shards `table-00001-of-0000n.safetensors`, split by token id.

A table holds rows of numbers by id. Of lookup experts, an id is a token's, and has N rows for each
of L layers; of an embedding of a released model, the row of an id is cut into a part for each of L
layers (N is 1), or is one (L is 1), and an id may be a hash of several tokens.

**Record.** All that the table holds for one id: layer after layer, each as its encoding
lays it out (`encoding.py`): the codes of the N experts, then their scales. Records lie densely: a
record is padded with zeros to the *stride*, the next multiple of 16 bytes, and may straddle blocks
of the disk. Sixteen, because a processor or a GPU then loads floats and words of up to 16 bytes at
their own alignment. More, such as the 128 bytes of a GPU's cache lines, would cost a narrow record
of a few hundred bytes a tenth of the file, to save it a line or none when it is fetched; whoever
wants that lays records out wider in memory.

**Shard.** A valid safetensors file, so any reader of that format opens it.

| bytes | content |
|---|---|
| 0 to 8 | 4088, the length of the JSON header, uint64 little-endian |
| 8 to 4096 | JSON, padded with spaces: tensors `records` U8 [ids, stride], `crc32` U32 [ids] |
| from 4096 | the records, in the order of their ids |
| after them | for each record the CRC-32 of zlib over all `stride` bytes, uint32 little-endian |

`__metadata__` of the header holds, as strings, `format`, `version`, `first_id`, `fingerprint`.

**table.json.** One JSON object with exactly these keys: `format`, `version`; `shape` (vocab_size,
num_layers, num_experts, row_size); `encoding` (name, block_size or null); `layer_bytes`,
`record_bytes`, `stride`; `shards`, a list of (file, first_id, num_ids, bytes); `fingerprint`, a
hash of the weights that the rows were made from; `embedding_hash` and `tokenizer_hash`,
strings or null; `created_by`, the tool and its version.

- Other versions and unknown keys are refused, because a reader that guesses gives wrong numbers.
- Sizes that follow from others are written and checked, so that a hand-edited file is noticed.
- The header has one length, because records must start at a multiple of 4096.
- A shard repeats fingerprint and first id, so that shards of two tables, or two shards of one,
  can't be exchanged unnoticed. Shard names are fixed, so that no path leads out of the folder.
- Shards cover the ids 0 to V-1 in order, without holes. Duplicate keys are refused.
- Checksums cover the padding, so that every byte of `records` is either verified or damaged.
  The checksum of a record that was never written, zero, doesn't match its zero bytes.
- How often each id occurs may be kept in a file beside these; see `counts.py`.

**Version 1** is read and verified, but no longer written. It differs in two things: `row_size` is
called `hidden_size`, and the stride is the next multiple of 4096 bytes if a record is that large,
else the next power of two from 64 up, so that no record straddles a block that it could fit into.

| where | what |
|---|---|
| `layout.py` | where things lie in a record, and records in shards |
| `manifest.py` | `table.json` |
| `shard.py`, `shard_writer.py` | the header and the checksums of a shard; writing one |
| `opening.py`, `verifying.py` | the checks on opening; reading every record |
| `store.py` | reading records by id |
| `build.py` | filling a table |
"""

import numpy as np

FORMAT = "lookup-experts table"
VERSION = 2
"""What is written."""
READABLE_VERSIONS = (1, 2)
MANIFEST_NAME = "table.json"

BLOCK = 4096
"""Bytes. What direct I/O asks offsets, lengths and addresses to be multiples of, on any disk."""
DATA_START = BLOCK
"""Where the records start in a shard: after the eight bytes and the padded header."""
ALIGNMENT = 16
"""Bytes. Records start at multiples of it."""
MAX_RECORD_BYTES = 2**30
"""A record is one read, and Linux reads at most 2 GiB at once."""
MAX_TEXT = 256
"""Characters of a hash or a version; bounds the header of a shard."""
MAX_MANIFEST_BYTES = 2**24
CHECKSUM = np.dtype("<u4")
