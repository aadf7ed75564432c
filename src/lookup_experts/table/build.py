"""From experts, or from another table, to a table on disk: streaming, resumable, checked.

The vocabulary is taken in chunks of a fixed number of ids, so memory is bounded however large it
is. A chunk is evaluated layer by layer, encoded into one buffer of records and written by a
second thread while the next chunk is evaluated. Where the rows come from is a `RowsOf`: whatever
computes them, or the records of a finished table (`decode_records`).

While a build is under way the folder holds `build.json`, which says what is being built. A build
that was killed goes on with what the disk really holds, by its checksums; `table.json`, without
which the folder is no table, is written last. Several processes can build a table together
(`Ranks`): each writes shards of its own, and the bytes are those that one process writes.
"""

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lookup_experts import __version__
from lookup_experts.errors import DiskFullError, TableError
from lookup_experts.table.encoding import Encoding
from lookup_experts.table.files import UNFINISHED
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.layout import RecordLayout, ShardInfo, TableShape, plan_shards
from lookup_experts.table.manifest import TableManifest, read_manifest, write_manifest
from lookup_experts.table.opening import Table, open_table, read_checksums
from lookup_experts.table.progress import Progress
from lookup_experts.table.shard_writer import ShardWriter
from lookup_experts.table.store import RecordStore
from lookup_experts.table.store_choice import open_store
from lookup_experts.units import format_bytes

JOURNAL = "build.json"
UNFINISHED_JOURNAL = f"{JOURNAL}.tmp"
CHUNK_BUDGET_BYTES = 200 * 2**20
"""What one chunk may take: its two record buffers and the experts' activations."""
MAX_CHUNK_IDS = 4096
SAMPLE_IDS = 64
_THIS_TOOL = f"lookup-experts {__version__}"

RowsOf = Callable[[Tensor], Iterator[Tensor]]
"""Token ids [c] int64 -> the rows [c, N, r] of each layer, in order."""


@dataclass(frozen=True)
class Ranks:
    """The processes that build a table together, as one of them sees them."""

    rank: int = 0
    """Of this process, from 0."""
    count: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns when all of them have called it."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that does what only one can."""
        return self.rank == 0


ALONE = Ranks()


@dataclass(frozen=True)
class BuildPlan:
    """What is to be built, in which pieces; a build goes on only with an equal plan."""

    manifest: TableManifest
    chunk_ids: int
    source: str = "experts"
    """What the rows come from. The fingerprint tells experts from others; tables of the same
    experts have the same fingerprint, and are told apart here."""

    def to_json(self) -> str:
        return json.dumps(
            {
                "manifest": self.manifest.to_json(),
                "chunk_ids": self.chunk_ids,
                "source": self.source,
            }
        )

    def chunks(self) -> Iterator[tuple[ShardInfo, range]]:
        """(shard, ids) of every chunk, in order; none reaches over the end of a shard."""
        for shard in self.manifest.shards:
            end = shard.first_id + shard.num_ids
            for first in range(shard.first_id, end, self.chunk_ids):
                yield shard, range(first, min(first + self.chunk_ids, end))


def decode_records(store: RecordStore) -> RowsOf:
    """The rows of a finished table, float32, decoded from its records."""
    layout, shape = store.layout, store.layout.shape

    def rows_of(token_ids: Tensor) -> Iterator[Tensor]:
        ids = token_ids.numpy()
        records = aligned_buffer(len(ids) * layout.stride).reshape(len(ids), layout.stride)
        store.read(ids, records)
        for layer in range(shape.num_layers):
            codes = torch.from_numpy(records)[:, layout.layer_slice(layer)]
            yield layout.encoding.decode(codes, shape.num_experts, shape.row_size, torch.float32)

    return rows_of


