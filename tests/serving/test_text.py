"""Text as it comes: whole characters, joined equal to the whole, nothing of a stop string."""

import random
from pathlib import Path

import pytest
from tiny_tokenizers import byte_fallback_tokenizer, word_piece_tokenizer

from lookup_experts.serving.text import IncrementalText, StopStrings
from lookup_experts.serving.vocabulary import Vocabulary

TEXT = "naïve 日本語 🦊👩\N{ZERO WIDTH JOINER}🚀 the fox — “quoted” é\u0301 end"
NO_TEXT = 256


def byte_of(token_id, begins=False):
    """A vocabulary of bytes, and tokens without text."""
    return b"" if token_id >= NO_TEXT else bytes([token_id])


def word_of(token_id, begins=False):
    """A vocabulary of words, the first of which has no space before it."""
    return b"%d" % token_id if begins else b" %d" % token_id


def test_characters_come_whole():
    stream = IncrementalText(byte_of)
    pieces = [stream.add(one) for one in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert stream.rest() == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("number", [1, 7, 8, 100])
def test_tokens_without_text_change_nothing_wherever_they_are(number):
    for place in range(len(TEXT.encode()) + 1):
        ids = [*TEXT.encode()]
        ids[place:place] = [NO_TEXT] * number
        stream = IncrementalText(byte_of)
        assert "".join(map(stream.add, ids)) + stream.rest() == TEXT
    after = IncrementalText(byte_of, before=[*"🦊".encode()[:2], *[NO_TEXT] * number])
    assert "".join(map(after.add, "🦊".encode()[2:])) == "🦊"


def test_what_never_becomes_a_character_is_given_in_the_end():
    stream = IncrementalText(byte_of)
    pieces = [stream.add(one) for one in b"ab" + "🦊".encode()[:3]]
    assert pieces == ["a", "b", "", "", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"
    assert stream.rest() == ""


def test_bytes_that_are_no_text_don_t_hold_the_rest_back():
    stream = IncrementalText(byte_of)
    assert "".join(stream.add(0xFF) for _ in range(40)) == "\N{REPLACEMENT CHARACTER}" * 40


def test_a_continuation_keeps_its_first_space():
    stream = IncrementalText(word_of, before=[7, 8])
    assert [stream.add(9), stream.add(10)] == [" 9", " 10"]
    alone = IncrementalText(word_of)
    assert [alone.add(9), alone.add(10)] == ["9", " 10"]


def test_a_character_that_the_prompt_began_is_completed():
    fox = "🦊".encode()
    stream = IncrementalText(byte_of, before=list(b"a" + fox[:2]))
    assert [stream.add(one) for one in fox[2:]] == ["", "🦊"]


# -------------------------------------------------------------------------------- vocabularies


@pytest.fixture(params=["byte-level", "byte-fallback", "word-piece", "GPT-NeoX"])
def any_tokenizer(request, tokenizer):
    if request.param == "GPT-NeoX":
        from transformers import PreTrainedTokenizerFast

        folder = Path(__file__).resolve().parents[2].parent / "shared/data/tokenizer/neox-20b"
        if not folder.is_dir():
            pytest.skip("the tokenizer of GPT-NeoX (../shared/data/tokenizer) is not here")
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    made = {"byte-fallback": byte_fallback_tokenizer, "word-piece": word_piece_tokenizer}
    return made[request.param]() if request.param in made else tokenizer


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_pieces_are_the_text_that_the_tokenizer_gives(any_tokenizer):
    vocabulary = Vocabulary(any_tokenizer)
    generator = random.Random(0)
    for _ in range(30):
        text = "".join(generator.choices("the quick 🦊 naïve dog 日", k=30)).strip()
        ids = any_tokenizer(text)["input_ids"]
        stream = IncrementalText(vocabulary.bytes_of)
        assert "".join(map(stream.add, ids)) + stream.rest() == whole(any_tokenizer, ids)


def test_pieces_of_any_tokens_are_the_text_that_a_byte_level_tokenizer_gives(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(97) for _ in range(30)]
        stream = IncrementalText(vocabulary.bytes_of)
        assert "".join(map(stream.add, ids)) + stream.rest() == whole(tokenizer, ids)


def test_how_tokens_are_called(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.name(tokenizer.convert_tokens_to_ids("t")) == "t"
    assert (vocabulary.name(1), vocabulary.bytes_of(1)) == ("<s>", b"")
    assert (vocabulary.name(5000), vocabulary.bytes_of(5000)) == ("token_id:5000", b"")
    assert vocabulary.special_id("<s>") == 1 and vocabulary.special_id("t") is None
    assert vocabulary.spelling([1])(1) == b"<s>"
    fallback = byte_fallback_tokenizer()
    part = fallback.convert_tokens_to_ids("<0xF0>")
    called = Vocabulary(fallback)
    assert (called.name(part), called.bytes_of(part)) == ("bytes:\\xf0", b"\xf0")
    name = next(name for name in fallback.get_vocab() if name[0] == "▁" and name[1:].isalpha())
    word, text = fallback.convert_tokens_to_ids(name), name[1:].encode()
    assert (called.bytes_of(word), called.bytes_of(word, begins=True)) == (b" " + text, text)


# ------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("stops", [["fox"], ["the fox"], ["x ju", "fox j"], ["zebra"], []])
def test_stop_strings_wherever_tokens_end(stops):
    text = "the quick brown fox jumps over the lazy dog"
    places = [text.find(stop) for stop in stops if stop in text]
    expected = text[: min(places)] if places else text
    for size in range(1, 9):
        matcher = StopStrings(stops)
        given = ""
        for start in range(0, len(text), size):
            given += matcher.add(text[start : start + size])
            assert expected.startswith(given)
            if matcher.found:
                break
        assert given + matcher.rest() == expected
        assert matcher.found == bool(places)


def test_only_what_could_become_a_stop_string_is_held_back():
    matcher = StopStrings(["END", "\n\n"])
    assert matcher.add("a E") == "a "
    assert matcher.add("N") == ""
    assert matcher.add("x\n") == "ENx"
    assert matcher.add("y") == "\ny"
    assert matcher.rest() == ""
