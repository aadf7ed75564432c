"""The answers of a long evaluation so far, in a file, so that an interrupted one goes on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from lookup_experts.errors import UserError

Answer = tuple[float, bool]
"""(log-likelihood of a continuation in nats, whether it is what greedy decoding gives)."""


class AnswerJournal:
    """One line of JSON for each batch of requests that was answered, appended as they come.

    Numbers come back to the last bit. What follows the last whole line, as a kill leaves it, is
    cut off.
    """

    def __init__(self, path: Path, model: str) -> None:
        """Open a journal, or begin one.

        Args:
            path: the file.
            model: whatever tells one model and its options from another, in one line.

        Raises:
            UserError: the file has the answers of another model.
        """
        self._path = path
        self._answers: dict[str, list[Answer]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a+", encoding="utf-8")
        if not self._read(model):
            self._write({"model": model})

    def _read(self, model: str) -> bool:
        """Read what is there; False for a file without a first line."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            self._file.truncate(sum(len(line.encode()) for line in lines[:-1]))
            lines.pop()
        if not lines:
            return False
        try:
            first, *batches = map(json.loads, lines)
            known = first["model"]
            self._answers = {
                batch["key"]: [(float(nats), bool(greedy)) for nats, greedy in batch["answers"]]
                for batch in batches
            }
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} is no journal of answers; delete it.") from error
        if known != model:
            raise UserError(
                f"{self._path} has the answers of another model, or of this one with other "
                "options. Delete it, or give another --out."
            )
        return True

    def get(self, key: str) -> list[Answer] | None:
        """The answers of a batch, None where there are none yet."""
        return self._answers.get(key)

    def add(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep the answers of a batch."""
        self._answers[key] = list(answers)
        self._write({"key": key, "answers": self._answers[key]})

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def batch_key(token_ids: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str:
    """A batch's name in a journal: a hash over contexts and continuations."""
    text = json.dumps([[list(context), list(wanted)] for context, wanted in token_ids])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def folder_identity(folder: Path, **options: Any) -> str:
    """What tells a model folder and the options it is run with from others.

    By names, sizes and times of change, since weights can be many gigabytes.
    """
    files = [
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    text = json.dumps([files, {name: str(value) for name, value in sorted(options.items())}])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
