"""A model folder that is saved into again: the new model takes the place of the old one as a whole.

The new files are written beside the old ones, and put in their places when they are complete.
Meanwhile the folder has no `config.json`. So a save that is interrupted leaves the old model, or
the new one, or a folder that nothing can load.

What loaders would take for a part of the new model goes: weights that were cut into other files,
and a table where the new model has none. Files of others stay.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import CONFIG, PARTIAL, TABLE
from lookup_experts.folders.tables import EMBEDDINGS, tables_of
from lookup_experts.table.build import copy_table
from lookup_experts.table.format import MANIFEST_NAME

_SHARD = r"-\d{5}-of-\d{5}"


@contextmanager
def replaced_model(
    folder: Path, variant: str | None = None, tables: Mapping[str, Path] | None = None
) -> Iterator[Path]:
    """A folder to write a model into; afterwards its files are put into `folder`.

    An adapter, which transformers saves without the model, takes nobody's place.

    Args:
        folder: made if it isn't there.
        variant: of the weights' names, as in transformers; those of others stay.
        tables: of the new model, by their places in a folder; they are saved too. One that is
            that in `folder` already stays.

    Raises:
        UserError: `folder` is a file, or something else is where a table belongs.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to save the model in.")
    stay = set()
    for name, table in (tables or {}).items():
        place = folder / name
        if os.path.lexists(place) and not _is_table(place):
            raise UserError(
                f"{place} is where the table belongs, and is none. Choose another folder, or move "
                "it."
            )
        if place.exists() and place.samefile(table):
            stay.add(name)
    is_new = not folder.exists()
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was interrupted
    partial.mkdir(parents=True)
    try:
        yield partial
        for name, table in (tables or {}).items():
            if name not in stay and (partial / CONFIG).exists():
                copy_table(table, partial / name)
    except BaseException:
        shutil.rmtree(partial)
        if is_new:
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()
        raise
    _put_in_place(partial, folder, variant, stay)


def _put_in_place(partial: Path, folder: Path, variant: str | None, stay: set[str]) -> None:
    others = (path.name for path in partial.iterdir() if path.name not in (TABLE, EMBEDDINGS))
    written = [*tables_of(partial), *others]
    if (partial / CONFIG).exists():
        (folder / CONFIG).unlink(missing_ok=True)
        _remove_old_weights(folder, variant)
        for number, name in enumerate(list(tables_of(folder))):
            if name not in stay:
                # Renamed first, so that an interruption leaves no half of it; links aren't
                # followed.
                (folder / name).rename(partial / f"replaced-{number}")
    for name in sorted(written, key=lambda name: name == CONFIG):
        (folder / name).parent.mkdir(exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    with suppress(OSError):  # there are some, or never were
        (folder / EMBEDDINGS).rmdir()


def _remove_old_weights(folder: Path, variant: str | None) -> None:
    part = "" if variant is None else rf"\.{re.escape(variant)}"
    names = re.compile(
        rf"(model|pytorch_model)({part}({_SHARD})?|{_SHARD}{part})\.(safetensors|bin)"
        rf"|(model\.safetensors|pytorch_model\.bin)\.index{part}\.json"
        rf"|shard-\d{{5}}-model{_SHARD}\.safetensors"  # of a sharded model, and loaded before all
    )
    for path in list(folder.iterdir()):
        if names.fullmatch(path.name):
            path.unlink()


def _is_table(place: Path) -> bool:
    return (place / MANIFEST_NAME).exists()
