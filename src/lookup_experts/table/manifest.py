"""`table.json`: what a table says of itself, read with distrust and written in full."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from lookup_experts.errors import TableError, UserError
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.files import write_whole
from lookup_experts.table.format import FORMAT, MANIFEST_NAME, MAX_MANIFEST_BYTES, READABLE_VERSIONS
from lookup_experts.table.json_fields import Fields, parse_json
from lookup_experts.table.layout import RecordLayout, ShardInfo, TableShape, shard_name

_ROW_SIZE = {1: "hidden_size", 2: "row_size"}
"""What each version calls the size of a row."""


@dataclass(frozen=True)
class TableManifest:
    """What `table.json` says."""

    layout: RecordLayout
    shards: tuple[ShardInfo, ...]
    fingerprint: str
    """Hash of the embedding and expert weights that were folded."""
    embedding_hash: str | None
    tokenizer_hash: str | None
    created_by: str

    def to_json(self) -> str:
        """The text of `table.json`."""
        encoding, version = self.layout.encoding, self.layout.version
        shape = asdict(self.layout.shape)
        shape[_ROW_SIZE[version]] = shape.pop("row_size")
        content = {
            "format": FORMAT,
            "version": version,
            "shape": shape,
            "encoding": {"name": encoding.name, "block_size": encoding.block_size},
            "layer_bytes": self.layout.layer_bytes,
            "record_bytes": self.layout.record_bytes,
            "stride": self.layout.stride,
            "shards": [asdict(shard) for shard in self.shards],
            "fingerprint": self.fingerprint,
            "embedding_hash": self.embedding_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "created_by": self.created_by,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Self:
        """The manifest in `text`.

        Raises:
            TableError: anything that isn't exactly as specified, naming `where` and the field.
        """
        fields = Fields(parse_json(text, where), where)
        fields.must_be("format", FORMAT)
        layout = _layout_from(fields, fields.one_of("version", READABLE_VERSIONS))
        for size in ("layer_bytes", "record_bytes", "stride"):
            fields.must_be(size, getattr(layout, size))
        manifest = cls(
            layout=layout,
            shards=_shards_from(fields, layout),
            fingerprint=fields.text("fingerprint"),
            embedding_hash=fields.text_or_null("embedding_hash"),
            tokenizer_hash=fields.text_or_null("tokenizer_hash"),
            created_by=fields.text("created_by"),
        )
        fields.end()
        return manifest


def _layout_from(fields: Fields, version: int) -> RecordLayout:
    shape, encoding = fields.inner("shape"), fields.inner("encoding")
    names = ("vocab_size", "num_layers", "num_experts", _ROW_SIZE[version])
    sizes = [shape.integer(name) for name in names]
    shape.end()
    name, block_size = encoding.text("name"), encoding.take("block_size")
    encoding.end()
    try:
        layout = RecordLayout(TableShape(*sizes), get_encoding(name, block_size), version)
    except UserError as error:
        raise TableError(f"{fields.where}: {error}") from error
    if layout.encoding.block_size != block_size:
        raise encoding.error("block_size", f"is {block_size!r}, expected a number for {name}")
    return layout


def _shards_from(fields: Fields, layout: RecordLayout) -> tuple[ShardInfo, ...]:
    listed = fields.take("shards")
    if not isinstance(listed, list) or not listed:
        raise fields.error("shards", "must be a list of at least one shard")
    shards: list[ShardInfo] = []
    next_id = 0
    for number, content in enumerate(listed, start=1):
        shard = Fields(content, fields.where, f"shards[{number - 1}]")
        shards.append(_shard_from(shard, layout, shard_name(number, len(listed)), next_id))
        next_id += shards[-1].num_ids
    if next_id != layout.shape.vocab_size:
        raise fields.error("shards", f"hold {next_id} ids, expected {layout.shape.vocab_size}")
    return tuple(shards)


def _shard_from(fields: Fields, layout: RecordLayout, file: str, first_id: int) -> ShardInfo:
    fields.must_be("file", file)
    fields.must_be("first_id", first_id)
    num_ids = fields.integer("num_ids")
    if num_ids == 0:
        raise fields.error("num_ids", "is 0, expected at least 1")
    fields.must_be("bytes", layout.shard_bytes(num_ids))
    fields.end()
    return ShardInfo(file, first_id, num_ids, layout.shard_bytes(num_ids))


def write_manifest(folder: Path | str, manifest: TableManifest) -> None:
    """Write `table.json`, all of it or none.

    Raises:
        TableError: the manifest is one that `read_manifest` would refuse.
    """
    text = manifest.to_json()
    TableManifest.from_json(text)
    write_whole(Path(folder) / MANIFEST_NAME, text.encode())


def read_manifest(folder: Path | str) -> TableManifest:
    """What `table.json` in `folder` says; a `TableError` if it is missing or not as specified."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TableError(_what_is_missing(folder)) from error
    except OSError as error:
        raise TableError(f"{path}: can't be read: {error.strerror}.") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise TableError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, so not a table.json.")
    try:
        return TableManifest.from_json(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 text.") from error


def _what_is_missing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder."
    if not folder.is_dir():
        return f"{folder}: a file, expected the folder of a table."
    inner = folder / "table"
    if (inner / MANIFEST_NAME).exists():
        return f"{folder}: no {MANIFEST_NAME} here. The table is in {inner}."
    return f"{folder}: no {MANIFEST_NAME} here, so not a finished table."
