"""The four ways to run a model that the demo compares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DENSE, MOLE, TABLE = "dense", "mole", "mole-table"
"""The folders of the models, in the demo's folder."""


@dataclass(frozen=True)
class System:
    """A model, and where its expert outputs come from."""

    name: str
    words: str
    folder: str
    store: str = "auto"


SYSTEMS = (
    System("dense", "Dense", DENSE),
    System("mole_experts", "MoLE: experts computed", MOLE),
    System("mole_memory", "MoLE: table in memory", TABLE, "memory"),
    System("mole_disk", "MoLE: table on disk", TABLE, "direct"),
)


def load_system(system: System, demo: Path) -> Any:
    """The system's model, ready to generate.

    Where a store can't bypass the page cache, its statistics say so; nothing is said here.
    """
    from lookup_experts.folders.load import load

    return load(demo / system.folder, store=system.store, notify=lambda message: None)


def count_parameters(demo: Path) -> list[tuple[System, dict[str, int]]]:
    """Of every system, in order: where its parameters are, and how many a token brings.

    Numbers of the table count as parameters: in memory or on disk, as the system keeps them.
    """
    from lookup_experts.generation.inspection import inspect_folder

    counts = {
        folder: inspect_folder(demo / folder)["parameters"] for folder in (DENSE, MOLE, TABLE)
    }
    table = counts[TABLE]
    on_disk = {
        "disk_parameters": table["table"],
        "loaded_parameters_per_token": table["loaded_per_token"],
    }
    return [
        (SYSTEMS[0], {"resident_parameters": counts[DENSE]["resident"]}),
        (SYSTEMS[1], {"resident_parameters": counts[MOLE]["resident"] + counts[MOLE]["experts"]}),
        (SYSTEMS[2], {"resident_parameters": table["resident"] + table["table"]}),
        (SYSTEMS[3], {"resident_parameters": table["resident"], **on_disk}),
    ]
