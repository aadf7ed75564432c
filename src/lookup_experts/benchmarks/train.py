"""Training steps: a dense model, and MoLE with its experts at the unique ids or at every position;
where gradients are accumulated, also with expert outputs shared by a step's micro batches.

All systems run in one process, one step each in turn, on the same windows of a real stream of
token ids. A step is forward and backward over one micro batch, without an optimizer: what AdamW
costs depends on the number of weights alone. Beside each measured ratio stands the same ratio in
FLOPs, with the unique ids counted on the very batches; and the peak of memory, of a process of its
own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lookup_experts import console
from lookup_experts.benchmarks.plots import picture
from lookup_experts.benchmarks.processes import high_water_mark, in_fresh_process
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import TextWindows
from lookup_experts.benchmarks.timing import (
    Advance,
    clock_of,
    interleave,
    median,
    pair_ratios,
    spread,
)
from lookup_experts.errors import UserError
from lookup_experts.model.gateless_llama import PAPER_VOCAB_SIZE, paper_config
from lookup_experts.model.per_position import PerPositionExperts
from lookup_experts.model.shared_outputs import shared_expert_outputs
from lookup_experts.training.costs import costs
from lookup_experts.training.models import build_model
from lookup_experts.training.recipe import Recipe
from lookup_experts.training.row_updates import static_rows

HEAD_CHUNK = 1024
"""Positions whose logits are in memory at a time; all of a large micro batch's would not fit."""
WARM_UP_TOKENS = 128
"""On a CPU."""

_ROWS = re.compile(r"(?:([1-9]\d*)|meki)(?:-r([1-9]\d*))?")


class Rows(NamedTuple):
    """What is trained beside a dense model."""

    num_experts: int
    """N of each layer."""
    form: str = "mole"
    row_size: int | None = None
    """r; None: the model's width."""

    @classmethod
    def parse(cls, word: str) -> "Rows":
        """From `4` for so many experts, `4-r192`, `meki` or `meki-r96`.

        Raises:
            UserError: another word.
        """
        found = _ROWS.fullmatch(word)
        if found is None:
            raise UserError(
                f"--experts takes numbers like 4,16, or narrow rows like 4-r192 and meki-r96; got "
                f"{word!r}."
            )
        row_size = int(found[2]) if found[2] else None
        return cls(int(found[1] or 1), "mole" if found[1] else "meki", row_size)

    def __str__(self) -> str:
        name = f"{self.num_experts} experts" if self.form == "mole" else self.form
        return name if self.row_size is None else f"{name}, rows of {self.row_size}"

    @property
    def recipe(self) -> dict[str, Any]:
        """The section of a recipe."""
        settings: dict[str, Any] = {"form": self.form, "row_size": self.row_size}
        if self.form == "mole":
            settings["num_experts"] = self.num_experts
        return {key: value for key, value in settings.items() if value is not None}


Key = tuple[str, Rows | None]
"""A system's name, and its rows; None for `dense`."""
MATMUL: Key = ("matmul", None)


def bench_train(
    case: "TrainingCase",
    trained: Sequence[Rows],
    sizes: Sequence[int],
    windows: TextWindows,
    rounds: int,
    accumulate: int,
    peak: bool,
    results: Results,
) -> None:
    """`mole bench train`: micro batches of each size in tokens, and beside dense each of `trained`.

    Args:
        accumulate: micro batches of a step; from 2 on, shared expert outputs are measured in place
            of experts at every position.
        peak: measure memory as well.
    """
    names = ("unique", "per_position") if accumulate == 1 else ("unique", "shared")
    keys: list[Key] = [("dense", None), *((name, rows) for rows in trained for name in names)]
    peaks: dict[Any, int] = {}
    if peak:  # first, while this process holds little
        measured = [(size, key) for size in sizes for key in keys]
        with console.progress_bar("Peak memory") as advance:
            for number, (size, key) in enumerate(measured):
                rows = size // case.context
                batches = [windows.take(rows, case.context + 1) for _ in range(accumulate)]
                peaks[size, key] = peak_bytes(case, key, batches)
                advance(number + 1, len(measured))
    systems = Systems(case, keys)
    for size in sizes:
        with console.progress_bar(f"{accumulate} x {size} tokens") as advance:
            found = measure_training(systems, windows, size, rounds, accumulate, advance)
        for key, result in zip(keys, found, strict=True):
            results.add(result | {"peak_bytes": peaks.get((size, key))})
    results.finish(draw)


