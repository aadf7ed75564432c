"""A table in another encoding: from a finished table, without the experts.

What is re-encoded is an inference folder, whose other files come along, or the folder of a table
alone. As in `folding.py`, the new folder is made under another name and renamed when it is
complete; an interrupted run is taken up again by the same call.
"""

from collections.abc import Sequence
from pathlib import Path

from lookup_experts.errors import TableError, UserError
from lookup_experts.folders.load import LookupExpertsConfig
from lookup_experts.folders.model_folder import (
    TABLE,
    begin_inference_folder,
    copy_file,
    local_folder,
    read_config,
    require_new,
    unfinished_folder,
)
from lookup_experts.folders.tables import EMBEDDINGS, embedding_place
from lookup_experts.generation.inspection import attached_settings, embedding_tables
from lookup_experts.table.build import (
    build_table,
    decode_records,
    full_disk_as_user_error,
    link_or_copy,
    plan_reencoding,
)
from lookup_experts.table.counts import keep_counts, read_counts
from lookup_experts.table.encoding import Encoding, get_encoding
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.progress import Progress
from lookup_experts.table.store import Notify, log
from lookup_experts.table.store_choice import open_store

BARE = ""
"""The place of a table without a model around it."""


def reencode(
    folder: str | Path,
    out: str | Path,
    *,
    encoding: str,
    block_size: int | None = None,
    progress: Progress | None = None,
    notify: Notify = log,
) -> Table:
    """Write a table again in another encoding, of a model folder with several all of them.

    Every record that is read is compared with its checksum. The table stays that of the same
    rows: fingerprint and hashes are those of the source.

    Args:
        folder: an inference folder, or the folder of a table alone.
        out: the folder to make, of the same kind; must not exist yet.
        encoding: how the new table stores numbers.
        block_size: of the encodings nf4 and nf3: how many neighbours share a scale.
        progress: called with (ids done, ids in all).
        notify: told when an interrupted run is taken up again, and that what the source's
            encoding has rounded away is not brought back; default: a warning of the logger
            `lookup_experts`.

    Returns:
        The finished table; of several the first, lookup experts' if there is one.

    Raises:
        UserError: `out` exists, or there is nothing to re-encode.
        TableError: the table is damaged, or not that of the model beside it.
        DiskFullError: not enough space.
    """
    chosen = get_encoding(encoding, block_size)
    path, out = local_folder(folder), Path(out)
    sources = open_sources(path)
    _require_other_encoding(sources, chosen)
    _require_new_folder([path, *(source.folder for source in sources.values())], out)
    _tell_of_rounding(sources, notify)
    first = next(iter(sources))
    if first == BARE:
        partial = unfinished_folder(out, notify)
    else:
        partial = begin_inference_folder(out, notify, *{Path(place).parts[0] for place in sources})
        with full_disk_as_user_error(partial):
            copy_beside_tables(path, partial)
    made = {}
    for place, source in sources.items():
        plan = plan_reencoding(source, chosen)
        counts = read_counts(source)
        with open_store(source, "direct", verify_checksums=True, notify=notify) as store:
            build_table(partial / place, plan, decode_records(store), progress)
        with full_disk_as_user_error(partial):
            keep_counts(partial / place, counts, source.layout.shape.vocab_size)
        made[place] = Table(out / place, plan.manifest)
    partial.rename(out)
    return made[first]


def open_sources(path: Path) -> dict[str, Table]:
    """The tables of a folder by their places in it, that of lookup experts first; `BARE` for the
    folder of a table alone.

    Raises:
        UserError: the folder has no table.
        TableError: its files are missing, truncated or foreign, or of another model.
    """
    if (path / MANIFEST_NAME).exists():
        return {BARE: open_table(path)}
    config = read_config(path)
    if config.get("model_type") != LookupExpertsConfig.model_type:
        raise UserError(f"{path} has no table to re-encode: it is no model in table form.")
    embeddings = {
        embedding_place(name): table for name, table in embedding_tables(path, config).items()
    }
    if embeddings and "lookup_experts" not in config:
        return embeddings
    settings = attached_settings(path, config)
    if settings.form != "table":
        if embeddings:
            return embeddings
        raise UserError(
            f"{path} has no table to re-encode: its experts are in training form. "
            "Fold them with the encoding that you want: mole reparameterize."
        )
    table = open_table(path / TABLE)
    if table.manifest.fingerprint != settings.fingerprint:
        raise TableError(f"{table.folder}: this is the table of another model than {path}.")
    return {TABLE: table, **embeddings}


def _tell_of_rounding(sources: dict[str, Table], notify: Notify) -> None:
    encodings = {source.layout.encoding.name for source in sources.values()} - {"float32"}
    if encodings:
        anew = "Fold the experts" if set(sources) <= {BARE, TABLE} else "Make the tables"
        notify(
            f"The source is in {', '.join(sorted(encodings))}: what that rounded away is not "
            f"brought back. {anew} anew where you have {'them' if 'Fold' in anew else 'the model'}."
        )


def _require_other_encoding(sources: dict[str, Table], chosen: Encoding) -> None:
    # An older version's layout is another.
    layouts = [(one.layout, RecordLayout(one.layout.shape, chosen)) for one in sources.values()]
    if all(layout == wanted for layout, wanted in layouts):
        first = next(iter(sources.values()))
        raise UserError(
            f"{first.folder} is in {in_words(chosen)} already; choose another encoding."
        )


def in_words(encoding: Encoding) -> str:
    """`nf4 (blocks of 768)`, `bfloat16`."""
    blocks = "" if encoding.block_size is None else f" (blocks of {encoding.block_size})"
    return f"{encoding.name}{blocks}"


def _require_new_folder(read: Sequence[Path], out: Path) -> None:
    require_new(out)
    for folder in read:  # where the table is a link, it lies in another place than the rest
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{out} lies in {folder}, which is read; choose a folder outside of it."
            )


def copy_beside_tables(folder: Path, target: Path) -> None:
    """Bring all but the tables of an inference folder to the new folder `target`.

    A link to a folder stays one, to the same folder.
    """
    for source in sorted(folder.rglob("*")):
        relative = source.relative_to(folder)
        if relative.parts[0] in (TABLE, EMBEDDINGS):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and source.is_symlink():
            (target / relative).symlink_to(source.resolve())
        elif source.is_file():
            _bring_file(source, target / relative)


def _bring_file(source: Path, target: Path) -> None:
    """Weights are linked, since they are large and are replaced, never written to. The rest may
    be edited by hand in one of the folders, so each gets its own."""
    if source.suffix == ".safetensors":
        link_or_copy(source, target)
    else:
        copy_file(source, target)
