"""The model's forward pass, for prompts in parts and for one step of the batch."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookup_experts.model.cache_names import cache_argument
from lookup_experts.serving.kv_cache import BatchCache, check_can_batch


class Forward:
    """Calls a causal LM of transformers.

    Args:
        model: in evaluation mode.

    Raises:
        UserError: the model can't be batched.
    """

    def __init__(self, model: Any) -> None:
        check_can_batch(model)
        self._model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        self._cache_argument = cache_argument(model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._model.device

    def decode(self, token_ids: Sequence[int], cache: BatchCache) -> Tensor:
        """One step: each row's newest token id -> the logits [B, V] of the next one."""
        cache.make_room()
        ids = torch.tensor(token_ids, device=self.device).unsqueeze(1)
        logits = self._call(ids, cache, cache.step_inputs(self.device), logits_to_keep=1)
        cache.advance()
        return logits[:, -1]

    def prefill(self, part: "PromptPart", cache: DynamicCache, all_logits: bool) -> Tensor:
        """A part of a group of prompts -> logits [G, T or 1, V]."""
        inputs = {
            "attention_mask": part.mask.to(self.device),
            "position_ids": part.positions.to(self.device),
        }
        return self._call(part.ids.to(self.device), cache, inputs, int(not all_logits))

    def _call(self, ids: Tensor, cache: Any, inputs: dict[str, Any], logits_to_keep: int) -> Any:
        inputs = {name: value for name, value in inputs.items() if name in self._takes}
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = logits_to_keep
        inputs[self._cache_argument] = cache
        return self._model(input_ids=ids, use_cache=True, **inputs).logits


class PromptPart:
    """Some columns of a group of left-padded prompts, as the model takes them.

    Attributes:
        ids: [G, T] int64.
        mask: [G, columns so far + T] int64.
        positions: [G, T] int64.
    """

    def __init__(self, ids: Tensor, mask: Tensor, begin: int, end: int) -> None:
        self.ids = ids[:, begin:end]
        self.mask = mask[:, :end]
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]


class Prompts:
    """A group of prompts on their way through the model, part by part.

    Args:
        prompts: token ids of each; none empty.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.width = max(self.lengths)
        self.done = 0
        """Columns that have been through the model."""
        self.cache = DynamicCache()
        self._ids = torch.zeros(len(prompts), self.width, dtype=torch.int64)
        self._mask = torch.zeros_like(self._ids)
        for row, prompt in enumerate(prompts):
            # What pads is a token of the prompt itself: it costs the table no other record.
            self._ids[row] = prompt[0]
            self._ids[row, self.width - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, self.width - len(prompt) :] = 1

    def next_part(self, num_columns: int) -> PromptPart:
        """The next columns, at most so many; they count as done once `advance` is called."""
        return PromptPart(
            self._ids, self._mask, self.done, min(self.width, self.done + num_columns)
        )

    def advance(self, part: PromptPart) -> None:
        """A part has been through the model."""
        self.done += part.ids.shape[1]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.done == self.width