# ------------------------------------------------------------------------------- what is trained


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

    def recipe(self, rows: Rows | None) -> Recipe:
        """Of the dense model, or with such rows."""
        model: dict[str, Any] = dict(self.sizes)
        if rows is not None:
            model["experts"] = rows.recipe
        training = {
            "context_length": self.context,
            "sequences_per_step": 1,
            "sequences_per_micro_batch": 1,
            "learning_rate": 6e-4,
            "steps": 1,
        }
        return Recipe.from_dict({"model": model, "training": training})

    def build(self, rows: Rows | None) -> Any:
        """Random weights; the gradients of static rows are sparse, as `RowAdamW` takes them."""
        model = build_model(self.recipe(rows), PAPER_VOCAB_SIZE)
        for static in static_rows(model):
            static.sparse = True
        return model.to(self.device, self.dtype).train()

    def flops(self, system: str, rows: Rows | None, ratio: float) -> float:
        """Per token, forward and backward, with `ratio` tokens per unique id."""
        found = costs(self.recipe(rows), PAPER_VOCAB_SIZE, 1, ratio).flops_per_token
        experts = found.training_experts
        if system == "per_position":
            experts = found.training_experts_per_position
        head = 6 * self.sizes["hidden_size"] * PAPER_VOCAB_SIZE
        return found.training_backbone + experts - (0 if self.head else head)


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
        keys: what to measure; systems with the same rows share a model.
    """

    def __init__(self, case: TrainingCase, keys: Sequence[Key]) -> None:
        self.case = case
        self.keys = list(keys)
        self._models = {rows: case.build(rows) for _, rows in keys}
        self._sources = {
            rows: (model.expert_source, PerPositionExperts())
            for rows, model in self._models.items()
            if rows is not None
        }

    def step(self, key: Key, batches: Sequence[Tensor]) -> None:
        """Forward and backward over micro batches, int64 [B, context + 1] each."""
        system, rows = key
        model = self._models[rows]
        if rows is not None:
            unique, every = self._sources[rows]
            model.set_expert_source(every if system == "per_position" else unique)
        if system == "shared":
            with shared_expert_outputs(model, [batch[:, :-1] for batch in batches]):
                self._accumulate(model, batches)
        else:
            self._accumulate(model, batches)
        model.zero_grad()

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


# ------------------------------------------------------------------------------------ steps in turn


def measure_training(
    systems: Systems,
    windows: TextWindows,
    tokens: int,
    rounds: int,
    accumulate: int,
    advance: Advance,
) -> list[Result]:
    """Every system on micro batches of so many tokens, in turn.

    Returns:
        A result for each, whose `tokens` are of a micro batch and `unique` the ids that experts
        were evaluated on for one step, the mean. `flop_utilisation` is of what a plain product of
        matrices reached in the same rounds, `spread` the 10th and 90th percentile of the ratio to
        dense. `speedup_over_unique` is of shared expert outputs. What doesn't apply is None.
    """
    case = systems.case
    warm_up = _warm_up_batch(case, windows, tokens)
    for key in systems.keys:
        systems.step(key, [warm_up])
    seconds: dict[Key, list[float]] = {key: [] for key in [*systems.keys, MATMUL]}
    in_step, in_micro_batches = [], []
    product = _Product(case)
    for number in range(rounds):
        batches = [
            windows.take(tokens // case.context, case.context + 1).to(case.device)
            for _ in range(accumulate)
        ]
        ids = [batch[:, :-1].flatten() for batch in batches]
        in_step.append(len(torch.cat(ids).unique()))
        in_micro_batches.append(sum(len(part.unique()) for part in ids))
        steps: dict[Key, Callable[[], None]] = {
            key: partial(systems.step, key, batches) for key in systems.keys
        }
        steps[MATMUL] = product
        for key, taken in interleave(steps, 1, number, clock_of(case.device)).items():
            seconds[key] += taken
        advance(number + 1, rounds)
    peak = product.flops / median(seconds[MATMUL])
    step_tokens = tokens * accumulate
    unique = {
        key: fmean(in_step if key[0] == "shared" else in_micro_batches) for key in systems.keys
    }
    flops = {key: case.flops(*key, step_tokens / unique[key]) for key in systems.keys}

    def result_of(key: Key) -> Result:
        system, rows = key
        taken, ratios = median(seconds[key]), pair_ratios(seconds[key], seconds["dense", None])

        def over(other: str, *systems: str) -> tuple[float | None, float | None]:
            """How many times as fast as another system, measured and in FLOPs."""
            if system not in systems or (other, rows) not in flops:
                return None, None
            measured = median(pair_ratios(seconds[other, rows], seconds[key]))
            return measured, flops[other, rows] / flops[key]

        speedup_over_per_position, flop_speedup = over("per_position", "unique", "shared")
        speedup_over_unique, flop_speedup_over_unique = over("unique", "shared")
        return {
            "what": "train",
            "system": system,
            "num_experts": None if rows is None else rows.num_experts,
            "form": None if rows is None or rows.form == "mole" else rows.form,
            "row_size": None if rows is None else rows.row_size,
            "tokens": tokens,
            "accumulate": accumulate,
            "unique": unique[key],
            "rounds": rounds,
            "seconds_per_step": taken,
            "tokens_per_second": step_tokens / taken,
            "flop_utilisation": flops[key] * step_tokens / taken / peak,
            "ratio_to_dense": median(ratios),
            "flop_ratio_to_dense": flops[key] / flops["dense", None],
            "spread": spread(ratios),
            "speedup_over_per_position": speedup_over_per_position,
            "flop_speedup": flop_speedup,
            "speedup_over_unique": speedup_over_unique,
            "flop_speedup_over_unique": flop_speedup_over_unique,
        }

    return [result_of(key) for key in systems.keys]


def _warm_up_batch(case: TrainingCase, windows: TextWindows, tokens: int) -> Tensor:
    """What the systems see before the first step that counts: a little text; on a GPU, where memory
    is taken and kernels are chosen for the sizes of a step, a whole micro batch."""
    if case.device == "cpu":
        batch = windows.take(1, min(case.context, WARM_UP_TOKENS) + 1)
    else:
        batch = windows.take(tokens // case.context, case.context + 1)
    return batch.to(case.device)


class _Product:
    """Plain products of matrices of the shape of an FFN: what utilisation is measured by."""

    REPEATS, ROWS = 16, 2048

    def __init__(self, case: TrainingCase) -> None:
        hidden, ffn = case.sizes["hidden_size"], case.sizes["ffn_size"]
        options: Any = {"dtype": case.dtype, "device": case.device}
        self._inputs = torch.randn(self.ROWS, hidden, **options)
        self._weight = torch.randn(ffn, hidden, **options)
        self.flops = 2.0 * self.REPEATS * self.ROWS * hidden * ffn

    def __call__(self) -> None:
        for _ in range(self.REPEATS):
            F.linear(self._inputs, self._weight)


# ------------------------------------------------------------------------------------- memory


def peak_bytes(case: TrainingCase, key: Key, batches: Sequence[Tensor]) -> int:
    """The most that one step over micro batches [B, context + 1] takes, in a process of its own.

    On a CPU the whole process counts, programs included, by the kernel's own high-water mark; on a
    GPU what torch allocated.

    Raises:
        UserError: there is not enough memory.
    """
    system, rows = key
    experts = "" if rows is None else f", {rows}"
    what = f"Peak memory of {system}{experts}, {sum(b[:, 1:].numel() for b in batches):,} tokens,"
    return in_fresh_process(what, _peak_of_a_step, case, key, list(batches))


def _peak_of_a_step(case: TrainingCase, key: Key, batches: list[Tensor]) -> int:
    Systems(case, [key]).step(key, [batch.to(case.device) for batch in batches])
    if case.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return high_water_mark()


# ------------------------------------------------------------------------------------- picture

NAMES = {
    "dense": "dense",
    "unique": "{}, unique ids",
    "per_position": "{}, every position",
    "shared": "{}, shared by micro batches",
}
COLORS = ("#334e68", "#b44d12", "#d99a6c", "#2f7d5d", "#8cbf9f", "#7a4d9c", "#b79bd0")


def draw(results: list[Result], path: Path) -> None:
    """Lines of time over dense, against the tokens of a micro batch; dotted, what FLOPs say."""
    with picture(path, 6, 4) as axes:
        keys = dict.fromkeys((result["system"], _rows_of(result)) for result in results)
        for (system, rows), color in zip(keys, COLORS, strict=False):
            found = [r for r in results if (r["system"], _rows_of(r)) == (system, rows)]
            tokens = [result["tokens"] for result in found]
            label = NAMES[system].format(rows)
            axes.plot(tokens, [r["ratio_to_dense"] for r in found], "o-", color=color, label=label)
            axes.plot(tokens, [r["flop_ratio_to_dense"] for r in found], ":", color=color)
        ticks = sorted({result["tokens"] for result in results})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens per micro batch")
        axes.set_ylabel("time / dense (dotted: FLOPs / dense)")
        axes.legend(fontsize="small")


def _rows_of(result: Result) -> Rows | None:
    if "num_experts" not in result:
        return None
    return Rows(result["num_experts"], result.get("form", "mole"), result.get("row_size"))
