"""The readers of all tables of a model, as one: lookup experts' and embeddings'."""

from dataclasses import fields, replace
from typing import Any

from lookup_experts.folders.model_folder import TABLE
from lookup_experts.folders.tables import embedding_place
from lookup_experts.table.reader import ReaderStatistics, TableReader


class TableReaders:
    """What reads a model's tables.

    Args:
        by_place: the readers, by the places of their tables in the model's folder, or by the names
            of tables that texts choose among; at least one.
        one_of_them: whether a token has records in one table alone.
    """

    def __init__(self, by_place: dict[str, TableReader], one_of_them: bool = False) -> None:
        self.by_place = by_place
        self._one_of_them = one_of_them

    @property
    def bytes_per_token(self) -> int:
        """What the records that a token needs take, at most."""
        needed = [
            reader.table.layout.record_bytes * reader.rows_per_token
            for reader in self.by_place.values()
        ]
        return max(needed) if self._one_of_them else sum(needed)

    def stats(self) -> ReaderStatistics:
        """The counts of all, added up; `batches` is of one, since each is asked once per forward
        pass."""
        first, *others = (reader.stats() for reader in self.by_place.values())
        for other in others:
            first = _sum(first, other)
        return first

    def reset_stats(self) -> None:
        """Count from zero."""
        for reader in self.by_place.values():
            reader.reset_stats()

    def take_cache_memory(self) -> None:
        """See `TableReader.take_cache_memory`."""
        for reader in self.by_place.values():
            reader.take_cache_memory()

    def fill_cache(self) -> None:
        """See `TableReader.fill_cache`."""
        for reader in self.by_place.values():
            reader.fill_cache()

    def check(self) -> None:
        """See `TableReader.check`."""
        for reader in self.by_place.values():
            reader.check()

    def close(self) -> None:
        """See `TableReader.close`."""
        for reader in self.by_place.values():
            reader.close()


def table_readers(model: Any) -> TableReaders | None:
    """Those of a model; None where it reads no table."""
    if hasattr(model, "table_readers"):
        return TableReaders(model.table_readers, one_of_them=True)
    source = getattr(model, "expert_source", None)
    found = {TABLE: source} if isinstance(source, TableReader) else {}
    embeddings: dict[str, TableReader] = getattr(model, "embedding_readers", {})
    found |= {embedding_place(name): reader for name, reader in embeddings.items()}
    return TableReaders(found) if found else None


def _sum(first: ReaderStatistics, second: ReaderStatistics) -> ReaderStatistics:
    counts = {
        field.name: getattr(first, field.name) + getattr(second, field.name)
        for field in fields(first)
        if field.name not in ("store", "backend", "batches")
    }
    return replace(first, batches=max(first.batches, second.batches), **counts)