def plan_table(
    shape: TableShape,
    encoding: Encoding,
    *,
    fingerprint: str,
    evaluation_bytes: int,
    embedding_hash: str | None = None,
    tokenizer_hash: str | None = None,
    chunk_budget_bytes: int = CHUNK_BUDGET_BYTES,
) -> BuildPlan:
    """What a table will be.

    Args:
        shape: of the table.
        encoding: how records store numbers.
        fingerprint: of everything that is folded.
        evaluation_bytes: what getting the rows of one id takes, layer by layer.
        embedding_hash: of the input embedding.
        tokenizer_hash: of the tokenizer that the ids belong to.
        chunk_budget_bytes: bounds memory beyond the model.
    """
    layout = RecordLayout(shape, encoding)
    manifest = TableManifest(
        layout=layout,
        shards=tuple(plan_shards(layout)),
        fingerprint=fingerprint,
        embedding_hash=embedding_hash,
        tokenizer_hash=tokenizer_hash,
        created_by=_THIS_TOOL,
    )
    return BuildPlan(manifest, _chunk_ids(layout, evaluation_bytes, chunk_budget_bytes))


def plan_reencoding(
    table: Table, encoding: Encoding, *, chunk_budget_bytes: int = CHUNK_BUDGET_BYTES
) -> BuildPlan:
    """What a finished table will be in another encoding; it stays that of the same experts.

    Args:
        table: where the rows come from, through `decode_records`.
        encoding: how the new records store numbers.
        chunk_budget_bytes: bounds memory.
    """
    shape = table.layout.shape
    layout = RecordLayout(shape, encoding)
    manifest = replace(
        table.manifest, layout=layout, shards=tuple(plan_shards(layout)), created_by=_THIS_TOOL
    )
    decoding_bytes = table.layout.stride + shape.num_experts * shape.row_size * 4 * 3
    chunk_ids = _chunk_ids(layout, decoding_bytes, chunk_budget_bytes)
    return BuildPlan(manifest, chunk_ids, source=f"table {_content_hash(table)}")


