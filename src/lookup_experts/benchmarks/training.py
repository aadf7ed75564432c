"""Training steps: a dense model, and MoLE with its experts at the unique ids or at every position.

All systems run in one process, one step each in turn, on the same windows of a real stream of
token ids. A step is forward and backward over one micro batch, without an optimizer: what AdamW
costs depends on the number of weights alone. Beside each measured ratio stands the same ratio in
FLOPs, with the unique ids counted on the very batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lookup_experts.benchmarks.speed import TextWindows
from lookup_experts.benchmarks.timing import interleave, median, pair_ratios, spread
from lookup_experts.model.gateless_llama import PAPER_VOCAB_SIZE, paper_config
from lookup_experts.model.per_position import PerPositionExperts
from lookup_experts.model.shared_outputs import shared_expert_outputs
from lookup_experts.training.costs import costs
from lookup_experts.training.models import build_model
from lookup_experts.training.recipe import Recipe

HEAD_CHUNK = 1024
"""Positions whose logits are in memory at a time; all of a large micro batch's would not fit."""
WARM_UP_TOKENS = 128

Advance = Callable[[int, int], None]
Key = tuple[str, int | None]


@dataclass(frozen=True)
class TrainingCase:
    """A model to train."""

    sizes: dict[str, int]
    """Of the recipe's model: hidden_size, num_layers, num_heads, ffn_size."""
    context: int = 2048
    """Tokens of a sequence."""
    head: bool = True
    """With the output head and its loss; without, the blocks alone, from a given gradient."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def recipe(self, num_experts: int | None) -> Recipe:
        """Of the dense model, or of MoLE with so many experts per layer."""
        model: dict[str, Any] = dict(self.sizes)
        if num_experts is not None:
            model["experts"] = {"num_experts": num_experts}
        training = {
            "context_length": self.context,
            "sequences_per_step": 1,
            "sequences_per_micro_batch": 1,
            "learning_rate": 6e-4,
            "steps": 1,
        }
        return Recipe.from_dict({"model": model, "training": training})

    def build(self, num_experts: int | None) -> Any:
        """Random weights."""
        model = build_model(self.recipe(num_experts), PAPER_VOCAB_SIZE)
        return model.to(self.device, self.dtype).train()

    def flops(self, system: str, num_experts: int | None, ratio: float) -> float:
        """Per token, forward and backward, with `ratio` tokens per unique id."""
        found = costs(self.recipe(num_experts), PAPER_VOCAB_SIZE, 1, ratio).flops_per_token
        experts = found.training_experts
        if system == "per_position":
            experts = found.training_experts_per_position
        head = 6 * self.sizes["hidden_size"] * PAPER_VOCAB_SIZE
        return found.training_backbone + experts - (0 if self.head else head)


@dataclass(frozen=True)
class TrainingResult:
    """One system on micro batches of one size."""

    what: str
    system: str
    """`dense`, `unique`, `per_position`; where gradients are accumulated, `shared` too."""
    num_experts: int | None
    tokens: int
    """Of a micro batch."""
    accumulate: int
    """Micro batches of a step."""
    unique: float
    """Unique ids that experts were evaluated on for one step, the mean."""
    rounds: int
    seconds_per_step: float
    tokens_per_second: float
    flop_utilisation: float
    """FLOPs per second, of what a plain product of matrices reached in the same rounds."""
    ratio_to_dense: float
    flop_ratio_to_dense: float
    spread: tuple[float, float]
    """10th and 90th percentile of the ratio to dense."""
    speedup_over_per_position: float | None = None
    flop_speedup: float | None = None
    speedup_over_unique: float | None = None
    """Of shared expert outputs."""
    flop_speedup_over_unique: float | None = None
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what doesn't apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def case_of_shape(shape: str, layers: int | None = None, **options: Any) -> TrainingCase:
    """The paper's model of a shape, cut to so many layers; `options` are `TrainingCase`'s."""
    config = paper_config(shape)
    sizes = {
        "hidden_size": config.hidden_size,
        "num_layers": layers or config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "ffn_size": config.intermediate_size,
    }
    return TrainingCase(sizes, **options)


class Systems:
    """The models of a case, and a step of each system.

    Args:
        case: sizes.
        keys: what to measure: a system's name and its experts per layer, None for `dense`. Systems
            with as many experts share a model.
    """

    def __init__(self, case: TrainingCase, keys: Sequence[Key]) -> None:
        self.case = case
        self.keys = list(keys)
        self._models = {count: case.build(count) for _, count in keys}
        self._sources = {
            count: (model.expert_source, PerPositionExperts())
            for count, model in self._models.items()
            if count is not None
        }

    def step(self, key: Key, batches: Sequence[Tensor]) -> None:
        """Forward and backward over micro batches, int64 [B, context + 1] each."""
        system, count = key
        model = self._models[count]
        if count is not None:
            unique, every = self._sources[count]
            model.set_expert_source(every if system == "per_position" else unique)
        if system == "shared":
            with shared_expert_outputs(model, [batch[:, :-1] for batch in batches]):
                self._accumulate(model, batches)
        else:
            self._accumulate(model, batches)
        model.zero_grad()
        if self.case.device != "cpu":
            torch.accelerator.synchronize()

    def _accumulate(self, model: Any, batches: Sequence[Tensor]) -> None:
        for batch in batches:
            forward_and_backward(model, batch, self.case.head)


def forward_and_backward(model: Any, batch: Tensor, head: bool) -> None:
    """Gradients of the mean loss over a batch [B, T + 1]; the head in chunks of positions."""
    hidden = model.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
    if not head:
        hidden.backward(torch.full_like(hidden, 1e-3))
        return
    leaf = hidden.detach().requires_grad_()
    labels = batch[:, 1:].flatten().split(HEAD_CHUNK)
    for part, targets in zip(leaf.flatten(0, 1).split(HEAD_CHUNK), labels, strict=True):
        logits = model.lm_head(part)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / hidden[..., 0].numel()
        loss.backward()
    hidden.backward(leaf.grad)


def measure_training(
    systems: Systems,
    windows: TextWindows,
    tokens: int,
    rounds: int,
    accumulate: int,
    advance: Advance,
) -> list[TrainingResult]:
    """Every system on micro batches of so many tokens, in turn."""
    case = systems.case
    for key in systems.keys:
        systems.step(key, [windows.take(1, min(case.context, WARM_UP_TOKENS) + 1).to(case.device)])
    seconds: dict[Any, list[float]] = {}
    uniques: dict[bool, list[int]] = {True: [], False: []}
    for number in range(rounds):
        batches = [
            windows.take(tokens // case.context, case.context + 1).to(case.device)
            for _ in range(accumulate)
        ]
        ids = [batch[:, :-1].flatten() for batch in batches]
        uniques[True].append(len(torch.cat(ids).unique()))
        uniques[False].append(sum(len(part.unique()) for part in ids))
        steps: dict[Key, Callable[[], None]] = {
            key: partial(systems.step, key, batches) for key in systems.keys
        }
        steps["matmul", None] = _Product(case)
        for key, found in _rotated(steps, number).items():
            seconds.setdefault(key, []).extend(found)
        advance(number + 1, rounds)
    return _results(systems, seconds, uniques, tokens, accumulate)


def _rotated(steps: dict[Key, Callable[[], None]], number: int) -> dict[Key, list[float]]:
    """Each step once; every round begins with another."""
    keys = list(steps)
    first = number % len(keys)
    named = {str(key): steps[key] for key in keys[first:] + keys[:first]}
    seconds = interleave(named, 1)
    return {key: seconds[str(key)] for key in keys}


class _Product:
    """Plain products of matrices of the shape of an FFN: what utilisation is measured by."""

    REPEATS = 16

    def __init__(self, case: TrainingCase) -> None:
        model = case.recipe(None).model
        self._inputs = torch.randn(2048, model.hidden_size, dtype=case.dtype, device=case.device)
        size = (model.ffn_size, model.hidden_size)
        self._weight = torch.randn(size, dtype=case.dtype, device=case.device)
        self._device = case.device

    def __call__(self) -> None:
        for _ in range(self.REPEATS):
            F.linear(self._inputs, self._weight)
        if self._device != "cpu":
            torch.accelerator.synchronize()

    @classmethod
    def flops(cls, case: TrainingCase) -> float:
        model = case.recipe(None).model
        return 2.0 * cls.REPEATS * 2048 * model.hidden_size * model.ffn_size


def _results(
    systems: Systems,
    seconds: dict[Any, list[float]],
    uniques: dict[bool, list[int]],
    tokens: int,
    accumulate: int,
) -> list[TrainingResult]:
    case, step_tokens = systems.case, tokens * accumulate
    peak = _Product.flops(case) / median(seconds["matmul", None])
    dense, results = seconds["dense", None], []

    def flops_of(key: Key) -> float:
        system, count = key
        return case.flops(system, count, step_tokens / _mean(uniques[system == "shared"]))

    def against(key: Any, system: str) -> tuple[float | None, float | None]:
        """How many times as fast as another system, measured and in FLOPs."""
        other = (system, key[1])
        if key[0] in ("dense", system) or other not in seconds:
            return None, None
        measured = median(pair_ratios(seconds[other], seconds[key]))
        return measured, flops_of(other) / flops_of(key)

    for key in systems.keys:
        taken, flops = median(seconds[key]), flops_of(key)
        ratios = pair_ratios(seconds[key], dense)
        over_position, over_unique = against(key, "per_position"), against(key, "unique")
        if key[0] == "per_position":
            over_unique = (None, None)
        results.append(
            TrainingResult(
                what="train",
                system=key[0],
                num_experts=key[1],
                tokens=tokens,
                accumulate=accumulate,
                unique=_mean(uniques[key[0] == "shared"]),
                rounds=len(dense),
                seconds_per_step=taken,
                tokens_per_second=step_tokens / taken,
                flop_utilisation=flops * step_tokens / taken / peak,
                ratio_to_dense=median(ratios),
                flop_ratio_to_dense=flops / flops_of(("dense", None)),
                spread=spread(ratios),
                speedup_over_per_position=over_position[0],
                flop_speedup=over_position[1],
                speedup_over_unique=over_unique[0],
                flop_speedup_over_unique=over_unique[1],
            )
        )
    return results


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
