"""Where a model folder is, and its files, whoever wrote them: configuration and weights."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lookup_experts.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TABLE = "table"
"""The folder of the table, of a model in table form."""
PARTIAL = ".partial"
"""The folder of what a save has written so far, see `replacing.py`."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(name: str | Path, **hub: Any) -> Path:
    """The folder on this machine that a path or a name on the hub stands for.

    Args:
        name: a folder's path, or a model's name on the hub, which is fetched.
        hub: options of the hub's client: revision, cache_dir, token.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), **hub))


def local_folder(folder: str | Path) -> Path:
    """As `find_folder`, for what a user has given.

    Raises:
        UserError: there is no such folder, and none can be fetched.
    """
    path = Path(folder)
    if path.exists():
        if not path.is_dir():
            raise UserError(f"{path} is a file; give the model's folder.")
        return path
    if not isinstance(folder, str) or not _HUB_NAME.fullmatch(folder):
        raise UserError(f"No such folder: {path}.")
    try:
        return find_folder(folder)
    except Exception as error:  # the hub's client raises many kinds, all of them: not to be had
        raise UserError(
            f"No such folder: {path}; and no model of that name could be fetched from the "
            f"Hugging Face hub ({type(error).__name__})."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`, as it stands there."""
    if not folder.exists():
        raise UserError(f"No such folder: {folder}.")
    if (folder / "adapter_config.json").is_file() and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds adapters, not a model: load the model that they were trained on and "
            "put them onto it with PEFT, PeftModel.from_pretrained(model, folder)."
        )
    if not (folder / CONFIG).is_file():
        interrupted = (folder / PARTIAL).exists()
        raise UserError(
            f"{folder} is not a model folder: it has no {CONFIG}."
            + (" Saving a model into it was interrupted; save it again." if interrupted else "")
        )
    return _read_json_object(folder / CONFIG)


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, it holds a {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = _read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{folder / INDEX} has no weight_map, so it is no index of weights.")
        names = sorted(set(places.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} is incomplete: {missing[0]}, named in {INDEX}, is missing.")
        return [folder / name for name in names]
    raise UserError(f"{folder} is not a model folder: it has neither {WEIGHTS} nor {INDEX}.")


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a model folder; only the files' headers are read."""
    names: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except Exception as error:
            raise UserError(f"{path} can't be read as safetensors: {error}.") from error
    return names


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return state


def refuse_partial_loading(folder: Path, report: dict[str, Any], *kinds: str) -> None:
    """Raise a `UserError` if transformers' loading report names tensors of the given kinds.

    Args:
        folder: what was loaded.
        report: the loading info of `from_pretrained`.
        kinds: of `missing`, `mismatched` (in shape) and `unexpected`.
    """
    for kind in kinds:
        names = sorted(str(name) for name in report[f"{kind}_keys"])
        if names:
            raise UserError(
                f"{folder}: the weights don't fit the model ({len(names)} {kind} tensors, the "
                f"first is {names[0]})."
            )


def require_new(out: Path) -> None:
    """Refuse a folder to be made that is there already, if only as a link that leads nowhere."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; choose another folder, or delete it.")


def unfinished_place(out: Path) -> Path:
    """Where the folder `out` is while it is being made."""
    return out.with_name(f"{out.name}.partial")


def unfinished_folder(out: Path, notify: Callable[[str], None]) -> Path:
    """The folder beside `out` that is filled and then renamed, perhaps begun by an earlier run.

    Args:
        out: the folder to make.
        notify: told when an interrupted run is taken up again.
    """
    partial = unfinished_place(out)
    for path in (partial, partial / TABLE):
        if path.is_symlink() and not path.is_dir():
            raise UserError(f"{path} is a link that leads to no folder; delete it.")
    if partial.exists():
        notify(f"Going on with the interrupted run in {partial}.")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def begin_inference_folder(out: Path, notify: Callable[[str], None]) -> Path:
    """As `unfinished_folder`; of an earlier run there is nothing in it but the table.

    The folder of the table is made first and tells a run that was interrupted from what is
    somebody's. A link in its place is written through: so a table gets to another disk.

    Raises:
        UserError: there is a folder of that name that no run has begun.
    """
    partial = unfinished_place(out)
    names = [path.name for path in partial.iterdir()] if partial.is_dir() else []
    if names and TABLE not in names:
        raise UserError(f"{partial} is in the way and no interrupted run; move or delete it.")
    partial = unfinished_folder(out, notify)
    (partial / TABLE).mkdir(exist_ok=True)
    for path in partial.iterdir():  # written in part, or of another model
        if path.name == TABLE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return partial


def copy_file(source: Path, target: Path) -> None:
    """Copy what a file says, all of it or none: a file of one's own, whatever the mode of `source`.

    Of a symbolic link (the hub's cache is full of them) the file behind it is meant.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def give_usual_mode(folder: Path) -> None:
    """Let those read a folder's weights who may read its other files.

    safetensors writes files that their owner alone can read, whatever the user's umask says.
    """
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        if path.stat().st_uid == os.geteuid() and path.stat().st_nlink == 1:
            path.chmod(mode)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
