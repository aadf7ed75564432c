"""Text out of tokens, as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence
from typing import Any

UNDECIDED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8
"""Tokens that one character may take; what is no character by then never becomes one."""


class IncrementalText:
    """Turns tokens into text piece by piece; the pieces joined are the text of all tokens.

    A token alone may be part of a character, or read differently behind another one. So a short
    window of tokens is decoded each time, and what it has more than before is given.

    Args:
        decode: token ids -> text.
        before: the tokens that the text continues.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(before[-LONGEST_CHARACTER:])
        self._context = len(self._window)
        """Tokens of the window whose text was given before."""
        self._given = len(decode(self._window).rstrip(UNDECIDED))
        """Characters of the window's text that were given."""

    def add(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is not complete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        pending = len(self._window) - self._context
        if text.endswith(UNDECIDED) and pending < LONGEST_CHARACTER:
            return ""
        piece = text[self._given :]
        if piece:  # special tokens have no text and are no context either
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def rest(self) -> str:
        """What was held back, complete or not; for the end."""
        if len(self._window) == self._context:
            return ""
        piece = self._decode(self._window)[self._given :]
        self._context = len(self._window)
        return piece


class StopStrings:
    """Ends a text before the first stop string in it, wherever tokens begin and end.

    Args:
        stops: none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that can be given now: no stop string may begin in it."""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
        keep = max(self._beginning_of(stop, text) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning_of(stop: str, text: str) -> int:
        """How many characters at the end of the text could be the beginning of the stop string."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids -> text, special tokens left out, nothing tidied up."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    return decode
