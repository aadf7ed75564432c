"""Tokens as bytes: what each of them adds to a text.

A token may be a part of a character, so its own text can be no text at all; its bytes always are
what they are, and the bytes of all tokens, joined, are the text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import Any, Protocol

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class BytesOf(Protocol):
    """What a token adds to a text; nothing for a special token."""

    def __call__(self, token_id: int, begins: bool = False) -> bytes:
        """`begins`: no text is before it, where some tokenizers leave a space out."""


class Vocabulary:
    """What each token id says. Safe to use from any thread.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._specials = {
            token_id: str(token)
            for token_id, token in added.items()
            if token.special or token_id in tokenizer.all_special_ids
        }
        self._known: dict[tuple[int, bool], bytes] = {}

    def bytes_of(self, token_id: int, begins: bool = False) -> bytes:
        """See `BytesOf`."""
        key = (token_id, begins)
        if key not in self._known:
            self._known[key] = self._read(token_id, begins)
        return self._known[key]

    def spelling(self, token_ids: Iterable[int]) -> BytesOf:
        """`bytes_of`, but these special tokens are written out with their names."""
        names = {one: self._specials[one].encode() for one in token_ids if one in self._specials}

        def spelled(token_id: int, begins: bool = False) -> bytes:
            return names.get(token_id) or self.bytes_of(token_id, begins)

        return spelled if names else self.bytes_of

    def special_id(self, name: str) -> int | None:
        """The id of the special token with this name, or None."""
        return self._special_ids.get(name)

    @cached_property
    def special_names(self) -> list[str]:
        """Of all special tokens, the longest first."""
        return sorted(self._special_ids, key=len, reverse=True)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {name: token_id for token_id, name in self._specials.items()}

    def name(self, token_id: int, begins: bool = False) -> str:
        """How a token is called where its text can't be joined to others: its text if it has one,
        else a special token's name, `bytes:\\xf0\\x9f` for a part of a character, or
        `token_id:50300` for an id without a token."""
        own = self.bytes_of(token_id, begins)
        if not own:
            return self._specials.get(token_id, f"token_id:{token_id}")
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def _read(self, token_id: int, begins: bool) -> bytes:
        if token_id in self._specials:
            return b""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders:
            return _of_byte_level(token)
        if "ByteFallback" in self._decoders and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        text = self._decode([token_id])
        if not begins and (anchor := self._anchor) is not None:
            before, both = self._decode([anchor]), self._decode([anchor, token_id])
            text = both[len(before) :] if both.startswith(before) else text
        return text.encode()

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    @cached_property
    def _decoders(self) -> set[str]:
        """The kinds of steps with which a fast tokenizer's tokens become text."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return set()
        state = json.loads(backend.decoder.__getstate__())
        return {step["type"] for step in [state, *state.get("decoders", ())]}

    @cached_property
    def _anchor(self) -> int | None:
        """A token with a word's text, behind which others say what they say inside a text."""
        for token_id in range(len(self._tokenizer)):
            if token_id not in self._specials and self._decode([token_id]).strip().isalpha():
                return token_id
        return None


def _of_byte_level(token: str) -> bytes:
    """The bytes that a byte-level vocabulary's entry stands for; an added token's name is text."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as in GPT-2's vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
