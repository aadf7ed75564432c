"""Milliseconds per token while decoding, of all four systems, step by step in turn.

Every system is fed the same held-out text instead of what it would say itself, so that all of
them see the same tokens, as often new ones as real text has them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookup_experts.benchmarks.demo.systems import SYSTEMS, load_system
from lookup_experts.benchmarks.timing import interleave, median, pair_ratios, spread
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.table.reader import TableExperts
from lookup_experts.training.data import TokenShards

BASELINE = "dense"
PROMPT_TOKENS = 16
WARM_UP_STEPS = 8
ROUNDS_BETWEEN_NEWS = 8


class Decoding:
    """Decoding steps over a passage: each call feeds the next token and takes the likeliest one.

    Args:
        model: any causal LM of transformers.
        passage: token ids [T]; T - `PROMPT_TOKENS` steps can be done.
    """

    def __init__(self, model: Any, passage: Tensor) -> None:
        self._model = model
        self._tokens = iter(passage[PROMPT_TOKENS:].view(-1, 1, 1))
        with torch.inference_mode():
            prompt = passage[None, :PROMPT_TOKENS]
            self._cache = {cache_argument(model): cache_of(model(prompt, use_cache=True))}

    def __call__(self) -> None:
        with torch.inference_mode():
            token = next(self._tokens)
            logits = self._model(token, use_cache=True, **self._cache).logits
            int(logits[0, -1].argmax())


def measure_decoding(
    demo: Path,
    data: Path,
    num_passages: int,
    context_length: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Time decoding over passages of held-out text.

    Args:
        demo: the demo's folder with its models.
        data: the token shards.
        num_passages: how many, each `context_length` tokens long.
        context_length: at most that of the models.
        progress: called with (rounds done, rounds in all).

    Returns:
        For every system `ms_per_token`, `steps`, `ratio_to_dense` and `ratio_spread`: the median
        and the 10th and 90th percentile over pairs of neighbouring steps. For those with a table
        also `backend`, `bytes_per_record` (read past the table in memory) and `wait_ms_per_token`.
    """
    models = {system.name: load_system(system, demo) for system in SYSTEMS}
    shards = TokenShards(data, "validation")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rounds = context_length - PROMPT_TOKENS - WARM_UP_STEPS
    for number in range(num_passages):
        start = number * context_length % (shards.num_tokens - context_length + 1)
        passage = torch.from_numpy(shards.window(start, context_length).astype("int64"))
        for done, times in _time_passage(models, passage):
            for name, values in times.items():
                seconds[name] += values
            progress(number * rounds + done, num_passages * rounds)
    return {
        name: _speed(values, seconds[BASELINE]) | _reading(models[name])
        for name, values in seconds.items()
    }


def _time_passage(
    models: dict[str, Any], passage: Tensor
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Decode a passage [T], a few rounds at a time: rounds done, and the seconds of these steps."""
    steps = {name: Decoding(model, passage) for name, model in models.items()}
    interleave(steps, WARM_UP_STEPS)
    left = len(passage) - PROMPT_TOKENS - WARM_UP_STEPS
    done = 0
    while done < left:
        rounds = min(ROUNDS_BETWEEN_NEWS, left - done)
        done += rounds
        yield done, interleave(steps, rounds)


def _speed(seconds: list[float], baseline: list[float]) -> dict[str, Any]:
    ratios = pair_ratios(seconds, baseline)
    return {
        "ms_per_token": median(seconds) * 1000,
        "steps": len(seconds),
        "ratio_to_dense": median(ratios),
        "ratio_spread": list(spread(ratios)),
    }


def _reading(model: Any) -> dict[str, Any]:
    """What a table was asked for; nothing where there is none. Prompts are counted too."""
    reader = getattr(model, "expert_source", None)
    if not isinstance(reader, TableExperts):
        return {}
    statistics = reader.stats()
    reader.close()
    return {
        "backend": statistics.backend,
        "bytes_per_record": statistics.bytes_read / statistics.ids_unique,
        "wait_ms_per_token": statistics.wait_seconds / statistics.batches * 1000,
    }
