"""The tensors in a model folder's safetensors files, read by rows and left out of copies.

The safetensors package maps files into memory, where every page that is read counts as the
process's own; here a tensor of many gigabytes is read in pieces, and the rest of a file is copied
without being looked at. transformers knows which tensors of a checkpoint make up a module's weight.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import INDEX, WEIGHTS, weight_files
from lookup_experts.table.build import link_or_copy
from lookup_experts.table.files import read_exactly, write_whole
from lookup_experts.table.host_memory import aligned_buffer

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 2**27
_PIECE = 2**24
"""Bytes read or copied at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file."""
    num_bytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder, by name.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    found = {}
    for file in weight_files(folder):
        header, start = _read_header(file)
        for name, one in header.items():
            first, end = one["data_offsets"]
            found[name] = StoredTensor(
                file, name, one["dtype"], tuple(one["shape"]), start + first, end - first
            )
    return found


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(_MAX_HEADER, size):
            raise UserError(f"{file} can't be read as safetensors: its header is cut off.")
        text = opened.read(length)
    start = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = [one["data_offsets"][1] for one in header.values()]
        for one in header.values():
            first, end = one["data_offsets"]
            assert 0 <= first <= end
            dtype = _DTYPES.get(one["dtype"])
            assert dtype is None or end - first == math.prod(one["shape"]) * dtype.itemsize
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise UserError(f"{file} can't be read as safetensors: its header is damaged.") from error
    if start + max(ends, default=0) != size:
        raise UserError(
            f"{file} is incomplete: {size} bytes, expected {start + max(ends, default=0)}."
        )
    return header, start


def sources_of(model: Any, stored: Sequence[str], modules: Sequence[str]) -> dict[str, list[str]]:
    """Which tensors of a checkpoint make up the weight of each module, in their order.

    Args:
        model: as it would be loaded, on whatever device.
        stored: the names of the checkpoint's tensors.
        modules: names of modules of `model` that have a `weight`.

    Raises:
        UserError: a module's weight isn't in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    found: dict[str, list[str]] = {f"{module}.weight": [] for module in modules}
    for name in sorted(stored, key=_natural):
        prefix = model.base_model_prefix
        target, _ = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target = name
        if target in found:
            found[target].append(name)
    for module in modules:
        if not found[f"{module}.weight"]:
            raise UserError(
                f"The checkpoint has no tensor for the weight of {module}, so there is nothing to "
                "offload. Is it complete?"
            )
    return {module: found[f"{module}.weight"] for module in modules}


