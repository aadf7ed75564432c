"""The systems that are compared, by name.

    dense                 the backbone alone
    mole-4e               4 lookup experts per layer, their table on disk
    moe-10e               top-2 of 10 experts per layer, all in memory: more than the others have
    moe-10e-disk          its experts on disk, read past the page cache; our offloading
    moe-10e-ram           its experts in RAM beside, copied to where the model computes; likewise
    moe-10e-mmap          its experts mapped into memory, as in llama.cpp
    moe-10e-accelerate    its experts offloaded to disk by accelerate

Any number of experts will do: mole-16e, moe-34e-disk.
"""

import re
from dataclasses import dataclass
from typing import Self

from lookup_experts.errors import UserError

DEFAULT_SYSTEMS = (
    "dense",
    "mole-4e",
    "moe-10e",
    "moe-10e-disk",
    "moe-10e-ram",
    "moe-10e-mmap",
    "moe-10e-accelerate",
)
RESIDENT, DISK, RAM, MMAP, ACCELERATE = "resident", "disk", "ram", "mmap", "accelerate"
CAPPED = (DISK, RAM, MMAP, ACCELERATE)
"""Where experts are kept elsewhere, within a budget of memory."""
PEERS = (MMAP, ACCELERATE)
"""Those that wait for the disk inside of reading their memory, so that it can't be told apart."""

_NAME = re.compile(r"(mole|moe)-([1-9]\d*)e(?:-(disk|ram|mmap|accelerate))?")


@dataclass(frozen=True)
class System:
    """A model, and where its experts are."""

    name: str
    family: str
    """dense, mole or moe."""
    num_experts: int = 0
    """N of each layer."""
    way: str = RESIDENT
    """Of a MoE: where its experts are."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """The system of a name; a `UserError` for what is none."""
        if name == "dense":
            return cls(name, "dense")
        found = _NAME.fullmatch(name)
        if found is None or (found[1] == "mole" and found[3]):
            raise UserError(
                f"No system is called {name!r}; expected dense, mole-4e, moe-10e, or a MoE with "
                "its experts elsewhere: moe-10e-disk, -ram, -mmap or -accelerate."
            )
        way = DISK if found[1] == "mole" else found[3] or RESIDENT
        return cls(name, found[1], int(found[2]), way)

    @property
    def model_name(self) -> str:
        """The model without where its experts are: systems of one give the same logits."""
        return self.name.removesuffix(f"-{self.way}")


@dataclass
class Counts:
    """What a system did for one forward pass."""

    bytes_loaded: int = 0
    stall_seconds: float = 0.0
    experts_used: int = 0
    """Summed over layers."""
    experts_loaded: int = 0


def parse_systems(names: list[str] | None) -> list[System]:
    """The systems of the given names, the default ones if there are none; dense comes first.

    Raises:
        UserError: an unknown name.
    """
    chosen = dict.fromkeys(["dense", *(names or DEFAULT_SYSTEMS)])
    return [System.parse(name) for name in chosen]
