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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import TableError
from lookup_experts.serving.details import LookupWatch
from lookup_experts.serving.forward import Forward, Prompts
from lookup_experts.serving.metrics import ServingMetrics
from lookup_experts.serving.reports import Deliver, Reports
from lookup_experts.serving.sampling import TokenLogProbability, choose, log_probabilities
from lookup_experts.serving.sequence import (
    Event,
    Failed,
    Finished,
    GenerationSequence,
    LookupDetail,
    PromptScored,
)
from lookup_experts.serving.waiting import Limits, WaitingLine

PART_BESIDE_RUNNING = 128
"""Columns of prompts per turn on a CPU while sequences run, so that they don't stall."""
PART_ALONE = 512
"""The same while none run."""
PART_ON_GPU = 1024
PART_SCORED = 128
"""Of a prompt that is scored: each column has a whole vocabulary of logits."""

_SHUTTING_DOWN = Failed("shutting_down", "The server is shutting down.")
_TOO_LATE = Failed("timeout", "The request took longer than this server allows.")
_NO_NUMBERS = Failed("internal_error", "The model gave logits that are no numbers.")


@dataclass
class PrefillGroup:
    """Prompts that go through the model together, and whose they are."""

    sequences: list[GenerationSequence]
    prompts: Prompts

    @property
    def wants_details(self) -> bool:
        """Whether anybody asked what the experts do."""
        return any(one.request.lookup_details for one in self.sequences)


