"""The folder of a training run.

recipe.yaml            the recipe, with everything settled; written first
data.json              which token shards it is trained on
checkpoints/           see `checkpoints.py`
history.jsonl          a line per log: loss and learning rate, or validation
tensorboard/           the same for TensorBoard, where it is installed
config.json, model.safetensors, tokenizer files ...
                       the trained model: what `from_pretrained` takes
summary.json           what came out; written last, so a folder that has one is finished
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.training.checkpoints import UNFINISHED, clear_unfinished
from lookup_experts.training.files import atomic_write, locked
from lookup_experts.training.manifest import Manifest
from lookup_experts.training.recipe import RecipeFile, load_recipe

_MAX_DIFFERENCES = 3
# What may change when a run goes on: when things are told and kept, and how much is computed at
# once. None of it changes the result by more than rounding.
_FREE_KEYS = frozenset(
    f"training.{key}"
    for key in (
        *("log_every", "validate_every", "validate_sequences"),
        *("checkpoint_every", "keep_checkpoints"),
        *("sequences_per_micro_batch", "gradient_checkpointing", "share_expert_outputs"),
    )
)


class RunFolder:
    """Where everything of one run is."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.data = self.path / "data.json"
        self.checkpoints = self.path / "checkpoints"
        self.history = self.path / "history.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.summary = self.path / "summary.json"
        self.unfinished_model = self.path / UNFINISHED

    def locked(self) -> AbstractContextManager[None]:
        """Create the folder and keep other processes from training in it."""
        return locked(self.path, "training")

    def check(self, recipe: RecipeFile, data: dict[str, Any]) -> list[str]:
        """Refuse a folder with other things in it; say in what an earlier run differs.

        Returns:
            A line for each key that has changed and may.
        """
        if not self.recipe.exists():
            self._refuse_foreign_files()
            return []
        before = _flatten(load_recipe(self.recipe, kind=type(recipe)).to_dict())
        now = _flatten(recipe.to_dict())
        changed = [key for key in sorted(_FREE_KEYS) if before.get(key) != now.get(key)]
        self._compare("recipe", before | {key: now.get(key) for key in changed}, now)
        if self.data.exists():
            self._compare("data", _read_json(self.data), data)
        return [f"{key} was {before.get(key)}, is {now.get(key)} from here on." for key in changed]

    def begin(self, recipe: RecipeFile, data: dict[str, Any]) -> None:
        """Say what the folder is for, and remove what a killed run left half written."""
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        write_text(self.recipe, recipe.to_yaml())
        write_text(self.data, json.dumps(data, indent=1) + "\n")
        clear_unfinished(self.checkpoints)
        clear_unfinished(self.path)

    def _refuse_foreign_files(self) -> None:
        foreign = [path.name for path in self.path.iterdir() if path.suffix != ".tmp"]
        if foreign:
            raise UserError(
                f"{self.path} is not empty and holds no run of `mole train` "
                f"(found {foreign[0]}). Choose another --out, or an empty folder."
            )

    def _compare(self, what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        keys = [key for key in before | now if before.get(key) != now.get(key)]
        if not keys:
            return
        differences = ", ".join(
            f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys[:_MAX_DIFFERENCES]
        )
        raise UserError(
            f"{self.path} holds a run with another {what}: {differences}. "
            f"Choose another --out, or the same {what}."
        )

    def install_model(self, save_tokenizer: Callable[[Path], None]) -> None:
        """Move the model from `unfinished/` to its place, its tokenizer with it.

        The configuration goes last: a folder with one has its weights.

        Args:
            save_tokenizer: writes the tokenizer's files into a folder.
        """
        save_tokenizer(self.unfinished_model)
        for path in sorted(self.unfinished_model.iterdir(), key=lambda p: p.name == "config.json"):
            place = self.path / path.name
            if place.is_dir():  # of a run that was killed here; a folder replaces none
                shutil.rmtree(place)
            path.replace(place)
        self.unfinished_model.rmdir()


def identify_data(manifest: Manifest) -> dict[str, Any]:
    """What tells the token shards of one prepared folder from those of another."""
    return {
        "tokenizer": manifest.tokenizer["hash"],
        **{
            split: [f"{shard.num_tokens} tokens, sha256 {shard.sha256}" for shard in shards]
            for split, shards in manifest.splits.items()
        },
    }


def write_text(path: Path, text: str) -> None:
    """The whole file, or none of it."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}. Choose another --out.") from None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
