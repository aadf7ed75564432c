"""Errors that a user can mend, and the words they are told in.

A message says what was given, what was expected and what to do, in one line. The command line
prints it without a traceback and exits with code 2 (`cli.py`); a program catches it by class.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input can't be used as it is; the message says why and what to do."""


class TableError(UserError):
    """A lookup table is missing, damaged, or belongs to another model."""


class DiskFullError(UserError):
    """There is not enough free space for what is about to be written."""


def unknown_name(what: str, given: str, valid: Iterable[str]) -> UserError:
    """An error for a name that is none of `valid`, naming the nearest one.

    Args:
        what: the kind of thing, in the singular: "encoding", "store", "recipe key".
        given: the name as it was given.
        valid: the names that would have been accepted.
    """
    names = sorted(valid)
    close = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {what} {given!r}.{hint} Known: {', '.join(names)}.")
