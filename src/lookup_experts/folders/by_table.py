"""A backbone with several tables, of which each text is generated with one (`model/by_table.py`).

A table comes in a folder in table form, with what reads its rows: routers and matrices. Its
backbone must be the very one that it is put on, by the fingerprint of the weights; a folder that
holds its backbone too is asked for that of its own.
"""

from collections.abc import Mapping, Sequence
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
from lookup_experts.model.by_table import SourceByTable, install_tables, module_of
from lookup_experts.model.freezing import freeze_backbone
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import Entrance, hidden_size_of
from lookup_experts.table.opening import Table
from lookup_experts.table.reader import TableReader, open_reader, open_table_of_model

_CHARACTERS = frozenset("-_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


class ByTableMixin:
    """What a backbone with several tables does differently.

    Attributes:
        settings_by_table: what was attached to it with each table, by its name.
    """

    settings_by_table: dict[str, LookupSettings]

    @property
    def lookup_entrance(self) -> Entrance:
        """Where token ids become rows."""
        return self.base_model.lookup_entrance  # type: ignore[attr-defined]

    @property
    def readers_by_table(self) -> dict[str, TableReader]:
        """What reads each table, by its name."""
        return self._by_table.sources  # type: ignore[return-value]

    @property
    def _by_table(self) -> SourceByTable:
        source: Any = self.lookup_entrance.source
        return source

    def use_table(self, tables: str | Sequence[str | None] | None) -> None:
        """Take these tables from the next forward pass on; at first there is none.

        Args:
            tables: the name of one, for all texts of a batch; or a list with one for each text.
                None is the backbone alone, to the bit.

        Raises:
            UserError: there is no table of that name.
        """
        self._by_table.use(tables)

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


class _Found(NamedTuple):
    """A folder in table form."""

    folder: Path
    settings: LookupSettings


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
    found = {name: _find(name, folder, path, own) for name, folder in tables.items()}
    opened = {name: _table_of(one, model) for name, one in found.items()}
    layouts = {name: table.layout for name, table in opened.items()}
    shares = share_cache_among(layouts, options.get("cache", 0))
    chosen = one_store_for(layouts.values(), options)
    install_tables(model, {name: one.settings for name, one in found.items()})
    for name, one in found.items():
        _load_blocks(model, name, one.folder)
    weight = model.get_input_embeddings().weight
    readers = {
        name: open_reader(
            one.folder / TABLE,
            **_shape_of(one, model),
            dtype=weight.dtype,
            device=weight.device,
            **{**chosen, "cache": shares[name]},
        )
        for name, one in found.items()
    }
    model.base_model.lookup_entrance.source = SourceByTable(readers)
    backbone: Any = type(model)
    model.__class__ = by_table_class(backbone)
    model.settings_by_table = {name: one.settings for name, one in found.items()}
    freeze_backbone(model)
    return model


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


def _find(name: str, folder: str | Path, path: Path, fingerprint: str) -> _Found:
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
    return _Found(place, settings)


def _shape_of(one: _Found, model: Any) -> dict[str, Any]:
    settings = one.settings
    return {
        "num_layers": len(settings.layers),
        "num_experts": settings.num_experts,
        "row_size": settings.row_size or hidden_size_of(model),
        "fingerprint": settings.fingerprint,
    }


def _table_of(one: _Found, model: Any) -> Table:
    return open_table_of_model(one.folder / TABLE, **_shape_of(one, model))


def _load_blocks(model: Any, table: str, folder: Path) -> None:
    """Give a table's blocks the weights in its folder."""
    module = f".lookup_experts.{module_of(table)}."
    own = {
        name.replace(module, ".lookup_experts."): weight
        for name, weight in model.state_dict().items()
        if module in name
    }
    fill_experts(own, folder)
