"""Quality at the scale of a GPU: systems trained on equal tokens within a limit of time.

`mole bench quality` gives every run a process, checkpoints and a table of its own, and compares
seeds. Here a few minutes of one device are to be made the most of: all systems train in this
process, one after the other, and nothing is kept of them but what was measured. A few steps of each
tell how fast it is; from that follow the tokens that all of them can be given. Recipes, data, model
and Trainer are those of `mole train`.
"""

import copy
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from lookup_experts import console
from lookup_experts.benchmarks.quality import System, draw_curves, require_dense
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.timing import clock_of
from lookup_experts.errors import UserError
from lookup_experts.evaluation.recall import measure_recall, word_ids
from lookup_experts.training.callbacks import LogAtMilestones, Record, RefuseNonFinite
from lookup_experts.training.costs import costs
from lookup_experts.training.data import TokenShards
from lookup_experts.training.documents import first_line
from lookup_experts.training.history import History
from lookup_experts.training.models import build_model, count_parameters, with_vocabulary
from lookup_experts.training.prepare import TOKENIZER_NAME
from lookup_experts.training.recipe import Recipe, TrainingRecipe
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.sources import TrainingData
from lookup_experts.training.tokenizer import load_tokenizer
from lookup_experts.training.trainer import RecipeTrainer

DEFAULT_SYSTEMS = ("dense", "mole-4e", "meki:row_size=128", "moe-10e")
"""What matters most first, should time run out."""
VALIDATE_EVERY = 500_000
"""Tokens between two points of a curve."""
MOST_PASSES = 4
"""Over the training text; what is read more often teaches little (arXiv 2305.16264)."""
WARM_UP_STEPS, TIMED_STEPS = 4, 8
"""Of what tells how fast a system is."""
SECONDS_BESIDE = 3.0
"""That a system takes beside its steps and validations: its way to the device, recall."""
RESERVE = 0.05
"""Of the time, for steps that are slower later."""
LEAST_STEPS = 10
RECALL_BATCH = 32

Notify = Callable[[str], None]
Clock = Callable[[], float]


def bench_scale(
    names: Sequence[str],
    base: Recipe,
    data: Path,
    tokens: int | None,
    seconds: float | None,
    seed: int,
    work: Path,
    results: Results,
) -> None:
    """`mole bench scale`: the systems of these names, or the default ones, one after the other.

    Args:
        base: a dense recipe.
        data: a folder of `mole prepare` with held-out text.
        tokens: at most, for each system; None: `MOST_PASSES` over the text.
        seconds: for everything; None: without limit.
        seed: of the weights before training and of the order of the data.
        work: where the lines of each run's history go as they come.

    Raises:
        UserError: recipe and data don't go together, or the time is too short.
    """
    deadline = None if seconds is None else time.perf_counter() + seconds
    console.quiet_transformers()
    require_dense(base)
    TokenShards(data, "validation")  # an error where no text was held out
    source = TrainingData([data])
    base = with_vocabulary(base, source.vocabulary.vocab_size)
    assert base.model.vocab_size is not None
    source.require_rows(base.model.vocab_size)
    most = tokens or MOST_PASSES * TokenShards(data).num_tokens
    study = _Study(base, source, seed, work, _words(data), deadline)
    systems = [System.parse(name) for name in names or DEFAULT_SYSTEMS]
    for system in systems:  # errors before anything is trained
        source.sequences(study.recipe(system, most).training)

    results.resume(apart_from="--seconds")
    results.found = [result for result in results.found if _is_whole(result)]
    done = [result["system"] for result in results.found]
    left = [system for system in systems if system.name not in done]
    models, trials = study.try_out(left, most, results)
    if done:
        most = results.found[0]["tokens"]
        console.say(f"{', '.join(done)} trained already, on {most:,} tokens each.")
    elif deadline is not None and trials:
        most = min(most, study.tokens_that_fit(list(trials.values())))
    for system in left:
        if system.name in models and study.has_time():
            result = study.train(system, models.pop(system.name), most, results.found)
            results.add(result, say=in_words)
        elif system.name in models:
            results.add({"system": system.name, "failed": "no time was left"}, say=in_words)
    results.finish(draw_curves)


def _is_whole(result: Result) -> bool:
    return "failed" not in result and not result.get("stopped")


def _words(data: Path) -> torch.Tensor | None:
    """What recall is measured with; None, and a line that says so, where there is too little."""
    try:
        return word_ids(load_tokenizer(str(data / TOKENIZER_NAME)))
    except UserError as error:
        console.say(f"No recall: {error}")
        return None


@dataclass(frozen=True)
class Trial:
    """How fast a system is."""

    seconds_per_token: float
    """Of training."""
    validation_seconds: float
    """Of one validation."""

    def seconds(self, tokens: float) -> float:
        """Of a run of so many tokens, with its validations."""
        return tokens * (self.seconds_per_token + self.validation_seconds / VALIDATE_EVERY)


