"""A loaded model as a language model of lm-evaluation-harness; import it late, as the harness."""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from lookup_experts.evaluation.answers import Answer, AnswerJournal, batch_key
from lookup_experts.evaluation.perplexity import Progress

LOGITS_BYTES = 2**30
"""A batch's logits in float32 keep within this; a single longer prompt may exceed it."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), token ids of the one, token ids of the other)."""


class LoadedLanguageModel(HFLM):
    """The harness's own bridge to transformers, with batches that can be accounted for.

    Every batch is given to `HFLM` by itself: the harness pads, cuts, runs and scores it. Batches
    depend on the requests alone, so an evaluation that goes on after an interruption computes
    what an undisturbed one does, to the last bit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        journal: AnswerJournal | None = None,
        progress: Progress | None = None,
    ) -> None:
        """See `evaluate_tasks`."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.num_requests = 0
        self.cut_requests = 0
        """Those that didn't fit into the model's window, so that their context was cut."""
        self._prompts = batch_size
        self._journal = journal
        self._progress = progress

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Log-likelihoods of continuations, in the order of the requests."""
        self.num_requests += len(requests)
        self.cut_requests += sum(
            len(context) + len(wanted) > self.max_length + 1 for _, context, wanted in requests
        )
        pieces = [list(self._pieces(request)) for request in requests]
        answers = iter(self._answer_all([piece for parts in pieces for piece in parts]))
        return [_chain([next(answers) for _ in parts]) for parts in pieces]

    def _pieces(self, request: Request) -> Iterator[Request]:
        """A continuation longer than the window in parts, each after what comes before it.

        The harness refuses such a one. By the chain rule its log-likelihood is the sum of those
        of its parts; half of the window is left for what comes before each.
        """
        words, context, wanted = request
        if len(wanted) <= self.max_length:
            yield request
            return
        size = max(self.max_length // 2, 1)
        for start in range(0, len(wanted), size):
            yield words, context + wanted[:start], wanted[start : start + size]

    def _answer_all(self, requests: Sequence[Request]) -> list[Answer]:
        lengths = [len(context) + len(wanted) for _, context, wanted in requests]
        answers: list[Answer] = [(0.0, False)] * len(requests)
        done = 0
        for batch in self._batches(requests):
            found = self._answer([requests[place] for place in batch])
            for place, answer in zip(batch, found, strict=True):
                answers[place] = answer
            done += sum(lengths[place] for place in batch)
            if self._progress:
                self._progress(done, sum(lengths))
        return answers

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Places of requests, the longest first; neighbours share their context if any do."""

        def order(place: int) -> tuple[int, list[int]]:
            _, context, wanted = requests[place]
            return -len(context) - len(wanted), context + wanted

        batch: list[int] = []
        width = 0
        for place in sorted(range(len(requests)), key=order):
            _, context, wanted = requests[place]
            width = width or min(len(context) + len(wanted), self.max_length)
            num_bytes = (len(batch) + 1) * width * self.vocab_size * 4
            if batch and (len(batch) == self._prompts or num_bytes > LOGITS_BYTES):
                yield batch
                batch, width = [], min(len(context) + len(wanted), self.max_length)
            batch.append(place)
        if batch:
            yield batch

    def _answer(self, batch: list[Request]) -> list[Answer]:
        key = batch_key([(context, wanted) for _, context, wanted in batch])
        known = self._journal.get(key) if self._journal else None
        if known is None:
            known = super()._loglikelihood_tokens(batch, disable_tqdm=True)
            if self._journal:
                self._journal.add(key, known)
        return known


def _chain(parts: Sequence[Answer]) -> Answer:
    """The answer to a continuation from those to its parts."""
    return sum(nats for nats, _ in parts), all(greedy for _, greedy in parts)
