"""A backbone with several tables, of which each text is generated with one (`model/by_table.py`).

A table comes in a folder in table form, with what reads its rows: routers and matrices. Its
backbone must be the very one that it is put on, by the fingerprint of the weights; a folder that
holds its backbone too is asked for that of its own.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lookup_experts.errors import UserError
from lookup_experts.folders.configuration import MODEL_TYPE
from lookup_experts.folders.experts_alone import backbone_fingerprint, fill_experts
from lookup_experts.folders.model_folder import (
    TABLE,
    local_folder,
    read_config,
)
from lookup_experts.folders.tables import one_store_for, share_cache_among
from lookup_experts.made_classes import make_class
from lookup_experts.model.blocks import find_ffns
from lookup_experts.model.by_table import Group, Key, SourceByTable, install_tables
from lookup_experts.model.freezing import freeze_backbone
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.stacked_experts import can_be_stacked, most_stacked
from lookup_experts.model.wiring import Entrance, hidden_size_of
from lookup_experts.table.joined import join_tables
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.opening import Table
from lookup_experts.table.reader import TableReader, open_table_of_model, read_table

_CHARACTERS = frozenset("-_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


class ByTableMixin:
    """What a backbone with several tables does differently.

    Attributes:
        tables: what each is, by its name.
    """

    tables: dict[str, "TableFacts"]

    @property
    def lookup_entrance(self) -> Entrance:
        """Where token ids become rows."""
        return self.base_model.lookup_entrance  # type: ignore[attr-defined]

    @property
    def source_by_table(self) -> SourceByTable:
        """Where rows come from."""
        source: Any = self.lookup_entrance.source
        return source

    @property
    def table_readers(self) -> dict[str, TableReader]:
        """What reads the tables, by their names; those that are alike have one for all."""
        groups: Any = self.source_by_table.groups
        return {", ".join(group.tables): group.source for group in groups}

    def use_table(self, tables: str | Sequence[str | None] | None) -> None:
        """Take these tables from the next forward pass on; at first there is none.

        Args:
            tables: the name of one, for all texts of a batch; or a list with one for each text.
                None is the backbone alone, to the bit.

        Raises:
            UserError: there is no table of that name.
        """
        self.source_by_table.use(tables)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: backbone and tables are in folders of their own already.

        Raises:
            UserError: always.
        """
        raise UserError(
            "A backbone with several tables isn't saved as a whole: it was loaded from its folder, "
            "and each table from its own. Copy those."
        )


@cache
def by_table_class(backbone: Any) -> Any:
    """The class of a backbone with several tables: a subclass of its own; one for each."""
    return make_class(
        by_table_class,
        backbone,
        f"{backbone.__name__}ByTable",
        (ByTableMixin, backbone),
        __doc__=f"{backbone.__name__} with several tables of lookup experts.",
    )


class TableFacts(NamedTuple):
    """A folder in table form."""

    settings: LookupSettings
    folder: Path
    layout: RecordLayout
    """Of its table."""


def put_tables_on(
    model: Any, path: Path, tables: Mapping[str, str | Path], options: Mapping[str, Any]
) -> Any:
    """Give a backbone, which has just been loaded, several tables.

    Args:
        model: the backbone.
        path: the folder that it was loaded from.
        tables: name -> a folder in table form.
        options: of `open_reader`: store, cache, verify_checksums, notify. The cache is shared.

    Returns:
        The model, now of a class with `use_table`.

    Raises:
        UserError: a name or a folder that won't do, or the table of another backbone.
        TableError: a table is missing or damaged.
    """
    _require_plain(model, path)
    own = backbone_fingerprint(path)
    found = {name: _find(name, folder, path, own, model) for name, folder in tables.items()}
    groups = _grouped({name: one.facts for name, one in found.items()}, hidden_size_of(model))
    install_tables(model, {group: found[group[0]].facts.settings for group in groups})
    for name, one in found.items():
        fill_experts(_weights_of(model, name), one.facts.folder)
    joined = {group: _join([found[name].table for name in group]) for group in groups}
    layouts = {" ".join(group): table.layout for group, table in joined.items()}
    shares = share_cache_among(layouts, options.get("cache", 0))
    reading = one_store_for(layouts.values(), options)
    weight = model.get_input_embeddings().weight
    sources = []
    with ExitStack() as opened:
        for group, table in joined.items():
            reading["cache"] = shares[" ".join(group)]
            reader = read_table(table, weight.dtype, weight.device, **reading)
            opened.callback(reader.close)
            sources.append(Group(group, reader, found[group[0]].facts.layout.shape.vocab_size))
        opened.pop_all()
    model.base_model.lookup_entrance.source = SourceByTable(sources)
    backbone: Any = type(model)
    model.__class__ = by_table_class(backbone)
    model.tables = {name: one.facts for name, one in found.items()}
    freeze_backbone(model)
    return model


