"""A causal LM's decoding steps, which a GPU captures once as a CUDA graph and then replays.

A captured step is everything from the token ids to the next ones: embedding, blocks, logits and the
chosen token, which is written where the next step takes its ids from. So the host asks for a
step in microseconds, and may ask for the next before it knows what came of the last. Without CUDA
the same operations run one by one, with the same results.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookup_experts.errors import UserError
from lookup_experts.generation.fixed_cache import FixedCache
from lookup_experts.generation.sampling import likeliest
from lookup_experts.model.cache_names import cache_argument
from lookup_experts.table.additions import as_captured

WARM_UP_RUNS = 3
"""Before a capture: libraries choose their kernels and take their memory in the first ones."""
STEPS_AHEAD = 2
"""That the host asks for before it waits for a token."""


class ModelCall:
    """Calls a causal LM of transformers with those of the inputs that it takes.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        self._cache_argument = cache_argument(model)

    def __call__(
        self, ids: Tensor, cache: Any, inputs: dict[str, Tensor], logits_to_keep: int
    ) -> Tensor:
        """Token ids [B, T] -> logits [B, T or fewer, V]; 0 keeps those of all positions."""
        taken: dict[str, Any] = {
            name: value for name, value in inputs.items() if name in self._takes
        }
        if "logits_to_keep" in self._takes:
            taken["logits_to_keep"] = logits_to_keep
        taken[self._cache_argument] = cache
        logits: Tensor = self._model(input_ids=ids, use_cache=True, **taken).logits
        return logits


class Step(NamedTuple):
    """What came of a step, in tensors that the next step of the same size overwrites."""

    logits: Tensor
    """[rows, V]"""
    chosen: Tensor
    """int64 [rows]"""


class DecodingSteps:
    """Takes a model's steps, captured where that can be.

    Args:
        model: a causal LM, in evaluation mode, that `why_not_fixed` says nothing against.
        choose: logits [rows, V] -> token ids int64 [rows], see `Sampling.choose`.
    """

    def __init__(self, model: Any, choose: Callable[[Tensor], Tensor] = likeliest) -> None:
        self._call = ModelCall(model)
        self._choose = choose
        self._device: torch.device = model.device
        self._captures = self._device.type == "cuda"

    def take(self, cache: FixedCache, eagerly: bool = False) -> Step:
        """One step of the cache's window, whose ids and lengths are set; both are then those of
        the next step, if that takes the chosen tokens.

        Args:
            cache: of the rows.
            eagerly: one operation after the other: where somebody watches from within.
        """
        run = partial(self._run, cache)
        if eagerly or not self._captures:
            return run()
        size = (cache.window.rows, cache.window.columns)
        if size not in cache.captured:
            with torch.cuda.device(self._device):
                cache.captured[size] = _capture(run, cache)
        graph, step = cache.captured[size]
        graph.replay()
        result: Step = step
        return result

    def _run(self, cache: FixedCache) -> Step:
        window = cache.window
        ids = window.ids.unsqueeze(1)
        logits = self._call(ids, cache, cache.step_inputs(), logits_to_keep=1)[:, -1]
        chosen = self._choose(logits)
        window.ids.copy_(chosen)
        window.lengths.add_(1)
        return Step(logits, chosen)


def _capture(run: Callable[[], Step], cache: FixedCache) -> tuple[Any, Step]:
    """A graph of `run`, a step over the cache, and what it gives; the window's numbers, which it
    changes, are left as they were.

    The runs before it write the same columns as the step that is about to be taken.
    """
    numbers = cache.window.numbers
    before = numbers.clone()
    current = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside), as_captured():
        for _ in range(WARM_UP_RUNS):
            run()
            numbers.copy_(before)
    current.wait_stream(aside)
    # Graphs share their memory, since only one runs at a time; but not with graphs that are gone,
    # whose pool torch takes for dead.
    living = [graph for graph, _ in cache.captured.values()]
    pool = living[0].pool() if living else None
    graph = torch.cuda.CUDAGraph()
    try:
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode), as_captured():
            step = run()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own in its place
    return graph, step