class Engine:
    """Runs sequences.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        end_ids: the token ids that end a text.
        limits: of the batch and the queue.
        metrics: told what happens.
        deliver: given the events of each turn, in the engine's thread.
        captures: whether a GPU captures its steps where that can be; see `Forward`.

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
        captures: bool = True,
    ) -> None:
        self.limits = limits
        self._forward = Forward(model, captures)
        self._watch = LookupWatch(model)
        self._end_ids = frozenset(end_ids)
        self._metrics = metrics
        self._reports = Reports(metrics, deliver)
        self._line = WaitingLine(limits, metrics)
        self._closing = False
        self._group: PrefillGroup | None = None
        self._running: list[GenerationSequence] = []
        """Whose the rows of the cache are."""
        self._cache = self._forward.new_cache()
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
        self._line.append(sequences, self.num_running)

    def cancel(self, sequence: GenerationSequence) -> None:
        """Nobody waits for it any more; its row is free within a step."""
        sequence.cancelled = True
        self._line.wake()

    def drain(self) -> None:
        """Take nothing new, fail what waits, finish what runs. Safe in a signal handler."""
        self._line.is_draining = True

    def close(self, seconds: float = 5.0) -> None:
        """Stop within a step, failing what runs."""
        self._line.is_draining = self._closing = True
        self._line.wake()
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether it works and takes requests."""
        return self._thread.is_alive() and not self._line.is_draining

    @property
    def why_not_captured(self) -> str | None:
        """See `Forward`."""
        return self._forward.why_not_captured

    @property
    def num_running(self) -> int:
        """Sequences in the batch, or about to join it."""
        group = self._group
        return len(self._running) + (len(group.sequences) if group is not None else 0)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._line)

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._closing:
                self._line.wait(lambda: bool(self._group or self._running or self._closing))
                self._turn()
            self._fail_running(_SHUTTING_DOWN)
            self._line.drop(self._refuse)
            self._reports.hand_out()

    def _turn(self) -> None:
        self._drop_what_ended_outside()
        try:
            self._advance_prompts()
            self._step()
        except Exception as error:  # nothing a client sends should lead here: it is a defect
            traceback.print_exc()
            self._fail_running(Failed("internal_error", f"Internal error: {type(error).__name__}."))
            self._cache = self._forward.new_cache()
        self._metrics.running.set(self.num_running)
        self._reports.hand_out()

    # ------------------------------------------------------------------ ends from outside

    def _drop_what_ended_outside(self) -> None:
        """Cancelled, too late, or waiting while the server shuts down."""
        self._line.drop(self._refuse if self._line.is_draining else self._is_over)
        for row in reversed(range(len(self._running))):
            if self._is_over(self._running[row]):
                self._remove_row(row)
        if self._group is not None:
            over = [self._is_over(sequence) for sequence in self._group.sequences]
            if all(over):
                self._group = None  # else it goes on; who ended is dropped when it has joined

    def _is_over(self, sequence: GenerationSequence) -> bool:
        if sequence.cancelled:
            self._reports.cancelled(sequence)
        elif time.monotonic() > sequence.request.deadline:
            self._reports.tell(sequence, _TOO_LATE)
        return sequence.has_ended

    def _refuse(self, sequence: GenerationSequence) -> bool:
        self._reports.tell(sequence, _SHUTTING_DOWN)
        return True

    def _fail_running(self, failure: Failed) -> None:
        """Everything but what waits."""
        group, self._group = self._group, None
        for sequence in [*(group.sequences if group is not None else ()), *self._running]:
            self._reports.tell(sequence, failure)
        self._running = []

    def _remove_row(self, row: int, wipe: bool = False) -> None:
        """Take a sequence out of the batch; the last one takes its row, as in the cache."""
        self._cache.leave(row, wipe)
        self._running[row] = self._running[-1]
        self._running.pop()

    # ------------------------------------------------------------------ prompts

    def _advance_prompts(self) -> None:
        """One part of the prompts whose turn it is; at their end they join the batch."""
        group = self._group
        if group is None:
            free = self.limits.max_batch - len(self._running)
            chosen = self._line.take(free, self._fits)
            if not chosen:
                return
            prompts = Prompts([sequence.request.prompt_ids for sequence in chosen])
            group = self._group = PrefillGroup(chosen, prompts)
        try:
            self._advance_group(group)
        except TableError as error:
            self._group = None
            self._split_or_fail(group, error)

    def _fits(self, chosen: list[GenerationSequence], sequence: GenerationSequence) -> bool:
        """Whether a prompt can go with those chosen: small ones do, padded to the widest."""
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
        scores = group.sequences[0].request.score_prompt
        columns = PART_SCORED if scores else self._part_columns() // rows
        part = prompts.next_part(max(1, columns))
        started_at = time.perf_counter()
        with self._watch.weights(group.wants_details) as weights:
            tables = [sequence.request.table for sequence in group.sequences]
            logits = self._forward.prefill(part, prompts.cache, scores, tables)
        seconds = time.perf_counter() - started_at
        prompts.advance(part)
        if scores:
            self._score_prompt(group.sequences[0], prompts.done - part.ids.shape[1], logits[0])
        if prompts.is_complete:
            lookup = self._details(group.sequences, weights, seconds)
            self._join(group, logits[:, -1], lookup)

    def _score_prompt(self, sequence: GenerationSequence, begin: int, logits: Tensor) -> None:
        """Tell the log probabilities that logits [T, V], of positions from `begin` on, give to
        the prompt's own next tokens."""
        predicted = sequence.request.prompt_ids[begin + 1 : begin + 1 + len(logits)]
        if predicted:
            chosen = torch.tensor(predicted, device=logits.device)
            top = sequence.request.top_log_probabilities or 0
            scored = log_probabilities(logits[: len(predicted)], chosen, top)
            self._reports.tell(sequence, PromptScored(scored))

    def _join(
        self, group: PrefillGroup, logits: Tensor, lookup: Sequence[LookupDetail | None]
    ) -> None:
        self._group = None
        first = len(self._running)
        self._cache.join(group.prompts.cache, group.prompts.lengths)
        self._running.extend(group.sequences)
        self._take_tokens(range(first, len(self._running)), logits, lookup)

    def _split_or_fail(self, group: PrefillGroup, error: TableError) -> None:
        """Records could not be read: of a single prompt, or else each is tried alone."""
        if len(group.sequences) == 1:
            self._reports.tell(group.sequences[0], Failed("table_error", str(error)))
            return
        for sequence in group.sequences:
            sequence.prefill_alone = True
        self._line.put_back(group.sequences)

    # ------------------------------------------------------------------ steps

    def _step(self) -> None:
        """One more token for every row."""
        if not self._running:
            return
        ids = [sequence.last_token_id for sequence in self._running]
        tables = [sequence.request.table for sequence in self._running]
        details = any(sequence.request.lookup_details for sequence in self._running)
        started_at = time.perf_counter()
        try:
            with self._watch.weights(details) as weights:
                logits = self._forward.decode(ids, self._cache, tables)
        except TableError as error:
            self._fail_unreadable(error)
            return
        seconds = time.perf_counter() - started_at
        self._metrics.steps.inc()
        weights = [layer[: len(ids)] for layer in weights]  # without rows that only pad
        lookup = self._details(self._running, weights, seconds)
        self._take_tokens(range(len(ids)), logits, lookup)

    def _fail_unreadable(self, error: TableError) -> None:
        """A step's records could not all be read: those rows end whose own can't.

        The step is then taken again without them. If each record can be read alone, all end,
        rather than that it is tried for ever.
        """
        own = [
            self._watch.read_error(sequence.last_token_id, sequence.request.table)
            for sequence in self._running
        ]
        if not any(own):
            own = [error] * len(own)
        for row in reversed(range(len(own))):
            if own[row] is not None:
                self._reports.tell(self._running[row], Failed("table_error", str(own[row])))
                self._remove_row(row)

    def _details(
        self, sequences: Sequence[GenerationSequence], weights: list[Tensor], seconds: float
    ) -> list[LookupDetail | None]:
        """What the experts did in the last pass, for each who asked."""
        asked = [sequence.request.lookup_details for sequence in sequences]
        if not any(asked):
            return [None] * len(sequences)
        return [
            self._watch.describe(
                row, len(asked), weights, one.last_token_id, one.request.table, seconds
            )
            if one.request.lookup_details
            else None
            for row, one in enumerate(sequences)
        ]

    def _take_tokens(
        self, rows: range, logits: Tensor, lookup: Sequence[LookupDetail | None]
    ) -> None:
        """Choose a token for each of these rows from logits [len(rows), V], and tell it."""
        sequences = [self._running[row] for row in rows]
        picked = choose(logits, [sequence.request.chooser for sequence in sequences])
        chosen, finite = torch.stack((picked, _finite_rows(logits, picked))).tolist()
        failure = _NO_NUMBERS if all(finite) else self._why_no_numbers()
        scored = _scores(sequences, logits, picked)
        for place, row in reversed(list(enumerate(rows))):  # a row's end moves only later ones
            sequence = sequences[place]
            if finite[place]:
                events = self._events_of(sequence, chosen[place], scored[place], lookup[place])
            else:
                events = [failure]
            for event in events:
                self._reports.tell(sequence, event)
            if sequence.has_ended:
                self._remove_row(row, wipe=not finite[place])

    def _why_no_numbers(self) -> Failed:
        error = self._watch.late_error()
        return _NO_NUMBERS if error is None else Failed("table_error", str(error))

    def _events_of(
        self,
        sequence: GenerationSequence,
        token_id: int,
        scored: TokenLogProbability | None,
        lookup: LookupDetail | None,
    ) -> Sequence[Event]:
        if sequence.request.max_tokens == 0:  # it was about the prompt
            return [Finished("length", "")]
        return sequence.add(token_id, self._end_ids, scored, lookup)


def _finite_rows(logits: Tensor, picked: Tensor) -> Tensor:
    """bool [B]: no logit of the row is nan, and the picked one is not infinite either."""
    own = logits.gather(1, picked.unsqueeze(1)).squeeze(1)
    return own.isfinite() & ~logits.sum(-1, dtype=torch.float32).isnan()


def _scores(
    sequences: Sequence[GenerationSequence], logits: Tensor, picked: Tensor
) -> Sequence[TokenLogProbability | None]:
    """The log probabilities of the picked tokens, for those who asked."""
    wanted = [sequence.request.top_log_probabilities for sequence in sequences]
    asked = [row for row, top in enumerate(wanted) if top is not None]
    scored: list[TokenLogProbability | None] = [None] * len(sequences)
    if asked:
        most = max(wanted[row] or 0 for row in asked)
        for row, score in zip(
            asked, log_probabilities(logits[asked], picked[asked], most), strict=True
        ):
            scored[row] = score
    return scored


def end_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """The token ids after which a text is over: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = list(own) if isinstance(own, list | tuple) else [own]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    return sorted({token_id for token_id in ids if token_id is not None})