def _chunk_ids(layout: RecordLayout, source_bytes: int, budget_bytes: int) -> int:
    """How many ids a chunk may have, if getting the rows of one takes `source_bytes`."""
    # Encoding holds a few float32 copies of one layer's rows.
    encoding_bytes = layout.shape.num_experts * layout.shape.row_size * 4 * 4
    per_id = 2 * layout.stride + source_bytes + encoding_bytes
    return min(MAX_CHUNK_IDS, max(1, budget_bytes // per_id))


def _content_hash(table: Table) -> str:
    """SHA-256 over the checksums of all records: tables with other bytes have another."""
    digest = hashlib.sha256(table.layout.encoding.name.encode())
    for shard in table.shards:
        digest.update(read_checksums(table, shard).tobytes())
    return digest.hexdigest()


def build_table(
    folder: Path,
    plan: BuildPlan,
    rows_of: RowsOf,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Table:
    """Write the table that `plan` describes, or finish one that was begun.

    Args:
        folder: made if it isn't there; may hold an unfinished build of the same plan.
        plan: what to build.
        rows_of: where the rows come from.
        progress: called with (ids done, ids in all) after each chunk.
        ranks: the processes that call this together, on one folder.

    Raises:
        DiskFullError: not enough space; checked before the first chunk.
        TableError: the folder holds another build, or what was written doesn't read back.
    """
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _begin_or_go_on(folder, plan)
        for leftover in folder.glob(f"{UNFINISHED}*"):  # of a process that was killed
            leftover.unlink()
        _require_space(folder, plan.manifest)
    ranks.wait()
    _require_journal_of(folder, plan)
    with full_disk_as_user_error(folder):
        shards = plan.manifest.shards[ranks.rank :: ranks.count]
        _write_chunks(folder, plan, rows_of, _unwritten_chunks(folder, plan, shards), progress)
        ranks.wait()
        if ranks.is_main:
            write_manifest(folder, plan.manifest)
    ranks.wait()
    table = open_table(folder)
    if ranks.is_main:
        check_sample(table, rows_of)
        (folder / JOURNAL).unlink()
    ranks.wait()
    return table


def _begin_or_go_on(folder: Path, plan: BuildPlan) -> None:
    """See that the folder has a journal of this plan.

    A table that is finished counts as a build that is: it was, and what came after it failed.
    """
    path = folder / JOURNAL
    if not path.exists():
        is_table = (folder / MANIFEST_NAME).exists() and read_manifest(folder) == plan.manifest
        # A build that was killed before its first journal had its name has left its beginning.
        if not is_table and any(path.name != UNFINISHED_JOURNAL for path in folder.iterdir()):
            raise TableError(
                f"{folder} is not empty and holds no unfinished build; give an empty folder."
            )
        _write_journal(folder, plan)
    _require_journal_of(folder, plan)


def _require_journal_of(folder: Path, plan: BuildPlan) -> None:
    if _read_journal(folder / JOURNAL) != plan.to_json():
        raise TableError(
            f"{folder} holds an unfinished build of another table (other weights, encoding or "
            "version). Delete it to start anew."
        )


def _read_journal(path: Path) -> str:
    """The plan that it states."""
    try:
        journal = json.loads(path.read_text())
    except ValueError:
        journal = None
    plan = journal.get("plan") if isinstance(journal, dict) else None
    if not isinstance(plan, str):
        raise TableError(f"{path} is damaged. Delete {path.parent} to start anew.")
    return plan


@contextmanager
def full_disk_as_user_error(folder: Path) -> Iterator[None]:
    """Tell of a disk that is full while `folder` is written in one line, as `DiskFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{folder}: no space left ({error.strerror}). Free some; the build goes on from there."
        ) from error


def _write_journal(folder: Path, plan: BuildPlan) -> None:
    temporary = folder / UNFINISHED_JOURNAL
    temporary.write_text(json.dumps({"plan": plan.to_json()}))
    temporary.replace(folder / JOURNAL)


def _require_space(folder: Path, manifest: TableManifest) -> None:
    needed = 0
    for shard in manifest.shards:
        path = folder / shard.file
        held = path.stat().st_blocks * 512 if path.exists() else 0
        needed += max(0, shard.bytes - held)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"The table needs {format_bytes(needed)} more in {folder}, where {format_bytes(free)} "
            "are free. Free some space, choose another disk, or a smaller encoding."
        )


def _unwritten_chunks(
    folder: Path, plan: BuildPlan, shards: Sequence[ShardInfo]
) -> list[tuple[ShardInfo, range]]:
    """The chunks of some shards that the disk doesn't hold; what there is is read to know."""
    intact_end = {
        shard.file: shard.first_id + _intact_rows(folder, plan, shard) for shard in shards
    }
    return [
        (shard, ids)
        for shard, ids in plan.chunks()
        if shard.file in intact_end and ids.stop > intact_end[shard.file]
    ]


def _intact_rows(folder: Path, plan: BuildPlan, shard: ShardInfo) -> int:
    """How many records, from the first on. The checksum of one that wasn't written is wrong."""
    if not (folder / shard.file).exists():
        return 0
    with _shard_writer(folder, plan, shard) as writer:
        return writer.verified_rows(shard.num_ids)


def _shard_writer(folder: Path, plan: BuildPlan, shard: ShardInfo) -> ShardWriter:
    manifest = plan.manifest
    return ShardWriter(folder / shard.file, manifest.layout, shard, manifest.fingerprint)


def _write_chunks(
    folder: Path,
    plan: BuildPlan,
    rows_of: RowsOf,
    chunks: Sequence[tuple[ShardInfo, range]],
    progress: Progress | None,
) -> None:
    """Evaluate and write chunks.

    Evaluation and writing overlap: one chunk is being written while the next is evaluated, each
    in a buffer of its own.
    """
    layout = plan.manifest.layout
    vocab_size = layout.shape.vocab_size
    buffers = [np.zeros((plan.chunk_ids, layout.stride), np.uint8) for _ in range(2)]
    writing: Future[None] | None = None
    # Left in the opposite order: the thread has ended when the last shard is closed.
    with _OpenShard(folder, plan) as shards, ThreadPoolExecutor(1, "table-writer") as thread:
        for number, (shard, ids) in enumerate(chunks):
            records = buffers[number % 2][: len(ids)]
            encode_chunk(layout, rows_of, ids, records)
            if writing is not None:
                writing.result()
            writing = thread.submit(_write_chunk, shards, shard, ids, records)
            if progress:
                progress(ids.start, vocab_size)
        if writing is not None:
            writing.result()
        shards.finish()
    if progress:
        progress(vocab_size, vocab_size)


@torch.inference_mode()
def encode_chunk(layout: RecordLayout, rows_of: RowsOf, ids: range, records: np.ndarray) -> None:
    """Fill `records`, uint8 [c, stride], with the records of `ids`; padding stays as it is."""
    target = torch.from_numpy(records)
    for layer, rows in enumerate(rows_of(torch.arange(ids.start, ids.stop))):
        target[:, layout.layer_slice(layer)] = layout.encoding.encode(rows)


def _write_chunk(shards: "_OpenShard", shard: ShardInfo, ids: range, records: np.ndarray) -> None:
    shards.writer(shard).write(ids.start - shard.first_id, records)


class _OpenShard:
    """The writer of the shard that is being written; shards come one after the other."""

    def __init__(self, folder: Path, plan: BuildPlan) -> None:
        self._folder, self._plan = folder, plan
        self._writer: ShardWriter | None = None
        self._shard: ShardInfo | None = None

    def __enter__(self) -> "_OpenShard":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def writer(self, shard: ShardInfo) -> ShardWriter:
        """The writer of `shard`; the shard that was open before is finished."""
        if self._shard != shard or self._writer is None:
            self.finish()
            self._writer, self._shard = _shard_writer(self._folder, self._plan, shard), shard
        return self._writer

    def finish(self) -> None:
        """Bring the open shard to the disk."""
        if self._writer is not None:
            self._writer.finish()
            self._writer = None


@torch.inference_mode()
def check_sample(table: Table, rows_of: RowsOf, num_ids: int = SAMPLE_IDS) -> None:
    """Read records all over the table back and compare them with a new evaluation.

    Raises:
        TableError: a record differs by more than its encoding explains.
    """
    layout = table.layout
    shape = layout.shape
    ids = np.unique(np.linspace(0, shape.vocab_size - 1, num_ids).astype(np.int64))
    records = np.zeros((len(ids), layout.stride), np.uint8)
    # Past the page cache, which would only give back what was just handed to it.
    with open_store(table, "direct", notify=lambda message: None) as store:
        store.read(ids, records)
    read = torch.from_numpy(records)
    for layer, rows in enumerate(rows_of(torch.from_numpy(ids))):
        stored = read[:, layout.layer_slice(layer)]
        once_more = layout.encoding.encode(rows)
        found, expected = (
            layout.encoding.decode(codes, shape.num_experts, shape.row_size, torch.float32)
            for codes in (stored, once_more.to(stored.device))
        )
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        if not math.isfinite(error) or error > 0.01:
            raise TableError(
                f"{table.folder}: layer {layer} reads back with a relative error of {error:.2g} "
                "against what was written; the disk or the memory is not reliable. Build it again."
            )


def copy_table(source: Path, target: Path) -> None:
    """Put the table folder `source` at `target` too: linked where possible, else copied.

    A link at `target` to another table's folder gives way; that folder stays as it is.
    """
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(f"{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            link_or_copy(file, temporary / file.name)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    temporary.rename(target)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name where possible, else copy it; for files that nobody writes to.

    Of a symbolic link (the hub's cache is full of them) the file behind it is meant.
    """
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)  # not its mode: the copy of a read-only file is one's own