class _Study:
    """What all systems have in common."""

    def __init__(
        self,
        base: Recipe,
        source: TrainingData,
        seed: int,
        work: Path,
        words: torch.Tensor | None,
        deadline: float | None,
    ) -> None:
        self._base, self._source, self._seed = base, source, seed
        self._work, self._words, self._deadline = work, words, deadline

    def recipe(self, system: System, tokens: int) -> Recipe:
        """Of a system, for a run of so many tokens."""
        points = max(1, tokens // VALIDATE_EVERY)
        return system.recipe(self._base, tokens=tokens, seed=self._seed, points=points)

    def has_time(self) -> bool:
        """Whether the deadline is still to come."""
        return self._deadline is None or time.perf_counter() < self._deadline

    # ------------------------------------------------------------------------------ how fast

    def try_out(
        self, systems: Sequence[System], most: int, results: Results
    ) -> tuple[dict[str, Any], dict[str, Trial]]:
        """Models before training, and how fast each is; what fails is a result."""
        models: dict[str, Any] = {}
        trials: dict[str, Trial] = {}
        for system in systems:
            try:
                model = self._build(system, most)
                trials[system.name] = trial = self._trial(system, copy.deepcopy(model))
            # Torch's, out of memory among them, and a loss that isn't finite.
            except (RuntimeError, UserError) as error:
                results.add({"system": system.name, "failed": _in_a_line(error)}, say=in_words)
                continue
            finally:
                _free_memory()
            models[system.name] = model
            rate = 1 / trial.seconds_per_token
            console.say(f"  {system.name}: {rate:,.0f} tokens/s in {TIMED_STEPS} steps")
        return models, trials

    def _build(self, system: System, tokens: int) -> Any:
        recipe = self.recipe(system, tokens)
        assert recipe.model.vocab_size is not None
        return build_model(recipe, recipe.model.vocab_size)

    def _trial(self, system: System, model: Any) -> Trial:
        steps = WARM_UP_STEPS + TIMED_STEPS
        tokens_per_step = self._base.training.tokens_per_step
        recipe = system.recipe(
            self._base, tokens=steps * tokens_per_step, seed=self._seed, points=1
        )
        timer = _Timer(_clock())
        self._run(system, recipe, model, [timer])
        return Trial(timer.step_seconds / (TIMED_STEPS * tokens_per_step), timer.validation_seconds)

    def tokens_that_fit(self, trials: Sequence[Trial]) -> int:
        """The tokens that each of the systems can be given in the time that is left.

        Raises:
            UserError: too few to train on.
        """
        assert self._deadline is not None
        left = self._deadline - time.perf_counter()
        tokens = tokens_that_fit(trials, left)
        least = LEAST_STEPS * self._base.training.tokens_per_step
        if tokens < least:
            raise UserError(
                f"In the {max(0.0, left):.0f} seconds that are left {len(trials)} systems can be "
                f"trained on {tokens:,} tokens each; {LEAST_STEPS} steps are {least:,}. Give more "
                "--seconds, or name fewer systems."
            )
        console.say(f"{tokens:,} tokens for each of {len(trials)} systems, in {left:.0f} s")
        return tokens

    # ------------------------------------------------------------------------------ training

    def train(self, system: System, model: Any, tokens: int, before: Sequence[Result]) -> Result:
        """Train a system and measure it.

        Args:
            model: before training.
            tokens: of the run; fewer where time runs out.
            before: results of the systems that came before.
        """
        dense = next((r for r in before if r["system"] == "dense" and "curve" in r), None)
        recipe = self.recipe(system, tokens)
        watch = _Watch(system.name, recipe.training, dense, self.has_time)
        try:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = self._run(system, recipe, model, [watch])
            return self._result(system, recipe, model, watch, seconds, dense)
        except (RuntimeError, UserError) as error:  # as in `try_out`
            return {"system": system.name, "seeds": [self._seed], "failed": _in_a_line(error)}
        finally:
            del model
            _free_memory()

    def _run(
        self, system: System, recipe: Recipe, model: Any, callbacks: list[TrainerCallback]
    ) -> float:
        """Train without checkpoints; seconds spent on steps."""
        training = recipe.training
        run = RunFolder(self._work / f"{system.folder_name}-seed{self._seed}")
        run.path.mkdir(parents=True, exist_ok=True)
        history = History(run.history, 0)
        history.drop_later_lines()
        record = Record(history, training)
        sequences, held_out = self._source.sequences(training), self._source.held_out(training)
        guards = [LogAtMilestones(), RefuseNonFinite(run), record]
        trainer = RecipeTrainer(run, recipe, model, sequences, held_out, [*callbacks, *guards])
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.train()
        return record.stopwatch.seconds

    def _result(
        self,
        system: System,
        recipe: Recipe,
        model: Any,
        watch: "_Watch",
        seconds: float,
        dense: Result | None,
    ) -> Result:
        assert recipe.model.vocab_size is not None
        tokens = watch.curve[-1][0]
        ratio = tokens_per_unique_id(self._source.sequences(recipe.training), recipe.training)
        flops = costs(recipe, recipe.model.vocab_size, 1, ratio).flops_per_token.training
        result: Result = {
            "system": system.name,
            "seeds": [self._seed],
            "tokens": tokens,
            "tokens_per_step": recipe.training.tokens_per_step,
            "validation_loss": watch.curve[-1][1],
            "training_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "parameters": asdict(count_parameters(model)),
            "tokens_per_unique_id": ratio,
            "flops_per_token": flops,
            "curve": watch.curve,
            "stopped": watch.stopped or None,
            "peak_bytes": torch.cuda.max_memory_allocated()
            if model.device.type == "cuda"
            else None,
        }
        if dense is not None:
            of_dense = dense["tokens_per_second"] / result["tokens_per_second"]
            result |= {"ratio_to_dense": of_dense}
            result |= {"flop_ratio_to_dense": flops / dense["flops_per_token"]}
        if self._words is not None:
            model.eval()
            result["recall"] = measure_recall(model, self._words, batch_size=RECALL_BATCH).to_dict()
        return result


class _Timer(TrainerCallback):
    """Times the last steps of a short run, and its validation.

    Args:
        clock: seconds, once the device has done all that it was asked for.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marked_at = 0.0
        self.step_seconds = self.validation_seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP_STEPS:
            self._marked_at = self._clock()
        elif state.global_step == state.max_steps:
            now = self._clock()
            self.step_seconds, self._marked_at = now - self._marked_at, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.validation_seconds = self._clock() - self._marked_at


class _Watch(TrainerCallback):
    """Keeps a run's curve and says its points; ends the run when time is up.

    Args:
        name: the system's.
        training: its recipe's.
        dense: the result of the dense model, where it came before.
        has_time: whether the run may go on.
    """

    def __init__(
        self,
        name: str,
        training: TrainingRecipe,
        dense: Result | None,
        has_time: Callable[[], bool],
    ) -> None:
        self._name, self._tokens_per_step = name, training.tokens_per_step
        self._dense: Mapping[int, float] = dict(dense["curve"]) if dense else {}
        self._has_time = has_time
        self.curve: list[tuple[int, float]] = []
        """(tokens trained on, validation loss in nats)."""
        self.stopped = False
        """Whether time ran out before the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and not self._has_time():
            self.stopped = True
            control.should_evaluate = control.should_training_stop = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        tokens, loss = state.global_step * self._tokens_per_step, metrics["eval_loss"]
        self.curve.append((tokens, loss))
        lead = f", {self._dense[tokens] - loss:+.4f} gained" if tokens in self._dense else ""
        console.say(f"  {self._name}, {tokens / 1e6:.2f} M tokens: {loss:.4f}{lead}")


def tokens_that_fit(trials: Sequence[Trial], seconds: float) -> int:
    """Tokens that each system can be given, all of them in so many seconds; 0 where none."""
    left = seconds * (1 - RESERVE) - len(trials) * SECONDS_BESIDE
    return max(0, int(left / sum(trial.seconds(1) for trial in trials)))


def tokens_per_unique_id(sequences: Any, training: TrainingRecipe, batches: int = 16) -> float:
    """In a run's first micro batches: tokens over the ids that experts are evaluated on."""
    size = training.sequences_per_micro_batch
    tokens = unique = 0
    for first in range(0, min(len(sequences), batches * size), size):
        ids = torch.cat([sequences[first + place]["input_ids"] for place in range(size)])
        tokens += len(ids)
        unique += len(ids.unique())
    return tokens / unique


def in_words(result: Result) -> str:
    """One system in one line."""
    if "failed" in result:
        return f"  {result['system']}: {result['failed']}"
    words = [
        f"  {result['system']}: validation loss {result['validation_loss']:.4f}",
        f"{result['tokens']:,} tokens{' (time ran out)' if 'stopped' in result else ''}",
        f"{result['tokens_per_second']:,.0f} tokens/s",
    ]
    if "ratio_to_dense" in result:
        words.append(
            f"{result['ratio_to_dense']:.3f} × dense's time, "
            f"{result['flop_ratio_to_dense']:.3f} × its FLOPs"
        )
    if "recall" in result:
        found = result["recall"]["distances"]
        shares = " ".join(f"{at['distance']}: {at['accuracy']:.0%}" for at in found)
        words.append(f"recall over {shares}")
    return ", ".join(words)


def _clock() -> Clock:
    return clock_of("cuda" if torch.cuda.is_available() else "cpu")


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _free_memory() -> None:
    """The Trainer and its model hold each other; the next system needs their room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
