"""Text as it comes: whole characters, joined equal to the whole, nothing of a stop string."""

import random

import pytest

from lookup_experts.serving.text import IncrementalText, StopStrings, decoder_of

TEXT = "naïve 日本語 🦊👩\N{ZERO WIDTH JOINER}🚀 the fox — “quoted” é\u0301 end"


def decode_bytes(ids):
    """A tokenizer of bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids):
    """A tokenizer that gives the first word no space: it reads differently behind another one."""
    return "".join(f" {one}" for one in ids).strip()


def test_characters_come_whole():
    stream = IncrementalText(decode_bytes)
    pieces = [stream.add(one) for one in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert stream.rest() == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_what_never_becomes_a_character_is_given_in_the_end():
    stream = IncrementalText(decode_bytes)
    pieces = [stream.add(one) for one in b"ab" + "🦊".encode()[:3]]
    assert pieces == ["a", "b", "", "", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"
    assert stream.rest() == ""


def test_bytes_that_are_no_text_don_t_hold_the_rest_back():
    stream = IncrementalText(decode_bytes)
    pieces = [stream.add(0xFF) for _ in range(40)]
    assert sum(map(len, pieces)) >= 32


def test_a_continuation_keeps_its_first_space():
    stream = IncrementalText(decode_words, before=[7, 8])
    assert [stream.add(9), stream.add(10)] == [" 9", " 10"]
    alone = IncrementalText(decode_words)
    assert [alone.add(9), alone.add(10)] == ["9", " 10"]


def test_a_character_that_the_prompt_began_is_completed():
    fox = "🦊".encode()
    stream = IncrementalText(decode_bytes, before=list(b"a" + fox[:2]))
    assert [stream.add(one) for one in fox[2:]] == ["", "🦊"]


def test_a_real_tokenizer_s_pieces_are_its_text(tokenizer):
    decode = decoder_of(tokenizer)
    generator = random.Random(0)
    for _ in range(20):
        ids = [generator.randrange(3, 97) for _ in range(30)]
        stream = IncrementalText(decode)
        assert "".join(stream.add(one) for one in ids) + stream.rest() == decode(ids)


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
