"""From the engine's events to what OpenAI's API answers: whole, or as a stream of chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lookup_experts.serving.sampling import TokenLogProbability
from lookup_experts.serving.sequence import (
    Event,
    Finished,
    LookupDetail,
    PromptScored,
    ScoredToken,
    Token,
)
from lookup_experts.serving.text import IncrementalText
from lookup_experts.serving.tool_calls import ReadNow, ToolCallReader
from lookup_experts.serving.vocabulary import Vocabulary

LOWEST = -9999.0
"""For the logarithm of 0, as in OpenAI's API: JSON has no infinity."""

Json = dict[str, Any]


@dataclass
class Choice:
    """One sequence's answer, as far as it has come."""

    index: int
    prompt_tokens: int
    counts_prompt: bool
    """False for further choices for the same prompt, which is counted once."""
    echo_text: str = ""
    """The prompt, to be given before the completion."""
    echo_ids: Sequence[int] = ()
    reader: ToolCallReader | None = None
    """Tells calls of tools from other text, where there may be any."""
    text: str = ""
    num_tokens: int = 0
    scored: list[ScoredToken] = field(default_factory=list)
    prompt_scores: list[TokenLogProbability] = field(default_factory=list)
    finish_reason: str | None = None
    read: ReadNow = field(default_factory=lambda: ReadNow(""))
    """What the last event brought."""

    def add(self, event: Event) -> None:
        """Take an event that is no failure."""
        if isinstance(event, PromptScored):
            self.prompt_scores.extend(event.log_probabilities)
        elif isinstance(event, Token | Finished):
            self.text += event.text
            self.scored.extend(event.scored)
            is_last = isinstance(event, Finished)
            self.read = self.reader.add(event.text, is_last) if self.reader else ReadNow(event.text)
            if isinstance(event, Finished):
                is_call = event.reason == "stop" and self.reader is not None and self.reader.calls
                self.finish_reason = "tool_calls" if is_call else event.reason
            else:
                self.num_tokens += 1


class Replies(Protocol):
    """How one of the two routes answers."""

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The answer when all choices are complete."""

    def opening(self, choice: Choice) -> list[Json]:
        """The first chunks of a choice's stream, before its tokens."""

    def chunk(self, choice: Choice, event: Token | Finished) -> Json:
        """The chunk of an event; of a choice that has taken the event already."""

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """The last chunk of a stream that was asked for its token counts."""


class _Common:
    def __init__(self, prefix: str, kind: str, model: str, vocabulary: Vocabulary, top: int | None):
        self._kind, self._chunk_kind = kind, kind
        self._vocabulary = vocabulary
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._model = model
        self._top = top

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {**self._head, "object": kind, "model": self._model, "choices": choices}

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """See `Replies`."""
        return {**self._envelope(self._chunk_kind, []), "usage": _usage(choices)}

    def _chunk(self, choice: Json, event: Token | Finished | None = None) -> Json:
        chunk = self._envelope(self._chunk_kind, [choice])
        if isinstance(event, Token) and event.lookup is not None:
            chunk["lookup"] = self._lookup(event.token_id, event.lookup)
        return chunk

    def _lookup(self, token_id: int, lookup: LookupDetail) -> Json:
        return {
            "token_id": token_id,
            "text": self._vocabulary.name(token_id),
            "weights": lookup.weights,
            "bytes_read": lookup.bytes_read,
            "cache_hit": lookup.cache_hit,
            "ms": round(lookup.milliseconds, 3),
        }

    def _is_told(self, event: Token | Finished) -> bool:
        """Whether a chunk has log probabilities: each token's has, if only of no token."""
        return self._top is not None and (isinstance(event, Token) or bool(event.scored))

    def _likeliest(self, score: TokenLogProbability) -> list[tuple[int, float]]:
        assert self._top is not None
        return list(zip(score.top_ids, score.top_values, strict=True))[: self._top]


