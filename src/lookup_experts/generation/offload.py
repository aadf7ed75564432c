"""The embeddings of a released model -> tables on disk: a model folder becomes another.

The new folder holds the rest of the weights, everything else that the old one had, and a table for
each embedding. As in `folding.py` it is made under another name and renamed when it is complete; an
interrupted run is taken up again by the same call. Nothing holds an embedding in memory: its rows
go from the checkpoint's own files into the table's in pieces.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lookup_experts.errors import UserError
from lookup_experts.folders.adapters import refuse_adapters
from lookup_experts.folders.checkpoint import (
    StoredRows,
    copy_weights_without,
    sources_of,
    stored_tensors,
)
from lookup_experts.folders.configuration import MODEL_TYPE, nested
from lookup_experts.folders.load import known_backbones, saved_class
from lookup_experts.folders.model_folder import (
    CONFIG,
    begin_inference_folder,
    copy_file,
    first_line,
    local_folder,
    read_config,
    require_new,
)
from lookup_experts.folders.offloaded_model import PREFIX
from lookup_experts.folders.own_code import needs_own_code
from lookup_experts.folders.tables import EMBEDDINGS, embedding_place, tables_of
from lookup_experts.generation.folding import tokenizer_hash
from lookup_experts.model.blocks import text_config
from lookup_experts.model.embedding_settings import KEY, EmbeddingSettings, embedding_settings
from lookup_experts.table.build import (
    build_table,
    copy_table,
    full_disk_as_user_error,
    plan_table,
)
from lookup_experts.table.encoding import Encoding, get_encoding
from lookup_experts.table.files import write_whole
from lookup_experts.table.layout import TableShape
from lookup_experts.table.opening import Table
from lookup_experts.table.progress import Progress
from lookup_experts.table.store import Notify, log


def offload(
    model_or_folder: Any,
    out: str | Path,
    modules: Sequence[str] | None = None,
    encoding: str = "bfloat16",
    *,
    block_size: int | None = None,
    progress: Progress | None = None,
    notify: Notify = log,
) -> dict[str, Table]:
    """Put embeddings of a model of transformers into tables on disk, and write its folder anew.

    Args:
        model_or_folder: a folder with safetensors files, or a model, which is saved first.
        out: the folder to make; must not exist yet.
        modules: names of embeddings, as `model.named_modules()` has them; default: those that are
            known to be large and read by token: whatever `get_per_layer_input_embeddings` gives
            (Gemma 3n, Gemma 4), and hashed n-grams (Qwen4Exp's `ngram_embedding`).
        encoding: how the tables store numbers. Rows are exact in the checkpoint's own dtype, or a
            wider one.
        block_size: of the encodings nf4 and nf3: how many neighbours share a scale.
        progress: called with (ids done, ids in all), for one table after the other.
        notify: told what was found and what is rounded, and when an interrupted run is taken up
            again; default: a warning of the logger `lookup_experts`.

    Returns:
        The finished tables, by the names of the modules.

    Raises:
        UserError: `out` exists; a module isn't there, or is no embedding that a table can stand in
            for; the checkpoint lacks its tensor; the disk is too small.
    """
    out = Path(out)
    chosen = get_encoding(encoding, block_size)
    require_new(out)
    if not isinstance(model_or_folder, nn.Module):
        return _offload(local_folder(model_or_folder), out, modules, chosen, progress, notify)
    model: Any = model_or_folder
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"Expected a model of transformers or its folder, got a {type(model).__name__}."
        )
    refuse_adapters(model, "offloaded")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.saved-") as folder:
        with full_disk_as_user_error(out):
            model.save_pretrained(folder)
        return _offload(Path(folder), out, modules, chosen, progress, notify)


def _offload(
    folder: Path,
    out: Path,
    modules: Sequence[str] | None,
    encoding: Encoding,
    progress: Progress | None,
    notify: Notify,
) -> dict[str, Table]:
    config = read_config(folder)
    if needs_own_code(config):
        raise UserError(
            f"{folder} has code of its own, and embeddings are offloaded of transformers' own "
            "models only."
        )
    model = _without_values(folder, config)
    stored = stored_tensors(folder)
    found = find_embeddings(model, modules)
    sources = sources_of(model, list(stored), list(found))
    rows = {name: StoredRows(name, [stored[source] for source in sources[name]]) for name in found}
    for name, module in found.items():
        _require_size(folder, name, module, rows[name])
    if not modules:
        notify(f"Offloading {', '.join(found)}.")
    partial = begin_inference_folder(out, notify, EMBEDDINGS)
    tables, settings = {}, {}
    for name in found:
        layers, per_token = _layers_of(model, name), _rows_per_token(model, name)
        if not _keeps(encoding, rows[name].dtype):
            dtype = str(rows[name].dtype).removeprefix("torch.")
            notify(f"The rows of {name} are {dtype}, so {encoding.name} rounds them.")
        fingerprint = rows[name].fingerprint(progress)
        plan = plan_table(
            TableShape(rows[name].num_rows, layers, 1, rows[name].width // layers),
            encoding,
            fingerprint=fingerprint,
            evaluation_bytes=2 * rows[name].row_bytes,
            tokenizer_hash=tokenizer_hash(folder) if per_token == 1 else None,
        )
        place = partial / embedding_place(name)
        build_table(place, plan, rows[name].by_layer(layers), progress)
        tables[name] = Table(out / embedding_place(name), plan.manifest)
        settings[name] = EmbeddingSettings(layers, per_token, fingerprint)
    left_out = {source for name in found for source in sources[name]}
    with full_disk_as_user_error(partial):
        copy_weights_without(folder, partial, left_out)
        _copy_the_rest(folder, partial)
        _write_config(config, type(model).__name__, settings, partial)
    partial.rename(out)
    return tables


def _without_values(folder: Path, config: dict[str, Any]) -> Any:
    """The model of a folder, as it would be loaded, on the device `meta`."""
    try:
        loaded = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}: transformers can't read its {CONFIG}: {first_line(error)}"
        ) from (error)
    if config.get("model_type") == MODEL_TYPE:
        model_class = saved_class(config)
    else:
        known = known_backbones(type(loaded))
        named = [kind for kind in known if kind.__name__ in (loaded.architectures or ())]
        if not named:
            raise UserError(
                f"{folder}: a model of {' or '.join(loaded.architectures or ['no stated class'])}; "
                "embeddings are offloaded of models with a language-model head that transformers "
                "knows."
            )
        model_class = named[0]
    try:
        with torch.device("meta"):
            return model_class(loaded)
    except ImportError as error:  # of a part that deals with images, say
        raise UserError(f"{folder}: its model can't be made here: {first_line(error)}") from error


# ------------------------------------------------------------------------------ which embeddings


def find_embeddings(model: Any, names: Sequence[str] | None) -> dict[str, nn.Embedding]:
    """The embeddings of those names, or those that are known to be worth it.

    Raises:
        UserError: there are none, or one can't be read from a table.
    """
    if not names:
        known = known_embeddings(model)
        if not known:
            largest = sorted(_embeddings(model).items(), key=lambda item: -item[1].weight.numel())
            raise UserError(
                f"{type(model).__name__} has no embeddings that are known to be read by token and "
                "layer or n-gram. Name the module: its embeddings are "
                f"{', '.join(name for name, _ in largest[:5]) or 'none'}."
            )
        names = list(known)
    found = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"{type(model).__name__} has no module {name!r}. Its embeddings: "
                f"{', '.join(_embeddings(model)) or 'none'}."
            ) from None
        _require_embedding(model, name, module)
        found[name] = module
    return found


def known_embeddings(model: Any) -> dict[str, nn.Embedding]:
    """Embeddings that are read by token and layer, or by n-gram: the large ones of released
    models."""
    found = {}
    per_layer = _per_layer_embedding(model)
    for name, module in _embeddings(model).items():
        if module is per_layer or name.rpartition(".")[2] == "ngram_embedding":
            found[name] = module
    return found


def _embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }


def _per_layer_embedding(model: Any) -> Any:
    """Gemma's; None of models that have none, or say so by an error."""
    try:
        return model.get_per_layer_input_embeddings()
    except AttributeError:
        return None


def _require_embedding(model: Any, name: str, module: Any) -> None:
    if not isinstance(module, nn.Embedding):
        raise UserError(
            f"{name} is a {type(module).__name__}; only embeddings (torch.nn.Embedding), which "
            "are read by rows, can be offloaded."
        )
    if name in embedding_settings(model.config):
        raise UserError(f"{name} lies in a table already.")
    if module.max_norm is not None:
        raise UserError(f"{name} has max_norm, which changes rows as they are read.")
    shared = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is module.weight and other != f"{name}.weight"
    ]
    tied = text_config(model.config).tie_word_embeddings or model.config.tie_word_embeddings
    is_input = module is model.get_input_embeddings()
    if shared or (tied and is_input and model.get_output_embeddings() is not None):
        other = shared[0].removesuffix(".weight") if shared else "the output layer"
        raise UserError(
            f"The weight of {name} is that of {other} too (tied), where all of it is needed for "
            "every token, so offloading would save nothing."
        )
    if is_input and _finds_ids_by_rows(model):
        raise UserError(
            f"{type(model).__name__} compares with every row of {name} to find token ids, so it "
            "can't lie in a table; its other embeddings can."
        )
    settings = getattr(model.config, "lookup_experts", None)
    if is_input and settings is not None and settings.get("form") != "table":
        raise UserError(
            f"The lookup experts of this model are made from {name}: fold them first "
            "(mole reparameterize), then offload."
        )


