"""Several tables alike as one: the ids of each follow upon those of the one before.

Records of all of them are then read by one store, together, and share one row cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path

from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.opening import Table


@dataclass(frozen=True)
class JoinedTable(Table):
    """A table made of others; it has no folder of its own."""

    parts: tuple[Table, ...] = ()

    def own_id(self, record: int) -> int:
        """See `Table.own_id`; the one in its own table."""
        return record % self.parts[0].layout.shape.vocab_size

    def open_again(self) -> "JoinedTable":
        """See `Table.open_again`."""
        return join_tables([part.open_again() for part in self.parts])


def join_tables(tables: Sequence[Table]) -> JoinedTable:
    """One table of several, which have one layout.

    The record of id i in table k is that of id k·V + i here.
    """
    first, vocab_size = tables[0], tables[0].layout.shape.vocab_size
    assert all(table.layout == first.layout for table in tables), "joined tables are alike"
    shape = replace(first.layout.shape, vocab_size=vocab_size * len(tables))
    layout = RecordLayout(shape, first.layout.encoding, first.layout.version)
    absolute = tuple(replace(table, folder=table.folder.absolute()) for table in tables)
    shards = tuple(
        replace(shard, file=str(table.path(shard)), first_id=shard.first_id + number * vocab_size)
        for number, table in enumerate(absolute)
        for shard in table.shards
    )
    folder = Path(commonpath([table.folder for table in absolute]))
    manifest = replace(first.manifest, layout=layout, shards=shards)
    return JoinedTable(folder, manifest, absolute)
