"""What the engine tells the listeners and the counters of its sequences."""

import time
from collections.abc import Callable
from typing import Any

from lookup_experts.serving.metrics import ServingMetrics
from lookup_experts.serving.sequence import Event, Failed, Finished, GenerationSequence, Token

Outbox = list[tuple[GenerationSequence, Event]]
Deliver = Callable[[Outbox], Any]


class Reports:
    """Gathers the events of a turn, counts them, and hands them out together.

    Args:
        metrics: told of every token and end.
        deliver: given the events of each turn, in the engine's thread.
    """

    def __init__(self, metrics: ServingMetrics, deliver: Deliver) -> None:
        self._metrics = metrics
        self._deliver = deliver
        self._outbox: Outbox = []

    def tell(self, sequence: GenerationSequence, event: Event) -> None:
        """One more event of a sequence; after its end there is none."""
        if sequence.has_ended:
            return
        self._outbox.append((sequence, event))
        if isinstance(event, Token):
            self._count_token(sequence)
        elif isinstance(event, Finished):
            self._count_end(sequence, event.reason)
        elif isinstance(event, Failed):
            if event.code == "table_error":
                self._metrics.table_errors.inc()
            self._count_end(sequence, event.code)

    def cancelled(self, sequence: GenerationSequence) -> None:
        """Nobody is there to be told."""
        if not sequence.has_ended:
            self._count_end(sequence, "cancelled")

    def hand_out(self) -> None:
        """Deliver what was told since the last time."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)

    def _count_token(self, sequence: GenerationSequence) -> None:
        now = time.monotonic()
        if sequence.last_token_at is None:
            self._metrics.first_token.observe(now - sequence.submitted_at)
            self._metrics.prompt_tokens.inc(len(sequence.request.prompt_ids))
        else:
            self._metrics.between_tokens.observe(now - sequence.last_token_at)
        sequence.last_token_at = now
        self._metrics.count_tokens(1, now)

    def _count_end(self, sequence: GenerationSequence, end: str) -> None:
        sequence.has_ended = True
        self._metrics.sequences.labels(end).inc()
        self._metrics.total.observe(time.monotonic() - sequence.submitted_at)
