"""Cutting long documents: nothing lost, whatever the chunks, and where a tokenizer cuts anyway."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookup_experts.training import sections
from lookup_experts.training.documents import Chunk
from lookup_experts.training.sections import cut_into_sections, group_into_pieces

LIMIT = 40
TEXT = st.text(alphabet="ab .\n\r\té", max_size=300)


@pytest.fixture(autouse=True, scope="module")
def small_sections():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SECTION_CHARACTERS", LIMIT)
        patch.setattr(sections, "PIECE_CHARACTERS", 3 * LIMIT)
        patch.setattr(sections, "PIECE_SECTIONS", 10)
        yield


def cut(documents: list[str], chunk_length: int = 10**6) -> list[sections.Section]:
    chunks = []
    for text in documents:
        starts = range(0, len(text), chunk_length)
        chunks += [Chunk(text[i : i + chunk_length], False, 0) for i in starts]
        chunks.append(Chunk("", True, 0))
    return list(cut_into_sections(chunks))


@given(st.lists(TEXT, max_size=5))
def test_sections_of_a_document_are_its_text(documents):
    rebuilt: list[str] = []
    for section in cut(documents):
        assert len(section.text) <= LIMIT
        if section.starts_document:
            rebuilt.append("")
        rebuilt[-1] += section.text
    assert rebuilt == documents


@given(TEXT, st.integers(1, 100))
def test_the_chunks_read_make_no_difference(text, chunk_length):
    assert cut([text], chunk_length) == cut([text])


def test_cuts_after_a_line_end_else_before_a_space_else_anywhere():
    line, words, letters = "x" * 30 + "\n", "x" * 25 + " " + "y" * 5, "x" * 100
    assert cut([line + letters])[0].text == line
    assert cut([words + letters])[0].text == "x" * 25
    assert cut([letters])[0].text == "x" * LIMIT


def test_sections_give_the_tokens_of_the_whole_document(tiny_tokenizer):
    text = "the cat sang,  and\n\nthe dog ran\nslowly (never) again.\n" * 50
    parts = [section.text for section in cut([text])]
    assert len(parts) > 20
    ids = [i for part in parts for i in tiny_tokenizer.encode(part).ids]
    assert ids == tiny_tokenizer.encode(text).ids


@given(st.lists(TEXT, max_size=40))
def test_pieces_are_all_sections_in_order(documents):
    whole = cut(documents)
    pieces = list(group_into_pieces(whole))
    assert [section for piece in pieces for section in piece] == whole
    assert all(0 < len(piece) <= 10 for piece in pieces)
    for piece in pieces[:-1]:
        assert len(piece) == 10 or sum(len(s.text) for s in piece) >= 3 * LIMIT