class CompletionReplies(_Common):
    """`/v1/completions`.

    Args:
        model: the served name.
        vocabulary: what tokens are called.
        top: how many of the likeliest tokens to tell; None: no log probabilities.
    """

    def __init__(self, model: str, vocabulary: Vocabulary, top: int | None) -> None:
        super().__init__("cmpl", "text_completion", model, vocabulary, top)

    def whole(self, choices: Sequence[Choice]) -> Json:
        """See `Replies`."""
        done = [
            {
                "index": choice.index,
                "text": choice.echo_text + choice.text,
                "logprobs": self._of_all(choice),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._envelope(self._kind, done), "usage": _usage(choices)}

    def opening(self, choice: Choice) -> list[Json]:
        """See `Replies`: the echoed prompt."""
        if not choice.echo_text:
            return []
        logprobs = _columns(self._of_echo(choice)) if self._top is not None else None
        return [self._chunk(_text_choice(choice, choice.echo_text, logprobs, None))]

    def chunk(self, choice: Choice, event: Token | Finished) -> Json:
        """See `Replies`."""
        logprobs = _columns(self._of_text(choice, event.scored)) if self._is_told(event) else None
        reason = choice.finish_reason if isinstance(event, Finished) else None
        return self._chunk(_text_choice(choice, event.text, logprobs, reason), event)

    def _of_all(self, choice: Choice) -> Json | None:
        if self._top is None:
            return None
        return _columns([*self._of_echo(choice), *self._of_text(choice, choice.scored)])

    def _of_echo(self, choice: Choice) -> list["_Row"]:
        """The prompt's tokens; the first one has no probability."""
        text = IncrementalText(self._vocabulary.bytes_of)
        rows = []
        scores = [None, *choice.prompt_scores]
        for token_id, score in zip(choice.echo_ids, scores, strict=bool(choice.echo_ids)):
            begins = text.begins
            text.add(token_id)
            rows.append(self._row(token_id, score, text.offset, begins))
        return rows

    def _of_text(self, choice: Choice, scored: Sequence[ScoredToken]) -> list["_Row"]:
        before = len(choice.echo_text)
        return [
            self._row(one.score.token_id, one.score, before + one.offset, one.begins)
            for one in scored
        ]

    def _row(
        self, token_id: int, score: TokenLogProbability | None, offset: int, begins: bool
    ) -> "_Row":
        name = self._vocabulary.name(token_id, begins)
        if score is None:
            return _Row(name, None, None, offset)
        top: dict[str, float] = {}
        for other, value in self._likeliest(score):
            called = self._vocabulary.name(other, begins)
            # Of two tokens with one text, the less likely one is called by its id.
            top[f"token_id:{other}" if called in top else called] = _finite(value)
        return _Row(name, _finite(score.value), top, offset)


@dataclass(frozen=True)
class _Row:
    """A token, in the legacy shape."""

    name: str
    value: float | None
    top: dict[str, float] | None
    offset: int


def _columns(rows: Sequence[_Row]) -> Json:
    """The legacy shape: a list for each thing that is told of tokens."""
    return {
        "tokens": [row.name for row in rows],
        "token_logprobs": [row.value for row in rows],
        "top_logprobs": [row.top for row in rows],
        "text_offset": [row.offset for row in rows],
    }


class ChatReplies(_Common):
    """`/v1/chat/completions`; see `CompletionReplies`."""

    def __init__(self, model: str, vocabulary: Vocabulary, top: int | None) -> None:
        super().__init__("chatcmpl", "chat.completion", model, vocabulary, top)
        self._chunk_kind = "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice]) -> Json:
        """See `Replies`."""
        done = [
            {
                "index": choice.index,
                "message": _message(choice),
                "logprobs": self._content(choice.scored) if self._top is not None else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._envelope(self._kind, done), "usage": _usage(choices)}

    def opening(self, choice: Choice) -> list[Json]:
        """See `Replies`: whose turn it is."""
        return [self._chunk(_delta(choice, {"role": "assistant", "content": ""}))]

    def chunk(self, choice: Choice, event: Token | Finished) -> Json:
        """See `Replies`."""
        delta: Json = {}
        if choice.read.content or (isinstance(event, Token) and not choice.read.calls):
            delta["content"] = choice.read.content
        if choice.read.calls:
            delta["tool_calls"] = choice.read.calls
        logprobs = self._content(event.scored) if self._is_told(event) else None
        reason = choice.finish_reason if isinstance(event, Finished) else None
        return self._chunk(_delta(choice, delta, logprobs, reason), event)

    def _content(self, scored: Sequence[ScoredToken]) -> Json:
        return {"content": [self._entry(one) for one in scored]}

    def _entry(self, scored: ScoredToken) -> Json:
        score, begins = scored.score, scored.begins
        return {
            **self._scored(score.token_id, score.value, begins),
            "top_logprobs": [self._scored(*pair, begins) for pair in self._likeliest(score)],
        }

    def _scored(self, token_id: int, value: float, begins: bool) -> Json:
        name = self._vocabulary.name(token_id, begins)
        own = self._vocabulary.bytes_of(token_id, begins)
        return {"token": name, "logprob": _finite(value), "bytes": list(own)}


def _message(choice: Choice) -> Json:
    calls = choice.reader.calls if choice.reader is not None else []
    content = choice.reader.content if choice.reader is not None else choice.text
    if calls:
        return {"role": "assistant", "content": content or None, "tool_calls": calls}
    return {"role": "assistant", "content": content}


def _text_choice(choice: Choice, text: str, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _delta(
    choice: Choice, delta: Json, logprobs: Json | None = None, reason: str | None = None
) -> Json:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _usage(choices: Sequence[Choice]) -> Json:
    prompt = sum(choice.prompt_tokens for choice in choices if choice.counts_prompt)
    completion = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _finite(value: float) -> float:
    return max(value, LOWEST)