def _grouped(tables: Mapping[str, TableFacts], hidden_size: int) -> list[Key]:
    """The names of tables, those together that are alike, in order."""
    groups: list[list[str]] = []
    for name, one in tables.items():
        for group in groups:
            other = tables[group[0]]
            is_alike = one.layout == other.layout and can_be_stacked(one.settings, other.settings)
            if is_alike and len(group) < most_stacked(one.settings, hidden_size):
                group.append(name)
                break
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


def _join(tables: Sequence[Table]) -> Table:
    return tables[0] if len(tables) == 1 else join_tables(tables)


def _require_plain(model: Any, path: Path) -> None:
    if hasattr(model.base_model, "lookup_entrance"):
        raise UserError(
            f"{path} has lookup experts of its own; tables are put on a backbone without any. Give "
            "the folder of its backbone, and this one as one of the tables."
        )
    if getattr(model, "embedding_readers", None):
        raise UserError(
            f"{path} has its embeddings in tables; tables of lookup experts are put on a backbone "
            "that has them in memory. Give the folder that it was made from."
        )


class _Found(NamedTuple):
    facts: TableFacts
    table: Table


def _find(name: str, folder: str | Path, path: Path, fingerprint: str, model: Any) -> _Found:
    """A folder that is given as a table of the backbone in `path`, whose fingerprint is given."""
    if not name or not set(name) <= _CHARACTERS:
        raise UserError(
            f"A table can't be called {name!r}; a name has letters, digits, '-' and '_' alone."
        )
    place = local_folder(folder)
    config = read_config(place)
    if config.get("model_type") != MODEL_TYPE or "lookup_experts" not in config:
        raise UserError(
            f"Table {name}: {place} has no lookup experts; give a folder that mole reparameterize "
            "made."
        )
    settings = LookupSettings.from_dict(config["lookup_experts"])
    if settings.form != "table":
        raise UserError(
            f"Table {name}: the experts in {place} are in training form. Fold them first: mole "
            f"reparameterize {place} OUT."
        )
    reference = settings.backbone
    given = reference.fingerprint if reference is not None else backbone_fingerprint(place)
    if given != fingerprint:
        raise UserError(
            f"Table {name}: {place} belongs to another backbone than the one in {path}: the "
            "weights have another fingerprint."
        )
    table = open_table_of_model(
        place / TABLE,
        num_layers=len(settings.layers),
        num_experts=settings.num_experts,
        row_size=settings.row_size or hidden_size_of(model),
        fingerprint=str(settings.fingerprint),
    )
    return _Found(TableFacts(settings, place, table.layout), table)


def _weights_of(model: Any, table: str) -> dict[str, Any]:
    """What a table has in each block, by the names that it has in its folder."""
    found = {}
    for number, ffn in enumerate(find_ffns(model)):
        block: Any = ffn._modules.get("lookup_experts")
        if block is not None:
            for name, weight in block.weights_of(table).items():
                found[f"{number}.lookup_experts.{name}"] = weight
    return found
