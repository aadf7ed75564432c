"""How often each token id occurs in text like that to come: kept beside a table, where known.

`token_counts.safetensors` in the table's folder is optional and holds one tensor, `counts` I64
[vocab_size]. It is written when the table is made (`reparameterize(..., token_counts=)`), and
says which records a row cache should begin with: see `TableReader.fill_cache`.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lookup_experts.errors import TableError
from lookup_experts.table.files import write_whole
from lookup_experts.table.joined import JoinedTable
from lookup_experts.table.opening import Table

COUNTS_NAME = "token_counts.safetensors"


def check_counts(counts: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise a `TableError` unless `counts` is int64 [vocab_size] without negative numbers."""
    if counts.shape != (vocab_size,) or counts.dtype != np.int64 or counts.min() < 0:
        raise TableError(
            f"{where}: expected a count from 0 up for each of {vocab_size} token ids as int64, "
            f"found {counts.dtype} {counts.shape}"
            + (f" with {counts.min()}." if counts.size and counts.min() < 0 else ".")
        )


def keep_counts(folder: Path, counts: np.ndarray | None, vocab_size: int) -> None:
    """Write int64 [vocab_size] beside the table in `folder`, all of it or none; with None, see that
    there are none.

    Raises:
        TableError: they aren't those of the table's ids.
    """
    if counts is None:
        (folder / COUNTS_NAME).unlink(missing_ok=True)  # of a run that was interrupted
        return
    check_counts(counts, vocab_size, "The token counts")
    # safetensors takes memory as it lies.
    write_whole(folder / COUNTS_NAME, save({"counts": np.ascontiguousarray(counts)}))


def read_counts(table: Table) -> np.ndarray | None:
    """The counts kept with a table, int64 [vocab_size]; None where there are none.

    Of a joined one those of its parts; ids of a part without any never occur.

    Raises:
        TableError: the file is damaged, or not of this table.
    """
    if isinstance(table, JoinedTable):
        counts = [read_counts(part) for part in table.parts]
        if all(one is None for one in counts):
            return None
        none = np.zeros(table.parts[0].layout.shape.vocab_size, np.int64)
        return np.concatenate([none if one is None else one for one in counts])
    path = table.folder / COUNTS_NAME
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TableError(f"{path}: can't be read: {error}.") from error
    if set(tensors) != {"counts"}:
        raise TableError(f"{path}: expected one tensor, counts, found {sorted(tensors)}.")
    check_counts(tensors["counts"], table.layout.shape.vocab_size, str(path))
    return tensors["counts"]


def most_frequent(counts: np.ndarray, limit: int) -> np.ndarray:
    """The ids that occur most often, int64 [at most `limit`], the most frequent first; ids of the
    same count in their order, ids that never occur not at all."""
    ids = np.argsort(-counts, kind="stable")[:limit]
    return ids[counts[ids] > 0]
