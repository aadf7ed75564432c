"""What the engine works on: one prompt and its continuation, and what it tells of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lookup_experts.serving.sampling import Chooser, TokenLogProbability
from lookup_experts.serving.text import IncrementalText, StopStrings


@dataclass(frozen=True)
class LookupDetail:
    """What the experts did in the forward pass that gave a token."""

    weights: list[list[float]] | None
    """[L, N] router weights; None for a model without lookup experts."""
    bytes_read: int
    """What the record of the token that went in needed from the store."""
    cache_hit: bool | None
    """Whether that record was in the row cache; None where nothing is read."""
    milliseconds: float
    """Of the step, for all its rows."""


@dataclass(frozen=True)
class Token:
    """One more token."""

    token_id: int
    text: str
    """What is certain of the text now; may be empty, or hold characters of earlier tokens."""
    log_probability: TokenLogProbability | None
    lookup: LookupDetail | None


@dataclass(frozen=True)
class PromptScored:
    """The log probabilities of a prompt's tokens, from the second on."""

    log_probabilities: list[TokenLogProbability]


@dataclass(frozen=True)
class Finished:
    """The end of a sequence."""

    reason: str
    """`stop` (the model's end token, or a stop string) or `length`."""
    text: str
    """What had been held back."""


@dataclass(frozen=True)
class Failed:
    """The end of a sequence that could not be continued."""

    code: str
    """`table_error`, `timeout`, `shutting_down` or `internal_error`."""
    message: str


Event = Token | PromptScored | Finished | Failed


@dataclass
class GenerationRequest:
    """One prompt and how to continue it; checked by the caller."""

    prompt_ids: list[int]
    max_tokens: int
    chooser: Chooser = field(default_factory=lambda: Chooser(temperature=0.0))
    stop: Sequence[str] = ()
    top_log_probabilities: int | None = None
    """How many of the likeliest tokens to tell with each; None: no log probabilities."""
    score_prompt: bool = False
    """Tell the log probabilities of the prompt's tokens too."""
    lookup_details: bool = False
    deadline: float = float("inf")
    """`time.monotonic()` at which it is given up."""


class GenerationSequence:
    """A request on its way through the engine.

    Args:
        request: what was asked.
        decode: token ids -> text.
        listen: given every event, in the thread that the engine's `deliver` chooses.
    """

    def __init__(
        self,
        request: GenerationRequest,
        decode: Callable[[Sequence[int]], str],
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
        self._text = IncrementalText(decode, request.prompt_ids)
        self._stops = StopStrings(request.stop)

    def add(
        self,
        token_id: int,
        end_ids: frozenset[int],
        log_probability: TokenLogProbability | None,
        lookup: LookupDetail | None,
    ) -> list[Event]:
        """Take the next token; a `Finished` comes last if it was the last one."""
        self.num_tokens += 1
        self.last_token_id = token_id
        is_end = token_id in end_ids
        piece = "" if is_end else self._stops.add(self._text.add(token_id))
        events: list[Event] = [Token(token_id, piece, log_probability, lookup)]
        if is_end or self._stops.found:
            events.append(self.finish("stop"))
        elif self.num_tokens >= self.request.max_tokens:
            events.append(self.finish("length"))
        return events

    def finish(self, reason: str) -> Finished:
        """The last event, with the text that was held back."""
        if self._stops.found:
            return Finished("stop", "")
        rest = self._stops.add(self._text.rest())
        if self._stops.found:  # completed by half a character: unlikely, but then it counts
            return Finished("stop", rest)
        return Finished(reason, rest + self._stops.rest())
