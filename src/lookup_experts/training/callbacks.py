"""What happens beside the Trainer's steps: stopping, guarding, recording, showing."""

import math
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lookup_experts import console
from lookup_experts.errors import UserError
from lookup_experts.training.checkpoints import last_checkpoint
from lookup_experts.training.history import History, Stopwatch, tokens_per_second
from lookup_experts.training.progress import Display
from lookup_experts.training.recipe import TrainingRecipe
from lookup_experts.training.run_folder import RunFolder

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What must be finite, by the names of the Trainer's logs.
_GUARDED = {
    "loss": "training loss",
    "grad_norm": "norm of the gradient",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
}

AUXILIARY = ("load_balance_loss", "z_loss")
"""A router's losses, in the logs of a model that has them."""


class StopOnSignal(TrainerCallback):
    """Within its context, SIGINT and SIGTERM stop training after the step, with a checkpoint.

    A second signal does what it always does.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread have handlers; elsewhere signals are the program's.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
        console.say("Stopping after this step, with a checkpoint. A second time stops at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._all_agree(args, state.global_step):
            control.should_save = control.should_training_stop = True

    def _all_agree(self, args: TrainingArguments, step: int) -> bool:
        """Processes must stop at the same step, and not every one may have got the signal yet."""
        if args.world_size == 1:
            return self.requested
        if step % args.logging_steps:  # where they wait for each other anyway
            return False
        requested = torch.tensor(float(self.requested), device=args.device)
        torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX)
        self.requested = bool(requested)
        return self.requested


class TakeOwnIntervals(TrainerCallback):
    """Logs, validates and saves as often as the recipe says now, not as its checkpoint said."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class LogAtMilestones(TrainerCallback):
    """Logs before every validation and checkpoint.

    So a loss that is not finite is noticed before a checkpoint holds its weights, and the means in
    the history begin anew at a checkpoint, whether the run was taken up there or not.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_evaluate:
            control.should_log = True


class RefuseNonFinite(TrainerCallback):
    """Ends training with a `UserError` once a loss or the gradient is not a finite number.

    Looks where the Trainer logs, since looking waits for the device. A loss is the sum over all
    steps since the log before, so nothing is missed between.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._finite_at = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        for key, words in _GUARDED.items():
            if key in logs and not math.isfinite(logs[key]):
                raise UserError(self._message(words, logs[key], state.global_step))
        self._finite_at = state.global_step

    def _message(self, words: str, value: float, step: int) -> str:
        if step == 0:
            return f"The {words} is {value} before the first step; the backbone is not sound."
        last = last_checkpoint(self._run.checkpoints)
        kept = f"The last good checkpoint, {last}, is kept" if last else "There is no checkpoint"
        return (
            f"The {words} is {value} at step {step}; at step {self._finite_at} all was finite. "
            f"{kept}. Lower training.learning_rate or training.clip, in another --out."
        )


class Record(TrainerCallback):
    """Writes the history and keeps the clock."""

    def __init__(self, history: History, recipe: TrainingRecipe) -> None:
        self._history = history
        self._tokens_per_step = recipe.tokens_per_step
        self.stopwatch = Stopwatch(history.seconds)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopwatch.skip()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopwatch.lap()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopwatch.skip()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" in logs:
            self.stopwatch.lap()  # a GPU's steps have ended only now
            auxiliary = {key: logs[key] for key in AUXILIARY if key in logs}
            self._append(
                state.global_step, loss=logs["loss"], lr=logs["learning_rate"], **auxiliary
            )
        elif "eval_loss" in logs:
            self.stopwatch.skip()
            self._append(
                state.global_step,
                validation_loss=logs["eval_loss"],
                validation_perplexity=logs["eval_perplexity"],
            )

    def _append(self, step: int, **values: float) -> None:
        seconds = round(self.stopwatch.seconds, 3)
        tokens = step * self._tokens_per_step
        self._history.append({"step": step, "tokens": tokens, "seconds": seconds, **values})


class ShowProgress(TrainerCallback):
    """Tells a display what happens."""

    def __init__(self, display: Display, record: Record, recipe: TrainingRecipe) -> None:
        self._display = display
        self._stopwatch = record.stopwatch
        self._recipe = recipe
        self._loss = "-"
        self._began_at = (0, 0.0)  # step, seconds
        self._batches_validated = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began_at = (state.global_step, self._stopwatch.seconds)
        if state.global_step:
            self._display.message(f"Going on after step {state.global_step:,}.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show(state.global_step)

    def _show(self, step: int) -> None:
        rate = self._rate(step)
        tokens_left = (self._recipe.num_steps - step) * self._recipe.tokens_per_step
        status = f"loss {self._loss}  {rate:,.0f} tokens/s"
        self._display.update(step, status, tokens_left / rate if rate else None)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._batches_validated += 1
        num_batches = len(eval_dataloader)
        status = f"validation {self._batches_validated}/{num_batches}"
        self._display.update(state.global_step, status, None)
        self._batches_validated %= num_batches

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"
            self._show(state.global_step)
        elif "eval_loss" in logs:
            whose = "" if state.global_step else " of the backbone as it comes"
            self._display.message(
                f"Step {state.global_step:,}: validation loss{whose} {logs['eval_loss']:.4f}, "
                f"perplexity {logs['eval_perplexity']:.2f}"
            )
            if state.global_step:  # in the place of how far the validation was
                self._show(state.global_step)

    def _rate(self, step: int) -> float:
        """Tokens per second since training began or was taken up."""
        first_step, first_seconds = self._began_at
        num_tokens = (step - first_step) * self._recipe.tokens_per_step
        return tokens_per_second(num_tokens, self._stopwatch.seconds - first_seconds)
