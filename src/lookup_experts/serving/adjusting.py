"""What a request asks for beside temperature and cuts: penalties, biases, tokens not allowed.

A row's logits are changed before a token is chosen from them. Only requests that ask for it have
an `Adjustment`; the rows of all others are not touched. The order is that of the field: biases,
then penalties, then what is not allowed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lookup_experts.serving.constraints import Constraint

NEVER = float("-inf")


@dataclass(frozen=True)
class Penalties:
    """Against repetition; the defaults change nothing."""

    presence: float = 0.0
    """Taken from the logit of every token that was generated."""
    frequency: float = 0.0
    """The same, for each time that it was generated."""
    repetition: float = 1.0
    """Of tokens in the prompt or generated: divides positive logits, multiplies negative ones."""


@dataclass
class Adjustment:
    """Changes one request's logits; knows what the request has generated."""

    penalties: Penalties = field(default_factory=Penalties)
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of token ids."""
    prompt_ids: Sequence[int] = ()
    end_ids: frozenset[int] = frozenset()
    """That may not come before `min_tokens`, unless nothing else may."""
    min_tokens: int = 0
    constraint: Constraint | None = None
    counts: Counter[int] = field(default_factory=Counter, init=False)
    """How often each token id was generated."""

    def __bool__(self) -> bool:
        """Whether it changes anything at all."""
        return bool(
            self.penalties != Penalties() or self.bias or self.min_tokens or self.constraint
        )

    def take(self, token_id: int) -> None:
        """A token was chosen."""
        self.counts[token_id] += 1
        if self.constraint is not None:
            self.constraint.take(token_id)

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [V] -> others [V], float32."""
        logits = logits.to(torch.float32, copy=True)
        device, penalties = logits.device, self.penalties
        if self.bias:
            ids = torch.tensor(list(self.bias), device=device)
            logits[ids] += torch.tensor(list(self.bias.values()), device=device)
        if penalties.repetition != 1:
            ids = torch.tensor([*{*self.prompt_ids, *self.counts}], device=device)
            seen, by = logits[ids], penalties.repetition
            logits[ids] = torch.where(seen > 0, seen / by, seen * by)
        if self.counts and (penalties.presence or penalties.frequency):
            ids = torch.tensor(list(self.counts), device=device)
            times = torch.tensor(list(self.counts.values()), device=device)
            logits[ids] -= penalties.presence + penalties.frequency * times
        if self.constraint is not None:
            allowed = self.constraint.allowed(len(logits)).to(device)
            logits.masked_fill_(~allowed, NEVER)
        if self._may_not_end:
            longer = logits.clone()
            ends = [token_id for token_id in self.end_ids if token_id < len(logits)]
            longer[torch.tensor(ends, dtype=torch.int64, device=device)] = NEVER
            logits = longer if float(longer.max()) > NEVER else logits
        return logits

    @property
    def _may_not_end(self) -> bool:
        return bool(self.end_ids) and self.counts.total() < self.min_tokens

    def apply_reference(self, logits: Tensor) -> Tensor:
        """`apply` by the book, token by token."""
        values = logits.float().tolist()
        allowed = [True] * len(values)
        if self.constraint is not None:
            allowed = self.constraint.allowed(len(values)).tolist()
        ends = set(self.end_ids) if self._may_not_end else set()
        if all(place in ends for place, is_allowed in enumerate(allowed) if is_allowed):
            ends = set()
        adjusted = []
        for token_id, value in enumerate(values):
            value += self.bias.get(token_id, 0.0)
            if token_id in self.prompt_ids or self.counts[token_id]:
                by = self.penalties.repetition
                value = value / by if value > 0 else value * by
            if self.counts[token_id]:
                value -= self.penalties.presence
                value -= self.penalties.frequency * self.counts[token_id]
            if not allowed[token_id] or token_id in ends:
                value = NEVER
            adjusted.append(value)
        return torch.tensor(adjusted)
