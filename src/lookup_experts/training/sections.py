"""Documents to sections, and sections to pieces: the units that are tokenised in parallel.

A section is a document, or a part of a long one. A long document is cut where a tokenizer would
cut anyway: after a line end, or else before a space, that has no other white space beside it. For
byte-level tokenizers the sections then give the same tokens as the whole. A piece is as many
sections as make a good unit of work. Both depend on the text alone, so that a resumed run finds the
same pieces.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lookup_experts.training.documents import Chunk

SECTION_CHARACTERS = 2**20
"""The longest section: bounds what tokenising needs, about 100 MB."""
PIECE_CHARACTERS = 2**21
"""A piece is closed when it has as many: one to two seconds of tokenising."""
PIECE_SECTIONS = 2**15
"""Likewise, where documents are a few characters long."""


@dataclass(frozen=True)
class Section:
    """A document or a part of one."""

    text: str
    starts_document: bool
    ends_document: bool
    position: int
    """Bytes of all inputs read so far."""

    @property
    def is_empty_document(self) -> bool:
        return self.starts_document and self.ends_document and not self.text.strip()


def cut_into_sections(chunks: Iterable[Chunk]) -> Iterator[Section]:
    """The sections of all documents, in order."""
    text, starts_document = "", True
    for chunk in chunks:
        text += chunk.text
        start = 0
        while len(text) - start > SECTION_CHARACTERS:
            end = _cut_position(text, start, start + SECTION_CHARACTERS)
            yield Section(text[start:end], starts_document, False, chunk.position)
            start, starts_document = end, False
        text = text[start:]
        if chunk.ends_document:
            yield Section(text, starts_document, True, chunk.position)
            text, starts_document = "", True


def _cut_position(text: str, start: int, stop: int) -> int:
    """The best place to cut, in the second half of `start` to `stop`."""
    middle = (start + stop) // 2
    line_end = _last_lone(text, "\n", middle, stop)
    if line_end is not None:
        return line_end + 1
    space = _last_lone(text, " ", middle, stop)
    return stop if space is None else space


def _last_lone(text: str, space: str, start: int, stop: int) -> int | None:
    """Where a white-space character last stands between characters that are none."""
    found = text.rfind(space, start, stop)
    while found > start:
        if not text[found - 1].isspace() and not text[found + 1].isspace():
            return found
        found = text.rfind(space, start, found)
    return None


def group_into_pieces(sections: Iterable[Section]) -> Iterator[list[Section]]:
    """Consecutive sections, together at least `PIECE_CHARACTERS` or `PIECE_SECTIONS`."""
    piece: list[Section] = []
    num_characters = 0
    for section in sections:
        piece.append(section)
        num_characters += len(section.text)
        if num_characters >= PIECE_CHARACTERS or len(piece) >= PIECE_SECTIONS:
            yield piece
            piece, num_characters = [], 0
    if piece:
        yield piece
