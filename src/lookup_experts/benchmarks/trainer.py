"""What the Trainer costs beyond the bare loop of the same model.

One process trains two copies of a model on the same sequences: `RecipeTrainer`, with the callbacks
of `mole train`, takes a step, then the bare loop (forward, backward, clipping, fused AdamW) takes
the same step while the Trainer waits. Each pair of steps gives one ratio.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from lookup_experts import console
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import TextWindows
from lookup_experts.benchmarks.timing import Advance, clock_of, median, pair_ratios, spread
from lookup_experts.benchmarks.train import Rows, TrainingCase
from lookup_experts.training.callbacks import LogAtMilestones, Record, RefuseNonFinite
from lookup_experts.training.history import History
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.trainer import RecipeTrainer

WARM_UP_STEPS = 2


def bench_trainer(
    case: TrainingCase,
    trained: Sequence[Rows],
    sizes: Sequence[int],
    windows: TextWindows,
    rounds: int,
    results: Results,
) -> None:
    """`mole bench train --trainer`: steps of each size in tokens, with each of `trained`."""
    for rows in trained:
        for size in sizes:
            with console.progress_bar(f"Trainer, {rows}, {size} tokens") as advance:
                sequences = size // case.context
                found = measure_overhead(case, rows, windows, sequences, rounds, advance)
            results.add(found)
    results.finish()


def measure_overhead(
    case: TrainingCase,
    rows: Rows | None,
    windows: TextWindows,
    sequences: int,
    rounds: int,
    advance: Advance,
) -> Result:
    """Steps of `sequences` windows each, with optimizer, in float32; `spread` is the 10th and 90th
    percentile of the ratio."""
    recipe = case.recipe(rows)
    training = replace(
        recipe.training,
        sequences_per_step=sequences,
        sequences_per_micro_batch=sequences,
        steps=rounds + WARM_UP_STEPS,
        precision="fp32",
        checkpoint_every=10**9,
    )
    recipe = replace(recipe, training=training)
    tokens = windows.take(sequences * training.num_steps, case.context).to(case.device)
    items: Any = [{"input_ids": row, "labels": row} for row in tokens.cpu()]
    batches = list(tokens.split(sequences))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        bare = _BareLoop(case.build(rows), batches, training, clock_of(case.device), advance)
        record = Record(History(run.history, 0), training)
        callbacks = [LogAtMilestones(), RefuseNonFinite(run), record, bare]
        RecipeTrainer(run, recipe, case.build(rows), items, None, callbacks).train()
    ratios = pair_ratios(bare.trainer_seconds, bare.seconds)
    return {
        "what": "train",
        "system": "trainer",
        "num_experts": None if rows is None else rows.num_experts,
        "form": None if rows is None or rows.form == "mole" else rows.form,
        "row_size": None if rows is None else rows.row_size,
        "tokens": sequences * case.context,
        "rounds": len(ratios),
        "seconds_per_step": median(bare.trainer_seconds),
        "bare_seconds_per_step": median(bare.seconds),
        "ratio_to_bare_loop": median(ratios),
        "spread": spread(ratios),
    }


class _BareLoop(TrainerCallback):
    """Takes each step after the Trainer has taken it, and times both."""

    def __init__(
        self,
        model: Any,
        batches: Sequence[torch.Tensor],
        training: Any,
        clock: Callable[[], float],
        advance: Advance,
    ) -> None:
        self.trainer_seconds: list[float] = []
        self.seconds: list[float] = []
        self._model = model
        self._batches = batches
        self._clip = training.clip
        self._clock, self._advance = clock, advance
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._marked_at = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._marked_at = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended_at = self._clock()
        step = state.global_step - 1
        self._step(self._batches[step])
        now = self._clock()
        if step >= WARM_UP_STEPS:
            self.trainer_seconds.append(ended_at - self._marked_at)
            self.seconds.append(now - ended_at)
            self._advance(step + 1, len(self._batches))
        self._marked_at = now

    def _step(self, batch: torch.Tensor) -> None:
        self._model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
