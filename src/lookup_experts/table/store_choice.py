"""Where records are read from: `memory`, `mmap` or `direct`.

`open_store` gives the store of that name; what all of them do is in `store.py`.

| store | reads from | best when |
|---|---|---|
| memory | a copy of the table in RAM, loaded at the start | it fits |
| mmap | the page cache, which the kernel shrinks under pressure | it nearly fits |
| direct | the disk, past the page cache (O_DIRECT) | it doesn't fit; memory use stays as asked |

They are in `in_memory.py`, `mapped.py` and `direct.py`.

A store never changes its way of reading unnoticed: what it falls back to at the start, and why,
goes through `notify` and stays readable in `store.backend`. A shard that is replaced (renamed
over) while open goes on being read in its old state; one that is truncated gives a `TableError`.
"""

from lookup_experts.errors import unknown_name
from lookup_experts.table.direct import DirectStore
from lookup_experts.table.host_memory import available_memory_bytes
from lookup_experts.table.in_memory import MemoryStore
from lookup_experts.table.mapped import MappedStore
from lookup_experts.table.opening import Table
from lookup_experts.table.store import Notify, RecordStore
from lookup_experts.units import format_bytes, parse_bytes

STORES = ("memory", "mmap", "direct")


def choose_store(kind: str, table_bytes: int, notify: Notify) -> str:
    """The store that `kind` stands for, of tables of so many bytes together; see `open_store`.

    Raises:
        UserError: unknown kind, or a size that can't be read.
    """
    given = kind
    kind, colon, budget = kind.partition(":")
    if kind not in (*STORES, "auto") or (colon and kind != "auto"):
        raise unknown_name("store", given, (*STORES, "auto"))
    if kind == "auto":
        return _choose(table_bytes, parse_bytes(budget) if colon else None, notify)
    return kind


def open_store(
    table: Table,
    kind: str = "auto",
    *,
    verify_checksums: bool = False,
    notify: Notify,
) -> RecordStore:
    """The store of this kind over `table`; also a context manager that closes it.

    Args:
        kind: "memory", "mmap", "direct", or "auto": memory if the whole table fits half of what
            is available now, else direct; "auto:8GB": if it fits that.
        verify_checksums: check every record that is read (for "memory": all, once, on loading).
        notify: is told, in one line each, what was chosen and what could not be had.

    Raises:
        UserError: unknown kind, or not enough memory, or too many open files.
        TableError: a shard can't be read, or (with `verify_checksums`) is damaged.
    """
    kind = choose_store(kind, table.layout.table_bytes, notify)
    if kind == "memory":
        return MemoryStore(table, verify_checksums)
    if kind == "mmap":
        return MappedStore(table, verify_checksums)
    return DirectStore(table, verify_checksums, notify)


def _choose(table_bytes: int, budget: int | None, notify: Notify) -> str:
    budget = available_memory_bytes() // 2 if budget is None else budget
    kind, verb = ("memory", "fits") if table_bytes <= budget else ("direct", "does not fit")
    sizes = f"the table ({format_bytes(table_bytes)}) {verb} in {format_bytes(budget)}"
    notify(f"Store: {kind}, because {sizes}.")
    return kind
