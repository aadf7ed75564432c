"""Where a model in vLLM has its experts' rows from: the table in its folder, or the experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.model_folder import TABLE
from lookup_experts.folders.tables import TABLE_OPTIONS
from lookup_experts.model.computed_rows import FFNExperts
from lookup_experts.model.forms import get_form
from lookup_experts.model.rows import ExpertSource
from lookup_experts.model.settings import LookupSettings
from lookup_experts.table.cache_budget import parse_cache
from lookup_experts.table.reader import open_reader, open_table_of_model
from lookup_experts.table.store_choice import choose_store

KEY = "lookup_experts"
"""In vLLM's `--additional-config`: what holds the options of the table's reader."""


def reader_options(additional_config: Any) -> dict[str, Any]:
    """The options of the reader, out of vLLM's `--additional-config`, as `open_reader` takes them.

    Raises:
        UserError: an option that there isn't, or a value that can't be read.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise UserError(
            f"{KEY!r} in vLLM's additional config should hold the options of the table's reader, "
            f'like {{"store": "direct", "cache": "256MB"}}; it is {given!r}.'
        )
    known = [name for name in TABLE_OPTIONS if name != "notify"]
    for name in given:
        if name not in known:
            raise unknown_name(f"option of {KEY!r} in vLLM's additional config", name, known)
    choose_store(given.get("store", "auto"), 0, lambda choice: None)
    parse_cache(given.get("cache", 0))
    return dict(given)


def check_table(folder: Path, settings: LookupSettings, config: Any) -> None:
    """Raise a `TableError` unless the table in a model's folder is whole, and this model's."""
    open_table_of_model(folder / TABLE, **_made_for(settings, config))


def open_source(
    folder: Path,
    settings: LookupSettings,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> ExpertSource:
    """The source of a model's rows, ready for steps.

    Args:
        folder: the model's.
        settings: what was attached.
        config: the backbone's.
        dtype: the model's.
        device: where it computes.
        options: what `reader_options` gives.

    Raises:
        TableError: the table is missing, damaged, or another model's; or a record that the row
            cache begins with is.
    """
    if settings.form == "experts":
        return ComputedRowsOfModel(settings)
    reader = open_reader(
        folder / TABLE, **_made_for(settings, config), dtype=dtype, device=device, **options
    )
    reader.take_cache_memory()
    reader.fill_cache()
    return reader


def _made_for(settings: LookupSettings, config: Any) -> dict[str, Any]:
    return {
        "num_layers": len(settings.layers),
        "num_experts": settings.num_experts,
        "row_size": settings.row_size or config.hidden_size,
        "fingerprint": settings.fingerprint,
    }


class ComputedRowsOfModel(FFNExperts):
    """`FFNExperts` of a model in vLLM, whose embedding may be cut among processes."""

    def inputs(self, unique_ids: Tensor, base_model: Any) -> Tensor:
        """See `FFNExperts.inputs`."""
        embeddings = base_model.embed_input_ids(unique_ids)
        return get_form(self.settings.row_form).inputs(embeddings, self.settings)
