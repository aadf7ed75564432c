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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import CONFIG, PARTIAL, TABLE
from lookup_experts.table.build import copy_table
from lookup_experts.table.format import MANIFEST_NAME

_SHARD = r"-\d{5}-of-\d{5}"


@contextmanager
def replaced_model(
    folder: Path, variant: str | None = None, table: Path | None = None
) -> Iterator[Path]:
    """A folder to write a model into; afterwards its files are put into `folder`.

    An adapter, which transformers saves without the model, takes nobody's place.

    Args:
        folder: made if it isn't there.
        variant: of the weights' names, as in transformers; those of others stay.
        table: of the new model, where it has one; it is saved too. If it is that in `folder`
            already, it stays.

    Raises:
        UserError: `folder` is a file, or something else is where the table belongs.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to save the model in.")
    place = folder / TABLE
    if table is not None and os.path.lexists(place) and not _is_table(place):
        raise UserError(
            f"{place} is where the table belongs, and is none. Choose another folder, or move it."
        )
    table_stays = table is not None and place.exists() and place.samefile(table)
    is_new = not folder.exists()
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was interrupted
    partial.mkdir(parents=True)
    try:
        yield partial
        if table is not None and not table_stays and (partial / CONFIG).exists():
            copy_table(table, partial / TABLE)
    except BaseException:
        shutil.rmtree(partial)
        if is_new:
            with suppress(OSError):  # somebody has put something there
                folder.rmdir()
        raise
    _put_in_place(partial, folder, variant, table_stays)


def _put_in_place(partial: Path, folder: Path, variant: str | None, table_stays: bool) -> None:
    written = sorted(partial.iterdir(), key=lambda path: path.name == CONFIG)
    if (partial / CONFIG).exists():
        (folder / CONFIG).unlink(missing_ok=True)
        _remove_old_weights(folder, variant)
        if _is_table(folder / TABLE) and not table_stays:
            # Renamed first, so that an interruption leaves no half of it; links aren't followed.
            (folder / TABLE).rename(partial / "replaced")
    for path in written:
        path.replace(folder / path.name)
    shutil.rmtree(partial)


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
