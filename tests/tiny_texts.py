"""Random prose, rows of it, and the bytes of a folder."""

import json
import random
from pathlib import Path

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "river",
    "sang",
    "ran",
    "slowly",
    "under",
    "never",
    "and",
]


def prose(num_characters: int, seed: int) -> str:
    """Lines of random words; other for each seed."""
    choose = random.Random(seed)
    lines: list[str] = []
    length = 0
    while length < num_characters:
        lines.append(" ".join(choose.choices(WORDS, k=12)))
        length += len(lines[-1]) + 1
    return "\n".join(lines)[:num_characters]


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
