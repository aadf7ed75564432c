"""Continuous batching: one thread, one model, one batch that sequences join and leave at any step.

A turn of the loop: drop what was cancelled or is too late; put one part of the waiting prompts
through the model; take one step with all that run. So a long prompt holds the others up by one
part at a time, and an end, a disconnection or an arrival takes effect within a step.

Numbers: each row's result is that of the sequence alone, up to the rounding that a different
batch size brings; in float32 greedy outputs are equal.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import TableError
from lookup_experts.serving.details import LookupWatch
from lookup_experts.serving.forward import Forward, Prompts
from lookup_experts.serving.kv_cache import BatchCache
from lookup_experts.serving.metrics import ServingMetrics
from lookup_experts.serving.sampling import choose, log_probabilities
from lookup_experts.serving.sequence import (
    Event,
    Failed,
    Finished,
    GenerationSequence,
    LookupDetail,
    PromptScored,
)

Outbox = list[tuple[GenerationSequence, Event]]
Deliver = Callable[[Outbox], Any]

PART_BESIDE_RUNNING = 128
"""Columns of prompts per turn on a CPU while sequences run, so that they don't stall."""
PART_ALONE = 512
"""The same while none run."""
PART_ON_GPU = 1024


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on."""

    max_batch: int = 32
    """Sequences that run at the same time."""
    max_queue: int = 128
    """Sequences that wait."""


class QueueFullError(Exception):
    """There is no place to wait."""


class ShuttingDownError(Exception):
    """Nothing new is taken on."""


@dataclass
class PrefillGroup:
    """Prompts that go through the model together, and whose they are."""

    sequences: list[GenerationSequence]
    prompts: Prompts


class Engine:
    """Runs sequences.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        end_ids: the token ids that end a text.
        limits: of the batch and the queue.
        metrics: told what happens.
        deliver: given the events of each turn, in the engine's thread.

    Raises:
        UserError: the model can't be batched.
    """

    def __init__(
        self,
        model: Any,
        end_ids: Sequence[int],
        limits: Limits,
        metrics: ServingMetrics,
        deliver: Deliver,
    ) -> None:
        self.limits = limits
        self._forward = Forward(model)
        self._watch = LookupWatch(model)
        self._end_ids = frozenset(end_ids)
        self._metrics = metrics
        self._deliver = deliver
        self._changed = threading.Condition()
        self._waiting: deque[GenerationSequence] = deque()
        self._draining = self._closing = False
        self._group: PrefillGroup | None = None
        self._running: list[GenerationSequence] = []
        """Whose the rows of the cache are."""
        self._cache = BatchCache()
        self._outbox: Outbox = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, sequences: Sequence[GenerationSequence]) -> None:
        """Queue the sequences of one request: all of them, or none.

        Raises:
            QueueFullError, ShuttingDownError.
        """
        with self._changed:
            if self._draining:
                raise ShuttingDownError
            free = self.limits.max_batch - len(self._running) - self._num_in_prefill()
            if len(self._waiting) + len(sequences) > self.limits.max_queue + max(0, free):
                self._metrics.rejected.inc()
                raise QueueFullError
            self._waiting.extend(sequences)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, sequence: GenerationSequence) -> None:
        """Nobody waits for it any more; its row is free within a step."""
        sequence.cancelled = True
        with self._changed:
            self._changed.notify()

    def drain(self) -> None:
        """Take nothing new, fail what waits, finish what runs. Safe in a signal handler."""
        self._draining = True

    def close(self, seconds: float = 5.0) -> None:
        """Stop within a step, failing what runs."""
        self._draining = self._closing = True
        with self._changed:
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether it works and takes requests."""
        return self._thread.is_alive() and not self._draining

    @property
    def num_running(self) -> int:
        """Sequences in the batch, or about to join it."""
        return len(self._running) + self._num_in_prefill()

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def _num_in_prefill(self) -> int:
        group = self._group
        return len(group.sequences) if group is not None else 0

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._closing:
                self._wait_for_work()
                self._turn()
            self._fail_all("shutting_down", "The server is shutting down.")
            self._hand_out()

    def _wait_for_work(self) -> None:
        with self._changed:
            while not (self._waiting or self._group or self._running or self._closing):
                # Woken now and then, since a signal handler can't take the lock to notify.
                self._changed.wait(timeout=1.0)

    def _turn(self) -> None:
        self._drop_what_ended_outside()
        try:
            self._advance_prompts()
            self._step()
        except Exception as error:  # nothing a client sends should lead here: it is a defect
            traceback.print_exc()
            self._fail_all("internal_error", f"Internal error: {type(error).__name__}.")
            self._cache = BatchCache()
        self._metrics.running.set(self.num_running)
        self._hand_out()

    def _hand_out(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)

    # ------------------------------------------------------------------ ends from outside

    def _drop_what_ended_outside(self) -> None:
        """Cancelled, too late, or waiting while the server shuts down."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
            if self._draining:
                for sequence in waiting:
                    self._fail(sequence, "shutting_down", "The server is shutting down.")
                self._waiting.clear()
            else:
                self._waiting = deque(one for one in waiting if not self._is_over(one, now))
            self._metrics.waiting.set(len(self._waiting))
        for row in reversed(range(len(self._running))):
            if self._is_over(self._running[row], now):
                self._remove_row(row)
        if self._group is not None:
            over = [self._is_over(sequence, now) for sequence in self._group.sequences]
            if all(over):
                self._group = None  # else it goes on; who ended is dropped when it has joined

    def _is_over(self, sequence: GenerationSequence, now: float) -> bool:
        if sequence.cancelled:
            self._note_end(sequence, "cancelled")
        elif now > sequence.request.deadline:
            self._fail(sequence, "timeout", "The request took longer than this server allows.")
        return sequence.has_ended

    def _remove_row(self, row: int, wipe: bool = False) -> None:
        """Take a sequence out of the batch; the last one takes its row, as in the cache."""
        self._cache.leave(row, wipe)
        self._running[row] = self._running[-1]
        self._running.pop()

    # ------------------------------------------------------------------ prompts

    def _advance_prompts(self) -> None:
        """One part of the prompts whose turn it is; at their end they join the batch."""
        if self._group is None:
            self._group = self._next_group()
        group = self._group
        if group is None:
            return
        try:
            self._advance_group(group)
        except TableError as error:
            self._group = None
            self._split_or_fail(group, error)

    def _next_group(self) -> PrefillGroup | None:
        """The first prompts that wait, as many as fit one part and the free rows."""
        free = self.limits.max_batch - len(self._running)
        with self._changed:
            chosen: list[GenerationSequence] = []
            while self._waiting and len(chosen) < free and self._fits(chosen, self._waiting[0]):
                chosen.append(self._waiting.popleft())
            self._metrics.waiting.set(len(self._waiting))
            if not chosen:
                return None
            return PrefillGroup(chosen, Prompts([one.request.prompt_ids for one in chosen]))

    def _fits(self, chosen: list[GenerationSequence], sequence: GenerationSequence) -> bool:
        if not chosen:
            return True
        together = [*chosen, sequence]
        if any(one.request.score_prompt or one.prefill_alone for one in together):
            return False
        width = max(len(one.request.prompt_ids) for one in together)
        return width * len(together) <= self._part_columns()

    def _part_columns(self) -> int:
        if self._forward.device.type != "cpu":
            return PART_ON_GPU
        return PART_BESIDE_RUNNING if self._running else PART_ALONE

    def _advance_group(self, group: PrefillGroup) -> None:
        prompts, rows = group.prompts, len(group.sequences)
        part = prompts.next_part(max(1, self._part_columns() // rows))
        scores = group.sequences[0].request.score_prompt
        details = any(one.request.lookup_details for one in group.sequences)
        started_at = time.perf_counter()
        with self._watch.weights(details) as weights:
            logits = self._forward.prefill(part, prompts.cache, all_logits=scores)
        seconds = time.perf_counter() - started_at
        prompts.advance(part)
        if scores:
            self._score_prompt(group.sequences[0], prompts, part.ids.shape[1], logits[0])
        if prompts.is_complete:
            self._group = None
            lookup = self._details(group.sequences, weights, seconds) if details else [None] * rows
            self._join(group, logits[:, -1], lookup)

    def _score_prompt(
        self, sequence: GenerationSequence, prompts: Prompts, columns: int, logits: Tensor
    ) -> None:
        """Tell the log probabilities of the tokens that these logits [T, V] predict."""
        ids = sequence.request.prompt_ids
        predicted = ids[prompts.done - columns + 1 : prompts.done + 1]
        if predicted:
            chosen = torch.tensor(predicted, device=logits.device)
            top = sequence.request.top_log_probabilities or 0
            scored = log_probabilities(logits[: len(predicted)], chosen, top)
            self._outbox.append((sequence, PromptScored(scored)))

    def _join(
        self, group: PrefillGroup, logits: Tensor, lookup: Sequence[LookupDetail | None]
    ) -> None:
        for sequence in group.sequences:
            self._metrics.prompt_tokens.inc(len(sequence.request.prompt_ids))
        first = len(self._running)
        self._cache.join(group.prompts.cache, group.prompts.lengths)
        self._running.extend(group.sequences)
        self._take_tokens(range(first, len(self._running)), logits, lookup)

    def _split_or_fail(self, group: PrefillGroup, error: TableError) -> None:
        """Records could not be read: of a single prompt, or else each is tried alone."""
        if len(group.sequences) == 1:
            self._fail(group.sequences[0], "table_error", str(error))
            return
        for sequence in group.sequences:
            sequence.prefill_alone = True
        with self._changed:
            self._waiting.extendleft(reversed(group.sequences))

    # ------------------------------------------------------------------ steps

    def _step(self) -> None:
        """One more token for every row."""
        if not self._running:
            return
        ids = [sequence.last_token_id for sequence in self._running]
        details = any(sequence.request.lookup_details for sequence in self._running)
        started_at = time.perf_counter()
        try:
            with self._watch.weights(details) as weights:
                logits = self._forward.decode(ids, self._cache)
        except TableError as error:
            self._fail_unreadable(error)
            return
        seconds = time.perf_counter() - started_at
        self._metrics.steps.inc()
        lookup: list[LookupDetail | None] = [None] * len(ids)
        if details:
            lookup = self._details(self._running, weights, seconds)
        self._take_tokens(range(len(ids)), logits, lookup)

    def _fail_unreadable(self, error: TableError) -> None:
        """A step's records could not all be read: those rows end whose own can't."""
        failed = 0
        for row in reversed(range(len(self._running))):
            own = self._watch.read_error(self._running[row].last_token_id)
            if own is not None:
                self._fail(self._running[row], "table_error", str(own))
                self._remove_row(row)
                failed += 1
        if not failed:  # each can be read alone, together they can't: don't try for ever
            for row in reversed(range(len(self._running))):
                self._fail(self._running[row], "table_error", str(error))
                self._remove_row(row)

    def _details(
        self, sequences: Sequence[GenerationSequence], weights: list[Tensor], seconds: float
    ) -> list[LookupDetail | None]:
        cached = self._watch.were_cached([sequence.last_token_id for sequence in sequences])
        return [
            self._watch.describe(
                row, len(sequences), weights, None if cached is None else cached[row], seconds
            )
            if sequence.request.lookup_details
            else None
            for row, sequence in enumerate(sequences)
        ]

    def _take_tokens(
        self, rows: range, logits: Tensor, lookup: Sequence[LookupDetail | None]
    ) -> None:
        """Choose a token for each of these rows from logits [len(rows), V], and tell it."""
        sequences = [self._running[row] for row in rows]
        chosen = choose(logits, [sequence.request.chooser for sequence in sequences])
        picked = torch.tensor(chosen, device=logits.device)
        finite = logits.gather(1, picked.unsqueeze(1)).squeeze(1).isfinite().tolist()
        wanted = max((one.request.top_log_probabilities or 0) for one in sequences)
        scored = None
        if any(one.request.top_log_probabilities is not None for one in sequences):
            scored = log_probabilities(logits, picked, wanted)
        ended: list[tuple[int, bool]] = []
        for place, row in enumerate(rows):
            sequence = sequences[place]
            if not finite[place]:
                self._fail(sequence, "internal_error", "The model gave logits that are no numbers.")
                ended.append((row, True))
                continue
            has_scores = sequence.request.top_log_probabilities is not None
            events = sequence.add(
                chosen[place],
                self._end_ids,
                scored[place] if scored is not None and has_scores else None,
                lookup[place],
            )
            self._note_token(sequence)
            self._outbox.extend((sequence, event) for event in events)
            if isinstance(events[-1], Finished):
                self._note_end(sequence, events[-1].reason)
                ended.append((row, False))
        self._metrics.count_tokens(len(rows))
        for row, wipe in reversed(ended):
            self._remove_row(row, wipe)

    # ------------------------------------------------------------------ what is told and counted

    def _note_token(self, sequence: GenerationSequence) -> None:
        now = time.monotonic()
        if sequence.last_token_at is None:
            self._metrics.first_token.observe(now - sequence.submitted_at)
        else:
            self._metrics.between_tokens.observe(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _note_end(self, sequence: GenerationSequence, end: str) -> None:
        if sequence.has_ended:
            return
        sequence.has_ended = True
        self._metrics.sequences.labels(end).inc()
        self._metrics.total.observe(time.monotonic() - sequence.submitted_at)

    def _fail(self, sequence: GenerationSequence, code: str, message: str) -> None:
        if sequence.has_ended:
            return
        if code == "table_error":
            self._metrics.table_errors.inc()
        self._note_end(sequence, code)
        self._outbox.append((sequence, Failed(code, message)))

    def _fail_all(self, code: str, message: str) -> None:
        """Everything, except what waits while the server goes on."""
        group, self._group = self._group, None
        for sequence in group.sequences if group is not None else []:
            self._fail(sequence, code, message)
        for sequence in self._running:
            self._fail(sequence, code, message)
        self._running = []
        if self._closing:
            with self._changed:
                for sequence in self._waiting:
                    self._fail(sequence, code, message)
                self._waiting.clear()


def end_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """The token ids after which a text is over: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = list(own) if isinstance(own, list | tuple) else [own]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    return sorted({token_id for token_id in ids if token_id is not None})
