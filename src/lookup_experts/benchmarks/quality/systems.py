"""The systems that are compared, by name.

    dense                                 the backbone alone
    moe-10e                               top-2 of 10 routed experts on the hidden state
    mole-4e                               4 lookup experts beside the FFN
    mole-4e:size=128,z_loss=0.001         the same with keys of the recipe's section changed

Everything else is the same for all: the recipe that they are made from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import yaml  # type: ignore[import-untyped]

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.training.recipe import Recipe

DEFAULT_SYSTEMS = ("dense", "moe-10e", "mole-4e")

_SECTIONS = {"moe": "moe", "mole": "experts"}


@dataclass(frozen=True)
class System:
    """One model to train."""

    name: str
    section: str | None
    """The section of the recipe's model that holds its experts; None for dense."""
    settings: Mapping[str, Any]
    """What stands in that section."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The system of a name; a `UserError` for what is none."""
        kind, _, changes = name.partition(":")
        if kind == "dense" and not changes:
            return cls(name, None, {})
        family, _, experts = kind.partition("-")
        if family not in _SECTIONS or not experts.endswith("e") or not experts[:-1].isdigit():
            raise UserError(
                f"No system is called {name!r}; expected dense, moe-10e, mole-4e or the like, "
                "with changed keys after a colon: mole-4e:size=128."
            )
        settings = {"num_experts": int(experts[:-1]), **_read_changes(name, changes)}
        return cls(name, _SECTIONS[family], settings)

    def recipe(self, base: Recipe, *, tokens: int, seed: int, points: int) -> Recipe:
        """The base recipe with this system's experts.

        Args:
            base: a dense recipe; its schedule is stretched to `tokens`.
            seed: decides the weights before training and the order of the data.
            points: validations, spread evenly.
        """
        values = base.to_dict()
        model, training = values["model"], values["training"]
        for section in _SECTIONS.values():
            model.pop(section, None)
        if self.section is not None:
            model[self.section] = dict(self.settings)
        training.pop("steps", None)
        steps = -(-tokens // base.training.tokens_per_step)
        every = max(1, steps // points)
        training |= {"tokens": tokens, "seed": seed}
        training |= {"validate_every": every, "checkpoint_every": every, "keep_checkpoints": 1}
        return Recipe.from_dict(values)

    @property
    def folder_name(self) -> str:
        """The name as a folder's, without the characters that folders don't like."""
        return self.name.replace(":", "+").replace(",", "+")


def _read_changes(name: str, text: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{name!r}: {word!r} should be key=value.")
        changes[key] = yaml.safe_load(value)
    return changes


def ablation_systems(name: str, base: Recipe) -> tuple[str, ...]:
    """The systems of one of the paper's ablations (section 4.3).

    Args:
        name: `losses`, auxiliary losses on MoLE; `size`, the experts' hidden size D_r = d, 4d,
            16d; `number`, N = 2 to 32; `path`, from MoE to MoLE, one change at a time.
        base: the recipe, for its sizes.
    """
    width, ffn_size = base.model.hidden_size, base.model.ffn_size
    sets = {
        "losses": (
            "mole-4e",
            "mole-4e:load_balance_loss=0.01",
            "mole-4e:load_balance_loss=0.01,z_loss=0.001",
        ),
        "size": tuple(f"mole-4e:size={factor * width}" for factor in (1, 4, 16)),
        "number": tuple(f"mole-{count}e" for count in (2, 4, 8, 16, 32)),
        "path": (
            "moe-10e",
            "moe-10e:experts_per_token=10,load_balance_loss=0,z_loss=0",
            f"moe-4e:experts_per_token=4,size={ffn_size},shared_size={ffn_size},"
            "load_balance_loss=0,z_loss=0",
            "mole-4e",
        ),
    }
    if name not in sets:
        raise unknown_name("ablation", name, sets)
    return sets[name]
