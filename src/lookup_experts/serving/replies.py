"""From the engine's events to what OpenAI's API answers: whole, or as a stream of chunks."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lookup_experts.serving.sampling import TokenLogProbability
from lookup_experts.serving.sequence import Event, Finished, LookupDetail, PromptScored, Token

LOWEST = -9999.0
"""For the logarithm of 0, as in OpenAI's API: JSON has no infinity."""

TokenText = Callable[[int], str]
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
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_scores: list[TokenLogProbability] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: Event) -> None:
        """Take an event that is no failure."""
        if isinstance(event, Token):
            self.tokens.append(event)
            self.text += event.text
        elif isinstance(event, PromptScored):
            self.prompt_scores.extend(event.log_probabilities)
        elif isinstance(event, Finished):
            self.text += event.text
            self.finish_reason = event.reason


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
    def __init__(self, prefix: str, kind: str, chunk_kind: str, model: str, text: TokenText):
        self._kind, self._chunk_kind = kind, chunk_kind
        self._token_text = text
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._model = model

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {**self._head, "object": kind, "model": self._model, "choices": choices}

    def usage_chunk(self, choices: Sequence[Choice]) -> Json:
        """See `Replies`."""
        return {**self._envelope(self._chunk_kind, []), "usage": _usage(choices)}

    def _chunk(self, choice: Json, lookup: LookupDetail | None, event: Any) -> Json:
        chunk = self._envelope(self._chunk_kind, [choice])
        if lookup is not None:
            chunk["lookup"] = {
                "token_id": event.token_id,
                "text": self._token_text(event.token_id),
                "weights": lookup.weights,
                "bytes_read": lookup.bytes_read,
                "cache_hit": lookup.cache_hit,
                "ms": round(lookup.milliseconds, 3),
            }
        return chunk


class CompletionReplies(_Common):
    """`/v1/completions`.

    Args:
        model: the served name.
        text: one token alone as text.
        log_probabilities: how many of the likeliest tokens to tell; None: no log probabilities.
    """

    def __init__(self, model: str, text: TokenText, log_probabilities: int | None) -> None:
        super().__init__("cmpl", "text_completion", "text_completion", model, text)
        self._top = log_probabilities

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
        logprobs = None
        if self._top is not None:
            logprobs = self._columns(choice.echo_ids, [None, *choice.prompt_scores], 0)
        return [self._chunk(_text_choice(choice, choice.echo_text, logprobs, None), None, None)]

    def chunk(self, choice: Choice, event: Token | Finished) -> Json:
        """See `Replies`."""
        if isinstance(event, Finished):
            text_choice = _text_choice(choice, event.text, None, event.reason)
            return self._chunk(text_choice, None, event)
        logprobs = None
        if self._top is not None:
            offset = len(choice.echo_text) + len(choice.text) - len(event.text)
            logprobs = self._columns([event.token_id], [event.log_probability], offset)
        return self._chunk(_text_choice(choice, event.text, logprobs, None), event.lookup, event)

    def _of_all(self, choice: Choice) -> Json | None:
        if self._top is None:
            return None
        ids = [*choice.echo_ids, *(token.token_id for token in choice.tokens)]
        scores: list[TokenLogProbability | None] = [None, *choice.prompt_scores]
        scores = scores[: len(choice.echo_ids)]
        scores += [token.log_probability for token in choice.tokens]
        return self._columns(ids, scores, 0)

    def _columns(
        self, ids: Sequence[int], scores: Sequence[TokenLogProbability | None], offset: int
    ) -> Json:
        """The legacy shape: a list for each thing that is told of tokens."""
        texts = [self._token_text(token_id) for token_id in ids]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else _finite(one.value) for one in scores],
            "top_logprobs": [None if one is None else self._top_of(one) for one in scores],
            "text_offset": offsets[:-1],
        }

    def _top_of(self, score: TokenLogProbability) -> dict[str, float]:
        assert self._top is not None
        top: dict[str, float] = {}
        pairs = zip(score.top_ids[: self._top], score.top_values[: self._top], strict=True)
        for token_id, value in pairs:
            # Tokens that are no whole characters can share a text; the likeliest stands for it.
            top.setdefault(self._token_text(token_id), _finite(value))
        return top


class ChatReplies(_Common):
    """`/v1/chat/completions`; see `CompletionReplies`."""

    def __init__(self, model: str, text: TokenText, log_probabilities: int | None) -> None:
        super().__init__("chatcmpl", "chat.completion", "chat.completion.chunk", model, text)
        self._top = log_probabilities

    def whole(self, choices: Sequence[Choice]) -> Json:
        """See `Replies`."""
        done = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": self._content(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._envelope(self._kind, done), "usage": _usage(choices)}

    def opening(self, choice: Choice) -> list[Json]:
        """See `Replies`: whose turn it is."""
        return [self._chunk(_delta(choice, {"role": "assistant", "content": ""}), None, None)]

    def chunk(self, choice: Choice, event: Token | Finished) -> Json:
        """See `Replies`."""
        if isinstance(event, Finished):
            delta = {"content": event.text} if event.text else {}
            return self._chunk(_delta(choice, delta, reason=event.reason), None, event)
        logprobs = self._content([event])
        return self._chunk(_delta(choice, {"content": event.text}, logprobs), event.lookup, event)

    def _content(self, tokens: Sequence[Token]) -> Json | None:
        if self._top is None:
            return None
        return {"content": [self._entry(token.log_probability) for token in tokens]}

    def _entry(self, score: TokenLogProbability | None) -> Json:
        assert score is not None and self._top is not None
        pairs = zip(score.top_ids[: self._top], score.top_values[: self._top], strict=True)
        return {
            **self._scored(score.token_id, score.value),
            "top_logprobs": [self._scored(*pair) for pair in pairs],
        }

    def _scored(self, token_id: int, value: float) -> Json:
        text = self._token_text(token_id)
        return {"token": text, "logprob": _finite(value), "bytes": list(text.encode())}


def _text_choice(choice: Choice, text: str, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _delta(
    choice: Choice, delta: Json, logprobs: Json | None = None, reason: str | None = None
) -> Json:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _usage(choices: Sequence[Choice]) -> Json:
    prompt = sum(choice.prompt_tokens for choice in choices if choice.counts_prompt)
    completion = sum(len(choice.tokens) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _finite(value: float) -> float:
    return max(value, LOWEST)
