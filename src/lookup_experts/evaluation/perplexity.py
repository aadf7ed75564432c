"""Perplexity: how well a causal LM foretells a text.

A text is cut into windows of the model's context, one after the other, and every token but the
first is predicted exactly once, from the tokens before it in its window. So the number depends on
the context, which belongs to it: compare only what was measured with the same.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lookup_experts.errors import UserError

LONGEST_WINDOW = 2048
"""Tokens. Models with a longer context are evaluated in windows of this: the logits of a window
are kept at once."""
POSITIONS_AT_ONCE = 256
"""Positions whose logits are taken to float32 at once."""

Progress = Callable[[int, int], None]
"""Called with (tokens predicted, tokens in all)."""


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured."""

    nats_per_token: float
    """Mean negative log-likelihood, in nats."""
    predicted_tokens: int
    context: int
    """Tokens of a window."""

    @property
    def perplexity(self) -> float:
        """e to the power of the nats per token."""
        return math.exp(self.nats_per_token)


@torch.inference_mode()
def perplexity(
    model: Any,
    token_ids: Tensor,
    context: int,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Perplexity:
    """How well a causal LM foretells a text.

    Args:
        model: any causal LM of transformers, in evaluation mode.
        token_ids: [n] int64, at least 2.
        context: tokens of a window; `window_size(model)`.
        batch_size: windows in a forward pass; changes nothing but speed and memory.
        progress: called after each forward pass.

    Raises:
        UserError: there is nothing to predict, or the context is none that the model has.
    """
    check_text(model, token_ids, context)
    nats, done = 0.0, 0
    for inputs, targets in windows(token_ids, context, batch_size):
        for logits, wanted in positions(next_token_logits(model, inputs), targets):
            nats += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
        done += targets.numel()
        if progress:
            progress(done, len(token_ids) - 1)
    return Perplexity(nats / done, done, context)


def windows(token_ids: Tensor, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), both [B, T], that predict every token of [n] but the first, once.

    All windows are `context` long but the last, which comes alone, so nothing is padded.
    """
    num_full = (len(token_ids) - 1) // context
    end = num_full * context
    if num_full:
        inputs = token_ids[:end].view(num_full, context)
        targets = token_ids[1 : end + 1].view(num_full, context)
        yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    if end < len(token_ids) - 1:
        yield token_ids[end:-1].unsqueeze(0), token_ids[end + 1 :].unsqueeze(0)


def next_token_logits(model: Any, inputs: Tensor) -> Tensor:
    """[B, T] token ids -> [B, T, V], what the model gives for the token after each."""
    return model(input_ids=inputs.to(model.device), use_cache=False).logits


def positions(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """([P, V], [P]) pieces of logits [B, T, V] and targets [B, T], P small."""
    return zip(
        logits.flatten(0, 1).split(POSITIONS_AT_ONCE),
        targets.to(logits.device).flatten().split(POSITIONS_AT_ONCE),
        strict=True,
    )


def window_size(model: Any) -> int:
    """The model's context, and at most `LONGEST_WINDOW`."""
    context = _context_of(model)
    return LONGEST_WINDOW if context is None else min(context, LONGEST_WINDOW)


def _context_of(model: Any) -> int | None:
    """Tokens that the model can take; None where its configuration doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_text(model: Any, token_ids: Tensor, context: int) -> None:
    """Raise a `UserError` unless the text can be evaluated in windows of `context`."""
    if len(token_ids) < 2:
        raise UserError(f"The text has {len(token_ids)} tokens; at least 2 are needed.")
    longest = _context_of(model)
    if context < 1 or (longest is not None and context > longest):
        raise UserError(
            f"A context of {context} tokens is none that the model has (1 to {longest})."
        )
    vocab_size = model.get_input_embeddings().weight.shape[0]
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"The text has the token id {low if low < 0 else high}, and the model's embedding has "
            f"rows for the ids 0 to {vocab_size - 1} only."
        )
