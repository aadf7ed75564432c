"""Where things lie: layers in a record, records in a shard, ids in shards."""

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

from lookup_experts.errors import UserError
from lookup_experts.table.encoding import Encoding
from lookup_experts.table.format import (
    ALIGNMENT,
    BLOCK,
    CHECKSUM,
    DATA_START,
    MAX_RECORD_BYTES,
    VERSION,
)


@dataclass(frozen=True)
class TableShape:
    """V ids, L layers, N experts, and r, the numbers that an expert says of one id in one layer;
    all at least 1. Of an embedding N is 1, and L in how many parts a row is used."""

    vocab_size: int
    num_layers: int
    num_experts: int
    row_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name} of a table must be a whole number from 1 up, not {value}.")


@dataclass(frozen=True)
class RecordLayout:
    """Where things lie in a record; every size follows from the shape and the encoding."""

    shape: TableShape
    encoding: Encoding
    version: int = VERSION
    """Of the format."""

    def __post_init__(self) -> None:
        if self.record_bytes > MAX_RECORD_BYTES:
            raise UserError(
                f"A record of {self.record_bytes} bytes (all layers and rows of one id) is larger "
                f"than {MAX_RECORD_BYTES}. Use fewer experts or a smaller encoding."
            )

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a record."""
        return self.encoding.layer_bytes(self.shape.num_experts, self.shape.row_size)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a record that mean something; the rest of the stride is zeros."""
        return self.shape.num_layers * self.layer_bytes

    @cached_property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        if self.version == 1:
            return _stride_of_version_1(self.record_bytes)
        return -(-self.record_bytes // ALIGNMENT) * ALIGNMENT

    @cached_property
    def is_whole_blocks(self) -> bool:
        """Whether no two records share a block of the disk."""
        return self.stride % BLOCK == 0

    @property
    def table_bytes(self) -> int:
        """Bytes of all records with their padding: what the whole table takes in memory."""
        return self.shape.vocab_size * self.stride

    def layer_slice(self, layer: int) -> slice:
        """The bytes of `layer` within a record."""
        return slice(layer * self.layer_bytes, (layer + 1) * self.layer_bytes)

    def record_offset(self, row: int) -> int:
        """Where record number `row` of a shard starts in its file."""
        return DATA_START + row * self.stride

    def shard_bytes(self, num_ids: int) -> int:
        """The size of a shard file with this many records."""
        return DATA_START + num_ids * (self.stride + CHECKSUM.itemsize)


def _stride_of_version_1(record_bytes: int) -> int:
    if record_bytes >= BLOCK:
        return -(-record_bytes // BLOCK) * BLOCK
    return max(64, 1 << (record_bytes - 1).bit_length())


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file name and size, and the ids `first_id` to `first_id + num_ids - 1`."""

    file: str
    first_id: int
    num_ids: int
    bytes: int


def plan_shards(layout: RecordLayout, max_shard_bytes: int = 4 * 2**30) -> list[ShardInfo]:
    """The fewest shards of nearly equal size, none over `max_shard_bytes` unless one record is."""
    per_id = layout.stride + CHECKSUM.itemsize
    most_ids = max(1, (max_shard_bytes - DATA_START) // per_id)
    vocab_size = layout.shape.vocab_size
    num_shards = -(-vocab_size // most_ids)
    bounds = [vocab_size * shard // num_shards for shard in range(num_shards + 1)]
    return [
        ShardInfo(
            shard_name(number, num_shards), first, end - first, layout.shard_bytes(end - first)
        )
        for number, (first, end) in enumerate(pairwise(bounds), start=1)
    ]


def shard_name(number: int, num_shards: int) -> str:
    """The file of shard `number`, from 1 up."""
    return f"table-{number:05d}-of-{num_shards:05d}.safetensors"
