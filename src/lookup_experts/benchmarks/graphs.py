"""Decoding by CUDA graphs, as transformers' `generate` does it with a static cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from lookup_experts.model.cache_names import cache_argument


class DecodingByGraphs:
    """A model whose steps with a cache are compiled and replayed as CUDA graphs.

    It is called as the model is, and has the model's attributes. A call without a cache is a
    prompt: it runs as ever, and fills the one static cache that all prompts of its batch size
    share, so that the graphs' addresses stay.

    Args:
        model: a causal LM.
        most_tokens: the longest sequence, prompt and steps.
        options: of `torch.compile`.
    """

    def __init__(self, model: Any, most_tokens: int, options: dict[str, Any] | None = None) -> None:
        self._model, self._most_tokens = model, most_tokens
        self._cache_argument = cache_argument(model)
        self._step = torch.compile(model, **(options or {"mode": "reduce-overhead"}))
        self._caches: dict[int, StaticCache] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: Tensor, **arguments: Any) -> Any:
        if self._cache_argument in arguments:
            torch.compiler.cudagraph_mark_step_begin()
            return self._step(tokens, **arguments)
        arguments[self._cache_argument] = self._cache(len(tokens))
        return self._model(tokens, **arguments)

    def _cache(self, batch: int) -> StaticCache:
        if batch in self._caches:
            self._caches[batch].reset()
        else:
            self._caches[batch] = StaticCache(
                config=self._model.config, max_cache_len=self._most_tokens
            )
        return self._caches[batch]
