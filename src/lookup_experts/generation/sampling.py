"""How the next token of a text is chosen, by `generate` and within captured steps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lookup_experts.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 considers all."""
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {wanted}.")

    def generate_arguments(self) -> dict[str, Any]:
        """As keyword arguments of transformers' `generate`."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return {**arguments, "do_sample": False}
        return {
            **arguments,
            "do_sample": True,
            "temperature": float(self.temperature),  # it takes no other
            "top_p": self.top_p,
            "top_k": self.top_k,
        }

    def choose(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> token ids int64 [B], by operations that a CUDA graph can hold.

        In the order of transformers' `generate`: temperature, top-k, top-p. Drawn by the device's
        own generator, in float32.
        """
        if self.temperature == 0:
            return likeliest(logits)
        scores = logits.float() / self.temperature
        no_ids = scores.new_zeros(0)  # which neither looks at
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(no_ids, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(no_ids, scores)
        # The first to arrive of as many exponential clocks; `torch.multinomial` looks at its
        # numbers on the host, which a captured step can't.
        arrivals = torch.empty_like(scores).exponential_()
        return likeliest(scores.softmax(-1) / arrivals)


def likeliest(logits: Tensor) -> Tensor:
    """Logits [B, V] -> the likeliest token ids, int64 [B]."""
    return logits.argmax(-1)
