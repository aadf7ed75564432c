"""Texts that keep to a grammar, by llguidance: which tokens may come next.

llguidance, not xgrammar: it needs no other package (xgrammar asks for torch's triton, transformers
and a runtime of its own), refuses what it can't do of a JSON schema instead of letting it go, has
limits for grammars that would take too long, and has a schema ready in a millisecond where xgrammar
compiles for a quarter of a second; a mask takes 0.07 ms against 0.01 ms, beside a step of many.
"""

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_NESTED = 64
"""Levels of a schema."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
"""Between the signs of JSON: a model that has lost its way doesn't write blanks for ever."""
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}


class GrammarError(Exception):
    """A form that can't be kept to; the message is a sentence for the client."""


class Constraint:
    """What one text may be, as far as it has come.

    Args:
        matcher: of llguidance.
    """

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def copy(self) -> "Constraint":
        """The same for another text."""
        return Constraint(self._matcher.deep_copy())

    def allowed(self, vocab_size: int) -> Tensor:
        """bool [vocab_size]: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little"))
        return mask.bool()

    def take(self, token_id: int) -> None:
        """A token was chosen."""
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it can't go on: the grammar asks for more work than a step may take."""
        return _first_line(self._matcher) if self._matcher.is_error() else None


class Constraints:
    """Makes constraints for one model; what it needs of the vocabulary is made when it is asked
    for first.

    Args:
        tokenizer: of the model.
        vocab_size: ids that the model gives logits for.
        end_ids: the token ids that end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, len(tokenizer))
        self._end_ids = list(end_ids)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def of_schema(self, schema: dict[str, Any]) -> Constraint:
        """JSON as a schema describes it.

        Raises:
            GrammarError: the schema can't be read, or has what can't be heeded.
        """
        return self.of_grammar(f"%llguidance {{}}\nstart: {json_rule(schema)}")

    def of_grammar(self, grammar: str) -> Constraint:
        """A text as a grammar in llguidance's form of Lark describes it; raises as `of_schema`."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"The JSON schema can't be used: {_first_line(matcher)}.")
        return Constraint(matcher)

    def special_ids(self) -> dict[str, int]:
        """The tokens that no string in a grammar stands for, by name: special ones, and added ones
        that look like it (`<tool_call>`), whatever the tokenizer says of them."""
        known = self._vocabulary()
        return {
            str(token): token_id
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if known.is_special_token(token_id)
        }

    def _vocabulary(self) -> "LLTokenizer":
        with self._lock:
            if self._made is None:
                self._made = self._make()
        return self._made

    def _make(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        if not self._tokenizer.is_fast:
            raise GrammarError(
                "Texts of a given form need a fast tokenizer, and this model's is "
                f"{type(self._tokenizer).__name__}."
            )
        return from_tokenizer(
            self._tokenizer, n_vocab=self._vocab_size, eos_token=self._end_ids or None
        )


def json_rule(schema: dict[str, Any]) -> str:
    """What stands for JSON of a schema in a grammar.

    Raises:
        GrammarError: it is nested too deeply.
    """
    if not _is_nested_at_most(schema, MOST_NESTED):
        raise GrammarError(f"The JSON schema has more than {MOST_NESTED} levels.")
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def _is_nested_at_most(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_nested_at_most(one, levels - 1) for one in inner)


def _first_line(matcher: "LLMatcher") -> str:
    return matcher.get_error().split("\n")[0][:300].rstrip(". ")
