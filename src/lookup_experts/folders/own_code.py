"""Models with code of their own: classes that a folder brings along as Python files.

The folder's `config.json` names them under `auto_map`, as `file.Class`, and transformers runs them
if `trust_remote_code=True` says that it may. An attached model is saved with the files that its
backbone's classes come from. Nothing here runs a folder's code without being allowed to.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import (
    TRANSFORMERS_DYNAMIC_MODULE_NAME,
    get_class_from_dynamic_module,
    get_relative_import_files,
)
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import copy_file

CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"
"""The keys of an `auto_map` that a causal LM needs."""
_ANOTHER_REPOSITORY = "--"
"""In `owner/name--file.Class`; the class is then no file of the folder."""


def has_own_code(kind: type) -> bool:
    """Whether a class of a model or configuration comes from a folder's code, or is to be saved
    with its code (`register_for_auto_class`)."""
    from_folder = kind.__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
    return from_folder or getattr(kind, "_auto_class", None) is not None


def auto_map(config_class: type, model_class: type) -> dict[str, str]:
    """What `config.json` says of the two classes beside their code; empty where they have none."""
    return {
        key: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
        for key, kind in ((CONFIG, config_class), (MODEL, model_class))
        if has_own_code(kind)
    }


def require_files(*kinds: type) -> None:
    """Refuse classes with code of their own that is in no file, as in a notebook."""
    for kind in kinds:
        file = getattr(sys.modules[kind.__module__], "__file__", None)
        if has_own_code(kind) and (kind.__module__ == "__main__" or file is None):
            raise UserError(
                f"{kind.__name__} is defined in {kind.__module__}, so its code can't be saved with "
                "the model. Put it into a file of its own and import it from there."
            )


def save_code(folder: Path, *kinds: type) -> None:
    """Put the files of those of the classes that have code of their own into a model folder."""
    for kind in kinds:
        if has_own_code(kind):
            module = sys.modules[kind.__module__].__file__
            assert module is not None, "see require_files"
            _copy_module(Path(module), folder)


def copy_named_code(descriptions: Iterable[Path], target: Path) -> None:
    """Bring the code that JSON files name under `auto_map`, and that lies beside them, to the
    folder `target`; it is read, not run.

    Args:
        descriptions: of a tokenizer or processor.
        target: a folder.
    """
    for path in descriptions:
        for module in sorted(_modules_named_by(path)):
            if (path.parent / f"{module}.py").is_file():
                _copy_module(path.parent / f"{module}.py", target)


def copy_custom_generation(folder: Path, target: Path) -> None:
    """Bring a model folder's own `generate`, with what it needs, to the folder `target`."""
    for path in sorted((folder / "custom_generate").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, place)


def _copy_module(module: Path, target: Path) -> None:
    """Copy a file of Python and those beside it that it imports."""
    for path in [module, *map(Path, get_relative_import_files(module))]:
        copy_file(path, target / path.name)


def _modules_named_by(description: Path) -> set[str]:
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
    except ValueError:
        return set()  # whoever needs it will say so
    named = content.get("auto_map") if isinstance(content, dict) else None
    values = named.values() if isinstance(named, dict) else [named]
    references = [r for value in values for r in (value if isinstance(value, list) else [value])]
    return {
        reference.partition(".")[0]
        for reference in references
        if isinstance(reference, str) and _ANOTHER_REPOSITORY not in reference
    }


def needs_own_code(config: dict[str, Any]) -> bool:
    """Whether a `config.json`, of an attached model or another, describes a causal LM that can't be
    loaded without the code beside it."""
    attached = config.get("backbone")
    if isinstance(attached, dict):
        return "auto_map" in attached
    named = config.get("auto_map") or {}
    return (CONFIG in named or MODEL in named) and config.get("model_type") not in CONFIG_MAPPING


def require_trust(where: Any, trusted: Any) -> None:
    """Raise a `UserError` for a folder with code of its own unless that may be run."""
    if not trusted:
        raise UserError(
            f"{where} has code of its own, which isn't run unasked: read its Python files, then "
            "allow it with trust_remote_code=True (on the command line --trust-remote-code)."
        )


def load_classes(folder: Path, named: dict[str, str], model_type: str) -> tuple[Any, Any]:
    """Run the code in a folder that has been allowed to: the classes of configuration and model.

    Args:
        folder: of the attached model.
        named: what `auto_map` gave.
        model_type: of the backbone, for a model whose configuration is of transformers' own.

    Raises:
        UserError: a file is missing or doesn't define its class.
    """
    classes = {}
    for key, reference in named.items():
        try:
            classes[key] = get_class_from_dynamic_module(reference, folder)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise UserError(
                f"{folder}: the code of {reference}, which config.json names, can't be loaded: "
                + " ".join(str(error).split())
            ) from error
        classes[key].register_for_auto_class(key)
    config_class = classes.get(CONFIG) or CONFIG_MAPPING[model_type]
    model_class = classes.get(MODEL)
    if model_class is None:
        raise UserError(f"{folder}: config.json names no class of a model under auto_map.")
    return config_class, add_generation_mixin_to_remote_model(model_class)
