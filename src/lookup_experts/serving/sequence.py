"""What the engine works on: one prompt and its continuation, and what it tells of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lookup_experts.serving.sampling import Chooser, TokenLogProbability
from lookup_experts.serving.text import IncrementalText, StopStrings
from lookup_experts.serving.vocabulary import BytesOf


@dataclass(frozen=True)
class LookupDetail:
    """What the experts did in the forward pass that gave a token."""

    weights: list[list[float]] | None
    """[L, N] router weights; None for a model without routers."""
    bytes_read: int
    """What the record of the token that went in needed from the store."""
    cache_hit: bool | None
    """Whether that record was in the row cache; None where nothing is read."""
    milliseconds: float
    """Of the step, for all its rows."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of the text, and how probable it was."""

    score: TokenLogProbability
    offset: int
    """Characters of the text before it."""
    begins: bool
    """Whether there was no text before it, nor in the prompt."""


@dataclass(frozen=True)
class Token:
    """One more token."""

    token_id: int
    text: str
    """What is certain of the text now; may be empty, or hold characters of earlier tokens."""
    lookup: LookupDetail | None
    scored: Sequence[ScoredToken] = ()
    """The tokens that are certainly part of the text now, this one or earlier ones; only if log
    probabilities were asked for."""


@dataclass(frozen=True)
class PromptScored:
    """The log probabilities of a prompt's tokens, from the second on."""

    log_probabilities: list[TokenLogProbability]


@dataclass(frozen=True)
class Finished:
    """The end of a sequence."""

    reason: str
    """`stop` (the model's end token, a stop string, the end of a grammar) or `length`."""
    text: str
    """What had been held back."""
    scored: Sequence[ScoredToken] = ()
    """Likewise."""


@dataclass(frozen=True)
class Failed:
    """The end of a sequence that could not be continued."""

    code: str
    """`table_error`, `timeout`, `shutting_down`, `grammar_error` or `internal_error`."""
    message: str


Event = Token | PromptScored | Finished | Failed


@dataclass
class GenerationRequest:
    """One prompt and how to continue it; checked by the caller."""

    prompt_ids: list[int]
    max_tokens: int
    chooser: Chooser = field(default_factory=lambda: Chooser(temperature=0.0))
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text beside the model's own."""
    ignore_end: bool = False
    """Go on after the model's own end tokens."""
    min_tokens: int = 0
    """Before which no stop string counts; end tokens are `Adjustment`'s matter."""
    top_log_probabilities: int | None = None
    """How many of the likeliest tokens to tell with each; None: no log probabilities."""
    score_prompt: bool = False
    """Tell the log probabilities of the prompt's tokens too."""
    lookup_details: bool = False
    deadline: float = float("inf")
    """`time.monotonic()` at which it is given up."""
    table: str | None = None
    """The table that its text is generated with, of a model with several."""


class GenerationSequence:
    """A request on its way through the engine.

    Args:
        request: what was asked.
        bytes_of: what a token adds to the text.
        listen: given every event, in the thread that the engine's `deliver` chooses.
    """

    def __init__(
        self,
        request: GenerationRequest,
        bytes_of: BytesOf,
        listen: Callable[[Event], Any],
    ) -> None:
        self.request = request
        self.listen = listen
        self.cancelled = False
        """Set from any thread: nobody waits for it any more."""
        self.has_ended = False
        """Set by the engine: the last event was told."""
        self.prefill_alone = False
        """Set by the engine: its prompt is not put together with others."""
        self.num_tokens = 0
        """Generated so far."""
        self.last_token_id = request.prompt_ids[-1]
        self.submitted_at = time.monotonic()
        self.last_token_at: float | None = None
        self._text = IncrementalText(bytes_of, request.prompt_ids)
        self._stops = StopStrings(request.stop)
        self._given = 0
        """Characters that were told."""
        self._scored: list[ScoredToken] = []
        """Not told yet, since a stop string may begin before them."""

    def add(
        self,
        token_id: int,
        end_ids: frozenset[int],
        score: TokenLogProbability | None,
        lookup: LookupDetail | None,
    ) -> list[Event]:
        """Take the next token; a `Finished` or `Failed` comes last if it was the last one."""
        self.num_tokens += 1
        self.last_token_id = token_id
        adjustment = self.request.chooser.adjustment
        if adjustment is not None:
            adjustment.take(token_id)
        constraint = adjustment.constraint if adjustment is not None else None
        is_end = token_id in self.request.stop_ids or (
            token_id in end_ids and not self.request.ignore_end
        )
        piece = "" if is_end else self._take_text(token_id, score)
        events: list[Event] = [Token(token_id, piece, lookup, self._certain())]
        if is_end or self._stops.found:
            events.append(self.finish("stop"))
        elif constraint is not None and constraint.error is not None:
            events.append(Failed("grammar_error", f"The text can't go on: {constraint.error}."))
        elif constraint is not None and constraint.is_complete:
            events.append(self.finish("stop"))
        elif self.num_tokens >= self.request.max_tokens:
            events.append(self.finish("length"))
        return events

    def _take_text(self, token_id: int, score: TokenLogProbability | None) -> str:
        begins = self._text.begins
        piece = self._text.add(token_id)
        if score is not None:
            self._scored.append(ScoredToken(score, self._text.offset, begins))
        if self.num_tokens >= self.request.min_tokens:
            piece = self._stops.add(piece)
        self._given += len(piece)
        return piece

    def _certain(self) -> Sequence[ScoredToken]:
        """The scored tokens that begin before the end of what was told; all, if nothing is held
        back. After a stop string the others are no part of the text."""
        if not self._scored:
            return ()
        if not self._stops.found and self._given == self._text.length:
            certain, self._scored = self._scored, []
            return certain
        number = sum(one.offset < self._given for one in self._scored)
        certain, self._scored = self._scored[:number], self._scored[number:]
        return certain

    def finish(self, reason: str) -> Finished:
        """The last event, with the text that was held back."""
        if self._stops.found:
            return Finished("stop", "")
        rest = self._stops.add(self._text.rest())
        if self._stops.found:  # completed by half a character: unlikely, but then it counts
            reason = "stop"
        rest += self._stops.rest()
        self._given += len(rest)
        return Finished(reason, rest, self._certain())
