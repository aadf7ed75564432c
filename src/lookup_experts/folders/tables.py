"""The tables of a model folder: where they are, and how they share one budget.

A model can have a table of lookup experts, in the folder `table`, and one for each embedding whose
rows lie on disk, in `embeddings/NAME of the module`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lookup_experts.folders.model_folder import TABLE
from lookup_experts.model.embedding_settings import embedding_settings
from lookup_experts.table.cache_budget import CacheBudget, parse_cache
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.manifest import read_manifest
from lookup_experts.table.store import Notify, log
from lookup_experts.table.store_choice import choose_store

EMBEDDINGS = "embeddings"
"""The folder of the tables of embeddings, one folder for each."""
TABLE_OPTIONS = ("store", "cache", "verify_checksums", "notify")
"""Keyword arguments of `from_pretrained` that are for the readers of tables."""


def embedding_place(module: str) -> str:
    """Where in a model folder the table of an embedding is."""
    return f"{EMBEDDINGS}/{module}"


def tables_of(folder: Path) -> Iterator[str]:
    """The places of the tables in a model folder."""
    inner = folder / EMBEDDINGS
    for place in [folder / TABLE, *(sorted(inner.iterdir()) if inner.is_dir() else ())]:
        if (place / MANIFEST_NAME).exists():
            yield str(place.relative_to(folder))


def one_store(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with `auto` decided: for all tables of a folder together.

    Raises:
        UserError: there is no such store.
        TableError: a table is damaged.
    """
    return one_store_for(_layouts(folder).values(), options)


def one_store_for(layouts: Iterable[RecordLayout], options: Mapping[str, Any]) -> dict[str, Any]:
    """As `one_store`, for tables that are wherever they are."""
    total = sum(layout.table_bytes for layout in layouts)
    notify: Notify = options.get("notify", log)
    return {**options, "store": choose_store(options.get("store", "auto"), total, notify)}


def _layouts(folder: Path) -> dict[str, RecordLayout]:
    return {place: read_manifest(folder / place).layout for place in tables_of(folder)}


def share_cache(
    folder: Path, cache: int | str | CacheBudget, config: Any
) -> dict[str, CacheBudget]:
    """The budget of each table's row cache, together no more than `cache`.

    As many tokens of each: a table gets what their records take of it; of several tables none
    gets more than it has.

    Args:
        folder: of the model.
        cache: see `parse_cache`.
        config: of the model.

    Raises:
        UserError: the budget can't be read.
        TableError: a table is damaged.
    """
    rows_per_token = {
        embedding_place(name): one.rows_per_token
        for name, one in embedding_settings(config).items()
    }
    return share_cache_among(_layouts(folder), cache, rows_per_token)


def share_cache_among(
    layouts: Mapping[str, RecordLayout],
    cache: int | str | CacheBudget,
    rows_per_token: Mapping[str, int] | None = None,
) -> dict[str, CacheBudget]:
    """As `share_cache`, for tables that are wherever they are.

    Args:
        layouts: of the tables, by name.
        rows_per_token: of those where it isn't one.
    """
    budget = parse_cache(cache)
    if len(layouts) == 1:
        return dict.fromkeys(layouts, budget)
    rows_per_token = rows_per_token or {}
    per_token = {
        place: layout.stride * rows_per_token.get(place, 1) for place, layout in layouts.items()
    }
    whole = {place: layout.table_bytes for place, layout in layouts.items()}
    total = _shares(budget.total, whole, per_token)
    if budget.on_device is None:
        return {place: CacheBudget(share) for place, share in total.items()}
    on_device = _shares(budget.on_device, total, per_token)
    return {place: CacheBudget(share, on_device[place]) for place, share in total.items()}


def _shares(budget: int, most: Mapping[str, int], weights: Mapping[str, int]) -> dict[str, int]:
    """`budget` cut in proportion to the weights, no part larger than `most` says."""
    shares: dict[str, int] = {}
    # From those that are full soonest, so that what they leave goes to the others.
    order = sorted(most, key=lambda place: most[place] / weights[place])
    for number, place in enumerate(order):
        rest = sum(weights[other] for other in order[number:])
        shares[place] = min(most[place], budget * weights[place] // rest)
        budget -= shares[place]
    return shares
