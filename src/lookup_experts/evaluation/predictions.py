"""How far a model's predictions on a text are from those of another, the *reference*."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.evaluation.perplexity import (
    Perplexity,
    Progress,
    check_text,
    next_token_logits,
    positions,
    window_size,
    windows,
)

NextTokenLogits = Callable[[Tensor], Tensor]
"""[B, T] token ids -> [B, T, V]."""


@dataclass(frozen=True)
class TextQuality:
    """What a model makes of a text, against what the reference makes of it."""

    predicted_tokens: int
    context: int
    """Tokens of a window."""
    reference_perplexity: float
    perplexity: float
    kl_divergence: float
    """Mean over positions of KL(reference || model), in nats."""
    top1_agreement: float
    """Share of positions at which both find the same token likeliest."""
    largest_logit_difference: float

    @property
    def of_model(self) -> Perplexity:
        """As `perplexity` measures it."""
        return Perplexity(math.log(self.perplexity), self.predicted_tokens, self.context)


def compare_models(
    model: Any, reference: Any, token_ids: Tensor, progress: Progress | None = None
) -> TextQuality:
    """What a model makes of a text, against what another makes of it.

    Args:
        model, reference: any causal LMs of transformers with one vocabulary, in evaluation mode.
        token_ids: [n] int64, at least 2; the windows are as long as both models take.
        progress: called with (tokens predicted, tokens in all).

    Raises:
        UserError: there is nothing to predict, or the models have not the same token ids.
    """
    context = min(window_size(model), window_size(reference))
    for each in (model, reference):
        check_text(each, token_ids, context)
    sizes = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"The model predicts {sizes[0]:,} token ids and the reference {sizes[1]:,}: only "
            "predictions over one vocabulary can be compared."
        )
    return compare_predictions(
        partial(next_token_logits, reference),
        partial(next_token_logits, model),
        token_ids,
        context,
        progress=progress,
    )


@torch.inference_mode()
def compare_predictions(
    reference: NextTokenLogits,
    found: NextTokenLogits,
    token_ids: Tensor,
    context: int,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> TextQuality:
    """What `found` makes of a text, against what `reference` makes of it.

    Args:
        reference, found: are asked for the same windows, one after the other.
        token_ids: [n] int64, at least 2.
        context: tokens of a window; see `perplexity`.
        batch_size: windows in a forward pass.
        progress: called with (tokens predicted, tokens in all).
    """
    sums = torch.zeros(4, dtype=torch.float64)
    largest, done = 0.0, 0
    for inputs, targets in windows(token_ids, context, batch_size):
        pairs = zip(
            positions(reference(inputs), targets), positions(found(inputs), targets), strict=True
        )
        for (of_reference, wanted), (of_model, _) in pairs:
            sums += compare_logits(of_reference, of_model, wanted)
            largest = max(largest, float((of_reference - of_model).abs().max()))
        done += targets.numel()
        if progress:
            progress(done, len(token_ids) - 1)
    reference_nats, nats, divergence, agreement = (sums / done).tolist()
    return TextQuality(
        predicted_tokens=done,
        context=context,
        reference_perplexity=math.exp(reference_nats),
        perplexity=math.exp(nats),
        kl_divergence=divergence,
        top1_agreement=agreement,
        largest_logit_difference=largest,
    )


def compare_logits(reference: Tensor, found: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions: nats of both, KL(reference || found), agreements; float64 [4].

    Args:
        reference, found: [P, V], any float type.
        targets: [P] int64.
    """
    expected_log, found_log = reference.float().log_softmax(-1), found.float().log_softmax(-1)
    wanted = targets.unsqueeze(1)
    return torch.stack(
        [
            -expected_log.gather(1, wanted).double().sum(),
            -found_log.gather(1, wanted).double().sum(),
            (expected_log.exp() * (expected_log - found_log)).sum(-1).double().sum(),
            (expected_log.argmax(-1) == found_log.argmax(-1)).double().sum(),
        ]
    ).cpu()