def _natural(name: str) -> list[Any]:
    """To sort by, numbers in names as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class StoredRows:
    """The rows of a matrix that lies in one tensor of a checkpoint, or in several one below the
    other.

    Args:
        module: what the matrix is the weight of, for messages.
        parts: the tensors.

    Raises:
        UserError: they are no matrices of floats of one width.
    """

    def __init__(self, module: str, parts: Sequence[StoredTensor]) -> None:
        self._module, self._parts = module, list(parts)
        first = parts[0]
        fits = all(
            len(part.shape) == 2 and part.shape[1] == first.shape[1] and part.dtype == first.dtype
            for part in parts
        )
        if not fits or first.dtype not in _DTYPES:
            shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts[:3])
            raise UserError(
                f"The weight of {module} in the checkpoint is {shapes}; expected a matrix of "
                f"{', '.join(_DTYPES)}. A quantised embedding can't be offloaded."
            )
        self.dtype = _DTYPES[first.dtype]
        self.width = first.shape[1]
        self.row_bytes = self.width * self.dtype.itemsize
        self._first_rows = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.num_rows = int(self._first_rows[-1])

    def read(self, first: int, stop: int) -> Tensor:
        """The rows `first` to `stop - 1`, [n, width]."""
        out = aligned_buffer((stop - first) * self.row_bytes)
        done = 0
        for part, begin in zip(self._parts, self._first_rows.tolist(), strict=False):
            low, high = max(first, begin), min(stop, begin + part.shape[0])
            if low < high:
                count = (high - low) * self.row_bytes
                with _opened(part.file) as fd:
                    target = out[done : done + count]
                    read_exactly(fd, target, part.start + (low - begin) * self.row_bytes, part.file)
                done += count
        return torch.from_numpy(out).view(self.dtype).view(stop - first, self.width)

    def take(self, ids: Tensor) -> Tensor:
        """The rows of ids int64 [n], [n, width]."""
        first, count = int(ids[0]), len(ids)
        if torch.equal(ids, torch.arange(first, first + count)):
            return self.read(first, first + count)
        return torch.cat([self.read(id_, id_ + 1) for id_ in ids.tolist()])

    def by_layer(self, layers: int) -> Callable[[Tensor], Iterator[Tensor]]:
        """As a `RowsOf`: one row [c, 1, r] per id and layer."""

        def rows_of(token_ids: Tensor) -> Iterator[Tensor]:
            yield from self.take(token_ids).unsqueeze(1).chunk(layers, dim=-1)

        return rows_of

    def fingerprint(self, progress: Callable[[int, int], None] | None = None) -> str:
        """SHA-256 over what it is the weight of, its dtype, shape and bytes."""
        digest = hashlib.sha256(
            f"{self._module} {self.dtype} {(self.num_rows, self.width)}\n".encode()
        )
        at_once = max(1, _PIECE // self.row_bytes)
        for first in range(0, self.num_rows, at_once):
            rows = self.read(first, min(first + at_once, self.num_rows))
            digest.update(rows.view(torch.uint8).numpy().data)
            if progress:
                progress(min(first + at_once, self.num_rows), self.num_rows)
        return digest.hexdigest()


class _opened:  # noqa: N801
    """A descriptor of a file for reading, closed in the end."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> int:
        self._fd = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def copy_weights_without(folder: Path, target: Path, left_out: set[str]) -> None:
    """Bring the weights of a model folder to another, but for some tensors.

    Files without any of these are linked where possible; the bytes of others are copied in pieces.

    Args:
        folder: of the model.
        target: where nothing of these names is yet.
        left_out: names of tensors.
    """
    kept: dict[str, str] = {}
    files = weight_files(folder)
    for file in files:
        header, _ = _read_header(file)
        names = [name for name in header if name not in left_out]
        kept |= dict.fromkeys(names, file.name)
        if len(names) == len(header):
            link_or_copy(file, target / file.name)
        elif names or len(files) == 1:
            _copy_without(file, target / file.name, left_out)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = kept
        sizes = stored_tensors(folder)
        index["metadata"] = {
            **(index.get("metadata") or {}),
            "total_size": sum(sizes[name].num_bytes for name in kept),
        }
        write_whole(target / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _copy_without(source: Path, target: Path, left_out: set[str]) -> None:
    header, start = _read_header(source)
    kept = sorted(
        (name for name in header if name not in left_out),
        key=lambda name: header[name]["data_offsets"],
    )
    shapes = {name: (header[name]["dtype"], header[name]["shape"]) for name in kept}
    sizes = {
        name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in kept
    }
    with source.open("rb") as read, target.open("wb") as written:
        written.write(safetensors_header(shapes, sizes))
        for name in kept:
            first, end = header[name]["data_offsets"]
            _copy_bytes(read, written, start + first, end - first)
        written.flush()
        os.fsync(written.fileno())


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], sizes: Mapping[str, int] | None = None
) -> bytes:
    """What a file of these tensors begins with; their bytes follow in this order.

    Args:
        tensors: dtype, as safetensors names it, and shape, by name.
        sizes: in bytes; needed for dtypes that torch doesn't have.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = sizes[name] if sizes else math.prod(shape) * _DTYPES[dtype].itemsize
        offsets = [offset, offset + size]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _copy_bytes(source: Any, target: Any, start: int, count: int) -> None:
    source.seek(start)
    while count:
        piece = source.read(min(_PIECE, count))
        target.write(piece)
        count -= len(piece)