def _finds_ids_by_rows(model: nn.Module) -> bool:
    """Whether a model compares `inputs_embeds` with its input embedding to find the ids."""
    for module in model.modules():
        if hasattr(module, "reverse_embedding"):
            return True
        per_layer = getattr(module, "get_per_layer_inputs", None)
        if per_layer is not None and "inputs_embeds" in inspect.signature(per_layer).parameters:
            return getattr(module, "hidden_size_per_layer_input", None) is not None
    return False


def _layers_of(model: Any, name: str) -> int:
    """In how many parts a row is used."""
    module = model.get_submodule(name)
    layers: int = text_config(model.config).num_hidden_layers
    if module is _per_layer_embedding(model) and module.embedding_dim % layers == 0:
        return layers
    return 1


def _rows_per_token(model: Any, name: str) -> int:
    """How many rows a token needs; n-grams are looked up by several hashes."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "ngram_heads", 1)


def _require_size(folder: Path, name: str, module: nn.Embedding, rows: StoredRows) -> None:
    expected = (module.num_embeddings, module.embedding_dim)
    if (rows.num_rows, rows.width) != expected:
        raise UserError(
            f"{folder}: the weight of {name} is {rows.num_rows} x {rows.width} in the checkpoint, "
            f"and {expected[0]} x {expected[1]} by {CONFIG}."
        )


_EXACT = {
    torch.float32: ("float32",),
    torch.bfloat16: ("bfloat16", "float32"),
    torch.float16: ("float16", "float32"),
}


def _keeps(encoding: Encoding, dtype: torch.dtype) -> bool:
    """Whether rows of a dtype come back from an encoding as they were."""
    return encoding.name in _EXACT.get(dtype, ())


# ------------------------------------------------------------------------------ the other files


def _copy_the_rest(folder: Path, target: Path) -> None:
    """All that is no weight, and the tables that are there already; weights in other formats don't
    come along."""
    for path in sorted(folder.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".msgpack", ".h5")
        is_index = path.name.endswith(".index.json")
        if path.is_file() and not weights and not is_index and path.name != CONFIG:
            copy_file(path, target / path.name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        (target / templates.name).mkdir()
        for path in sorted(templates.iterdir()):
            copy_file(path, target / templates.name / path.name)
    for place in tables_of(folder):
        copy_table(folder / place, target / place)


def _write_config(
    config: dict[str, Any],
    model_class: str,
    settings: dict[str, EmbeddingSettings],
    target: Path,
) -> None:
    saved = config if config.get("model_type") == MODEL_TYPE else nested(config)
    before = saved.get(KEY) or {}
    name = model_class if before else _offloaded_name(model_class)
    saved = {
        **saved,
        "architectures": [name],
        KEY: {**before, **{module: one.to_dict() for module, one in settings.items()}},
    }
    write_whole(target / CONFIG, (json.dumps(saved, indent=2, sort_keys=True) + "\n").encode())


def _offloaded_name(model_class: str) -> str:
    experts = "LookupExperts"
    if model_class.startswith(experts):
        return experts + PREFIX + model_class.removeprefix(experts)
    return PREFIX + model_class
