"""Text out of tokens, as they come: whole characters only, and nothing of a stop string."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from lookup_experts.serving.vocabulary import BytesOf

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


class IncrementalText:
    """Turns tokens into text piece by piece; the pieces joined are the text of all tokens.

    Args:
        bytes_of: what a token adds.
        before: the tokens that the text continues.
    """

    def __init__(self, bytes_of: BytesOf, before: Sequence[int] = ()) -> None:
        self._bytes_of = bytes_of
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self.length = 0
        """Characters that were given."""
        self.offset = 0
        """Of them, those before the character that the last token began or went on with."""
        end = b""
        for token_id in reversed(before):
            end = bytes_of(token_id) + end
            if len(end) >= LONGEST_CHARACTER:
                break
        self.begins = not end
        """Whether there is no text yet."""
        self._decoder.decode(end)  # what has begun there is completed here

    def add(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is not complete."""
        piece = self._bytes_of(token_id, self.begins)
        self.begins = self.begins and not piece
        is_open = bool(self._decoder.getstate()[0])
        first = self._decoder.decode(piece[:1])
        # What was open stays broken, and is no part of this token, if it doesn't go on with it.
        self.offset = self.length + (is_open and first.startswith(BROKEN))
        return self._count(first + self._decoder.decode(piece[1:]))

    def rest(self) -> str:
        """A mark for a character that was begun and not completed; for the end."""
        return self._count(self._decoder.decode(b"", final=True))

    def _count(self, piece: str) -> str:
        self.length += len(piece)
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
