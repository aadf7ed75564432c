"""What a folder of token shards is being made from, so that no two jobs mix in one folder.

`job.json` is written before anything else. A run that finds one goes on only if it was asked for
the same thing; how many workers do it, and how the tokenizer was named, makes no difference.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from lookup_experts.errors import UserError
from lookup_experts.training.files import atomic_write
from lookup_experts.training.manifest import MANIFEST_NAME

JOB_NAME = "job.json"
PIECES_NAME = "pieces"
_VERSION = 1
"""Changes with anything that makes other pieces of the same text."""

_OPTIONS = {
    "tokenizer_hash": "another tokenizer",
    "eos_token_id": "another --eos-token",
    "bos_token_ids": "another beginning of the documents (--no-bos)",
    "validation": "another --validation",
    "text_field": "another --text-field",
    "version": "another version of this program",
}


@dataclass(frozen=True)
class Job:
    """Everything that the bytes of the shards depend on."""

    inputs: list[dict[str, Any]]
    tokenizer_name: str
    tokenizer_hash: str
    eos_token_id: int
    validation: float
    text_field: str
    bos_token_ids: list[int] = field(default_factory=list)
    """Jobs from before there was a choice have none: documents began with their text."""
    version: int = _VERSION

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The job that a folder was begun for, or None."""
        path = folder / JOB_NAME
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} can't be read: {error}. Delete {folder}, or choose another --out."
            ) from None

    def save(self, folder: Path) -> None:
        with atomic_write(folder / JOB_NAME) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())

    def difference(self, other: Self) -> str | None:
        """In words, the first thing in which `other` differs; None if it is the same job."""
        for option, words in _OPTIONS.items():
            if getattr(self, option) != getattr(other, option):
                return words
        return _inputs_difference(self.inputs, other.inputs)


def _inputs_difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    known = {source["name"]: source for source in before}
    for source in now:
        if source["name"] not in known:
            return f"{source['name']} was not among the inputs"
        if source != known[source["name"]]:
            return f"{source['name']} has been changed since"
    missing = known.keys() - {source["name"] for source in now}
    if missing:
        return f"without {min(missing)}"
    return None if before == now else "another order of the inputs"


def begin(folder: Path, job: Job) -> Job:
    """Begin or take up `job` in `folder`, and give back the job as it was begun.

    Where nothing has been finished yet, another job may take the place of the first.
    """
    begun = Job.load(folder)
    if begun is None:
        if any(path for path in folder.iterdir() if not _is_half_a_job(path)):
            raise UserError(
                f"{folder} is not empty and holds nothing of `mole prepare`. "
                "Choose another --out, or an empty folder."
            )
    else:
        difference = begun.difference(job)
        if difference is None:
            return begun
        if _has_results(folder):
            raise UserError(
                f"{folder} was made or begun for another job: {difference}. "
                "Choose another --out, or delete the folder."
            )
        _remove_pieces_folder(folder)
    job.save(folder)
    return job


def _is_half_a_job(path: Path) -> bool:
    """Is it what a run leaves that is killed while it writes its job?"""
    return path.name.startswith(JOB_NAME) and path.suffix == ".tmp"


def _has_results(folder: Path) -> bool:
    pieces = (folder / PIECES_NAME).glob("*.safetensors")
    return (folder / MANIFEST_NAME).exists() or any(pieces)


def _remove_pieces_folder(folder: Path) -> None:
    """It holds no piece, but may hold notes of the other job."""
    if (folder / PIECES_NAME).exists():
        shutil.rmtree(folder / PIECES_NAME)