def why_not_fixed(model: Any) -> str | None:
    """What a model has that steps over a `FixedCache` can't do, as the end of "it has ..."; None
    where nothing is against it."""
    config = model.config.get_text_config(decoder=True)
    if any(DynamicCache(config=model.config).is_sliding):
        return "attention to windows of past tokens"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "attention to windows of past tokens"
    settings = getattr(model, "lookup_settings", None)
    if settings is not None and settings.form == "experts":
        return "experts in training form, whose rows are computed for each batch anew"
    if hasattr(model, "use_table"):
        return "several tables, and each text its own"
    return None


class Decoding:
    """Decoding of a batch whose sequences begin together, token by token.

    A record that can't be read becomes numbers that are none in its own sequence; the next `begin`
    raises the `TableError`.

    Args:
        model: a causal LM, in evaluation mode.
        most_tokens: of the longest sequence, prompt included.
        choose: see `DecodingSteps`; greedy, if not given.

    Raises:
        UserError: the model's steps can't be captured.
    """

    def __init__(
        self,
        model: Any,
        most_tokens: int,
        choose: Callable[[Tensor], Tensor] = likeliest,
    ) -> None:
        reason = why_not_fixed(model)
        if reason is not None:
            raise UserError(f"Its steps can't be captured: this model has {reason}.")
        self._steps, self._call = DecodingSteps(model, choose), ModelCall(model)
        self._choose = choose
        self._most_tokens = most_tokens
        self._cache = FixedCache()

    @torch.inference_mode()
    def begin(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Put a batch of prompts through the model, eagerly; what was decoded before is forgotten.

        Args:
            ids: [B, T] int64, on the model's device; shorter prompts are padded on the left.
            mask: [B, T] int64, 0 where padding stands; None: nowhere.

        Raises:
            UserError: a prompt has more tokens than there is room for.
        """
        if mask is None:
            mask = torch.ones_like(ids)
        lengths: list[int] = mask.sum(1).tolist()
        self._check_room(max(lengths))
        prompts = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": positions}
        logits = self._call(ids, prompts, inputs, logits_to_keep=1)[:, -1]
        self._cache.lengths.clear()
        self._cache.join(prompts, lengths)
        self._cache.make_room()
        self._cache.set_step(self._choose(logits).tolist())

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> None:
        """Let the next step take these tokens, int64 [B] on the device, not the chosen ones."""
        self._next_ids.copy_(ids)

    @torch.inference_mode()
    def step(self) -> None:
        """Ask for the next tokens; on a GPU the host doesn't wait for them.

        Raises:
            UserError: the sequences are as long as they may be.
        """
        self._check_room(max(self._cache.lengths) + 1)
        self._cache.make_room()
        self._steps.take(self._cache)
        self._cache.advance()

    def tokens(self, number: int) -> Iterator[Tensor]:
        """The next `number` tokens of each sequence, int64 [B] on the host, one after the other;
        raises as `step`."""
        under_way: deque[_Arrival] = deque()
        for place in range(number):
            if place:
                self.step()
            under_way.append(_Arrival(self._next_ids))
            if len(under_way) > STEPS_AHEAD:
                yield under_way.popleft().wait()
        while under_way:
            yield under_way.popleft().wait()

    @property
    def _next_ids(self) -> Tensor:
        return self._cache.window.ids[: len(self._cache)]

    def _check_room(self, tokens: int) -> None:
        if tokens > self._most_tokens:
            raise UserError(
                f"There is room for {self._most_tokens} tokens of each sequence, and one has "
                f"{tokens}. Give a larger number, or begin with shorter prompts."
            )


class _Arrival:
    """Numbers on their way from the device to page-locked memory."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        if not numbers.is_cuda:
            self._host = numbers.clone()
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> Tensor:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
