"""Run sequences through an engine without a server, and gather what it tells."""

import threading
from typing import Any

from lookup_experts.serving.engine import Engine
from lookup_experts.serving.metrics import ServingMetrics
from lookup_experts.serving.sequence import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    GenerationSequence,
    PromptScored,
    Token,
)
from lookup_experts.serving.waiting import Limits


class Collected:
    """Everything that was told of one sequence."""

    def __init__(self, request: GenerationRequest, bytes_of: Any = None) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.first = threading.Event()
        self.sequence = GenerationSequence(
            request, bytes_of or (lambda token_id, begins=False: b" %d" % token_id), self._hear
        )

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        if isinstance(event, Finished | Failed):
            self.over.set()

    def wait(self) -> "Collected":
        assert self.over.wait(30)
        return self

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def prompt_scores(self) -> list[Any]:
        parts = [event for event in self.events if isinstance(event, PromptScored)]
        return [score for part in parts for score in part.log_probabilities]

    @property
    def end(self) -> Event:
        return self.events[-1]


class Bench:
    """An engine over a model, with what it needs around it."""

    def __init__(
        self,
        model: Any,
        max_batch: int = 8,
        max_queue: int = 256,
        end_ids: tuple[int, ...] = (),
        captures: bool = True,
    ) -> None:
        source = getattr(model, "expert_source", None)
        self.metrics = ServingMetrics(source if hasattr(source, "stats") else None)
        self.engine = Engine(
            model, end_ids, Limits(max_batch, max_queue), self.metrics, self._deliver, captures
        )

    @staticmethod
    def _deliver(outbox: Any) -> None:
        for sequence, event in outbox:
            sequence.listen(event)

    def submit(self, *requests: GenerationRequest, bytes_of: Any = None) -> list[Collected]:
        collected = [Collected(request, bytes_of) for request in requests]
        self.engine.submit([one.sequence for one in collected])
        return collected

    def run(self, *requests: GenerationRequest, bytes_of: Any = None) -> list[Collected]:
        return [one.wait() for one in self.submit(*requests, bytes_of=bytes_of)]

    def __enter__(self) -> "Bench":
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
