"""JSON objects that must be exactly as specified: every field is taken once, and what is wrong is
named.
"""

import json
from collections.abc import Sequence
from typing import Any

from lookup_experts.errors import TableError
from lookup_experts.table.format import MAX_TEXT


class Fields:
    """The fields of a JSON object, each taken once; what is wrong is named with its path."""

    def __init__(self, content: object, where: str, path: str = "") -> None:
        self.where, self.path = where, path
        if not isinstance(content, dict):
            raise TableError(f"{where}: {path or 'the file'} must be a JSON object.")
        self._left = dict(content)

    def take(self, key: str) -> Any:
        if key not in self._left:
            raise self.error(key, "is missing")
        return self._left.pop(key)

    def must_be(self, key: str, expected: object) -> None:
        value = self.take(key)
        if type(value) is not type(expected) or value != expected:
            raise self.error(key, f"is {value!r}, expected {expected!r}")

    def one_of(self, key: str, expected: Sequence[int]) -> int:
        value = self.take(key)
        if type(value) is not int or value not in expected:
            listed = " or ".join(map(str, expected))
            raise self.error(key, f"is {value!r}, expected {listed}")
        return value

    def integer(self, key: str) -> int:
        value = self.take(key)
        if type(value) is not int or value < 0:
            raise self.error(key, f"is {value!r}, expected a whole number")
        return value

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            raise self.error(key, f"must be a text of 1 to {MAX_TEXT} characters")
        return value

    def text_or_null(self, key: str) -> str | None:
        return self.text(key) if self._left.get(key, "") is not None else self.take(key)

    def inner(self, key: str) -> "Fields":
        return Fields(self.take(key), self.where, self._name(key))

    def end(self) -> None:
        for key in self._left:
            raise self.error(key, "is not a field of this version")

    def error(self, key: str, problem: str) -> TableError:
        return TableError(f"{self.where}: field {self._name(key)} {problem}.")

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def parse_json(text: str, where: str) -> object:
    """What a JSON text holds; a `TableError` if it can't be read, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{where}: not readable as JSON ({error}).") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("the same key twice")
    return content
