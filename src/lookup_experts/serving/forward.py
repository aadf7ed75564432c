"""The model's forward pass, for prompts in parts and for one step of the batch.

On a GPU a step is captured once for each size of batch and replayed (`generation/captured.py`);
elsewhere, and where that can't be, its operations run one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookup_experts.generation.captured import DecodingSteps, ModelCall, why_not_fixed
from lookup_experts.generation.fixed_cache import FixedCache
from lookup_experts.serving.kv_cache import BatchCache, check_can_batch

Tables = Sequence[str | None]
"""Of each row, of a model that has several; other models take no notice."""
NO_TABLE: Tables = (None,)


class Forward:
    """Calls a causal LM of transformers.

    Args:
        model: in evaluation mode.
        captures: whether to capture steps where that can be.

    Attributes:
        why_not_captured: what is against it on a GPU, as a sentence; None: nothing.

    Raises:
        UserError: the model can't be batched.
    """

    def __init__(self, model: Any, captures: bool = True) -> None:
        check_can_batch(model)
        self._model = model
        self._call = ModelCall(model)
        self._steps = DecodingSteps(model)
        self._has_tables = hasattr(model, "use_table")
        self._is_fixed = captures and self.device.type == "cuda"
        self.why_not_captured: str | None = None
        if self._is_fixed:
            self.why_not_captured = self._try_to_capture()
            self._is_fixed = self.why_not_captured is None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._model.device

    def new_cache(self) -> BatchCache | FixedCache:
        """An empty one for `decode`."""
        return FixedCache() if self._is_fixed else BatchCache()

    def decode(
        self, token_ids: Sequence[int], cache: BatchCache | FixedCache, tables: Tables = NO_TABLE
    ) -> Tensor:
        """One step: each row's newest token id -> the logits [B, V] of the next one, which the
        next step may overwrite."""
        self._use(tables)
        cache.make_room()
        if isinstance(cache, FixedCache):
            cache.set_step(token_ids)
            logits = self._steps.take(cache, eagerly=self._is_observed()).logits[: len(cache)]
        else:
            ids = torch.tensor(token_ids, device=self.device).unsqueeze(1)
            logits = self._call(ids, cache, cache.step_inputs(self.device), 1)[:, -1]
        cache.advance()
        return logits

    def prefill(
        self, part: "PromptPart", cache: DynamicCache, all_logits: bool, tables: Tables = NO_TABLE
    ) -> Tensor:
        """A part of a group of prompts -> logits [G, T or 1, V]."""
        self._use(tables)
        inputs = {
            "attention_mask": part.mask.to(self.device),
            "position_ids": part.positions.to(self.device),
        }
        return self._call(part.ids.to(self.device), cache, inputs, int(not all_logits))

    def _use(self, tables: Tables) -> None:
        if self._has_tables:
            self._model.use_table(tables)

    def _is_observed(self) -> bool:
        entrance = getattr(self._model, "lookup_entrance", None)
        return entrance is not None and entrance.observe is not None

    @torch.inference_mode()
    def _try_to_capture(self) -> str | None:
        reason = why_not_fixed(self._model)
        if reason is not None:
            return f"The model has {reason}."
        prompts, cache = Prompts([[0]]), FixedCache()
        try:
            self.prefill(prompts.next_part(1), prompts.cache, all_logits=False)
            cache.join(prompts.cache, prompts.lengths)
            self.decode([0], cache)
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the model does what no graph can
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return None


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
