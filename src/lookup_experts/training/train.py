"""Training a recipe, from scratch or on a backbone, on transformers' Trainer.

`train` checks everything that can be checked, then trains, or goes on where it stopped, and leaves
a Hugging Face folder. The parts: `recipe.py` what to do, `data.py` and `order.py` what the model
sees, `models.py` the model, `trainer.py` and `callbacks.py` the Trainer, `run_folder.py` and
`checkpoints.py` the files.
"""

import json
import platform
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch.utils.data import Dataset
from transformers import TrainerCallback

from lookup_experts.errors import UserError
from lookup_experts.training.callbacks import (
    LogAtMilestones,
    Record,
    RefuseNonFinite,
    ShowProgress,
    StopOnSignal,
    TakeOwnIntervals,
)
from lookup_experts.training.checkpoints import (
    checkpoint_step,
    last_checkpoint,
    read_data_position,
)
from lookup_experts.training.disk_space import check_disk_space, told_when_disk_is_full
from lookup_experts.training.history import History, tokens_per_second
from lookup_experts.training.models import (
    ParameterCounts,
    build_model,
    build_sharded_model,
    count_parameters,
    enable_gradient_checkpointing,
    with_vocabulary,
)
from lookup_experts.training.order import MixedSequences
from lookup_experts.training.progress import Display, make_display, without_transformers_bars
from lookup_experts.training.recipe import Recipe, RecipeFile
from lookup_experts.training.run_folder import RunFolder, write_text
from lookup_experts.training.sharding import join_processes, shard_model, take_over_from_launcher
from lookup_experts.training.sources import TrainingData, Vocabulary
from lookup_experts.training.trainer import RecipeTrainer, is_main_process
from lookup_experts.training.upcycling import (
    UpcycleRecipe,
    check_data,
    other_beginning,
    prepare_to_save,
    refuse_sharding_quantised,
    upcycled_model,
)


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on a signal, with a checkpoint; the message says how to go on."""


@dataclass(frozen=True)
class TrainingSummary:
    """What came out of a run; the content of its summary.json."""

    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Spent on steps, in all sittings; validation and checkpoints not included."""
    tokens_per_second: float
    """Of these seconds."""
    training_loss: float
    """The mean per token, in nats, over the last lines' steps of the history."""
    validation_loss: float | None
    """The mean per token, in nats, at the end; None where no text was held out."""
    validation_perplexity: float | None
    """e to the validation loss."""
    parameters: ParameterCounts
    """Of the model in training form."""
    device: str
    """Where it was trained."""
    versions: dict[str, str]
    """Of the programs it was trained with."""

    @classmethod
    def load(cls, path: Path) -> Self:
        values = json.loads(path.read_bytes())
        # Runs from before there were mixtures of experts don't state it: all was active.
        parameters = {"active": values["parameters"]["resident"], **values["parameters"]}
        return cls(**{**values, "parameters": ParameterCounts(**parameters)})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def in_words(self) -> str:
        """One line for a person."""
        measured = (
            f"training loss {self.training_loss:.4f} (no text was held out)"
            if self.validation_loss is None or self.validation_perplexity is None
            else f"validation loss {self.validation_loss:.4f}, "
            f"perplexity {self.validation_perplexity:.2f}"
        )
        return (
            f"{measured} after {self.steps:,} steps, {self.tokens:,} tokens, "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )


def train(
    recipe: RecipeFile,
    data: str | Path | TrainingData,
    out: str | Path,
    *,
    shard: bool = False,
    progress: bool = True,
) -> TrainingSummary:
    """Train a recipe into a Hugging Face folder; go on where an earlier call stopped.

    A run that was killed and taken up gives the weights of one that was not, bit for bit on a CPU.
    Under torchrun every process calls this.

    Args:
        recipe: the model and how it is trained: a `Recipe` (see `load_recipe`), or an
            `UpcycleRecipe` whose backbone is settled (see `for_backbone`).
        data: a folder of `prepare`, or several and streams as a `TrainingData`.
        out: the run's folder, see `run_folder.py`; new, empty, or of the same recipe and data.
        shard: cut the model over the processes (FSDP2), where each would hold a copy (DDP).
        progress: show progress on stderr.

    Raises:
        UserError: recipe, data and folder don't go together, or the loss is no longer finite.
        DiskFullError: there is too little space; the last checkpoint is kept.
        TrainingInterrupted: SIGINT or SIGTERM; the last step is in a checkpoint.
    """
    _require_accelerate()
    shard = take_over_from_launcher() or shard
    if not isinstance(data, TrainingData):
        data = TrainingData([data])
    recipe = _settled(recipe, data, shard)
    sequences = data.sequences(recipe.training)
    held_out = data.held_out(recipe.training)
    run = RunFolder(out)
    display = make_display(recipe.training.num_steps, shown=progress and is_main_process())
    with run.locked() if is_main_process() else nullcontext():
        if is_main_process():
            for change in run.check(recipe, data.identity()):
                display.message(change)
        if run.summary.exists():
            display.message(f"{run.path} is finished already; there is nothing to do.")
            return TrainingSummary.load(run.summary)
        if isinstance(recipe, UpcycleRecipe):
            warning = other_beginning(recipe, data.vocabulary)
            if warning is not None:
                display.message(warning)
        model = _model_for(recipe, data.vocabulary, shard)
        if is_main_process():
            check_disk_space(run, recipe, count_parameters(model))
            run.begin(recipe, data.identity())
        with told_when_disk_is_full(run), without_transformers_bars():
            return _train_model(model, recipe, run, data, sequences, held_out, display)


def _require_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise UserError(
            "Training needs the package accelerate: pip install 'lookup-experts[train]'."
        )


def _settled(recipe: RecipeFile, data: TrainingData, shard: bool) -> RecipeFile:
    """The recipe with what the data decides, and refused where they don't go together."""
    if shard and recipe.training.share_expert_outputs:
        raise UserError(
            "training.share_expert_outputs needs a whole copy of the experts in each process, and "
            "sharding (--shard, FSDP) cuts them. Train without --shard, or set it to false."
        )
    if isinstance(recipe, UpcycleRecipe):
        check_data(recipe, data)
        return recipe
    assert isinstance(recipe, Recipe)
    settled = with_vocabulary(recipe, data.vocabulary.vocab_size)
    assert settled.model.vocab_size is not None
    data.require_rows(settled.model.vocab_size)
    return settled


def _model_for(recipe: RecipeFile, vocabulary: Vocabulary, shard: bool) -> Any:
    """The model before training."""
    if isinstance(recipe, UpcycleRecipe):
        model = _upcycled(recipe, shard)
    else:
        assert isinstance(recipe, Recipe)
        model = _model_from_scratch(recipe, vocabulary, shard)
    if recipe.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _upcycled(recipe: UpcycleRecipe, shard: bool) -> Any:
    """A backbone with its experts; each process loads all of it before it is cut."""
    if not shard:
        return upcycled_model(recipe)
    refuse_sharding_quantised(recipe)
    device = join_processes()
    model = upcycled_model(recipe)
    shard_model(model, device)
    return model


def _model_from_scratch(recipe: Recipe, vocabulary: Vocabulary, shard: bool) -> Any:
    """A model that begins and ends a text as the data does; where nothing stands before, with the
    token that ends the document before."""
    assert recipe.model.vocab_size is not None
    if shard:
        model = build_sharded_model(recipe, recipe.model.vocab_size, join_processes())
    else:
        model = build_model(recipe, recipe.model.vocab_size)
    for config in (model.config, model.generation_config):
        config.eos_token_id = vocabulary.eos_token_id
        config.bos_token_id = next(iter(vocabulary.bos_token_ids), vocabulary.eos_token_id)
    return model


def _train_model(
    model: Any,
    recipe: RecipeFile,
    run: RunFolder,
    data: TrainingData,
    sequences: Dataset[Any],
    held_out: Dataset[Any] | None,
    display: Display,
) -> TrainingSummary:
    """All steps that are left, then the model and the summary."""
    training = recipe.training
    checkpoint = last_checkpoint(run.checkpoints)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    if checkpoint is not None and isinstance(sequences, MixedSequences):
        sequences.restore(read_data_position(checkpoint))
    stop = StopOnSignal()
    history = History(run.history, step)
    trainer = RecipeTrainer(
        run,
        recipe,
        model,
        sequences,
        held_out,
        [TakeOwnIntervals(), stop, LogAtMilestones(), RefuseNonFinite(run)],
    )
    # How good the backbone is on these contexts, before anything has changed it.
    is_upcycled = isinstance(recipe, UpcycleRecipe)
    trainer.args.eval_on_start = is_upcycled and held_out is not None and step == 0
    if is_main_process():
        for callback in _speaking_callbacks(run, recipe, history, display, step):
            trainer.add_callback(callback)
    with stop, display:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.requested and trainer.state.global_step < training.num_steps:
        raise TrainingInterrupted(
            f"Stopped after step {trainer.state.global_step:,} of {training.num_steps:,}, with a "
            "checkpoint. Run the same command again to go on."
        )
    return _finish(trainer, model, recipe, run, history, data)


def _finish(
    trainer: RecipeTrainer,
    model: Any,
    recipe: RecipeFile,
    run: RunFolder,
    history: History,
    data: TrainingData,
) -> TrainingSummary:
    """Write the trained model and the summary, which says that the run is finished."""
    model.config.use_cache = True  # the Trainer turns it off for training
    if isinstance(recipe, UpcycleRecipe):
        prepare_to_save(model, recipe)
    trainer.save_trained_model(run.unfinished_model)
    if is_main_process():
        run.install_model(data.save_tokenizer)
        summary = _summarise(model, recipe, history, str(trainer.args.device))
        write_text(run.summary, json.dumps(summary.to_dict(), indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return TrainingSummary.load(run.summary)


def _speaking_callbacks(
    run: RunFolder, recipe: RecipeFile, history: History, display: Display, step: int
) -> list[TrainerCallback]:
    """Those that write and show, in the main process alone."""
    history.drop_later_lines()
    record = Record(history, recipe.training)
    callbacks: list[TrainerCallback] = [record, ShowProgress(display, record, recipe.training)]
    if find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        # What was written about later steps by a run that was killed is hidden.
        writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def _summarise(model: Any, recipe: RecipeFile, history: History, device: str) -> TrainingSummary:
    tokens = recipe.training.num_steps * recipe.training.tokens_per_step
    return TrainingSummary(
        steps=recipe.training.num_steps,
        tokens=tokens,
        seconds=history.seconds,
        tokens_per_second=round(tokens_per_second(tokens, history.seconds), 1),
        training_loss=history.last("loss"),
        validation_loss=history.last("validation_loss"),
        validation_perplexity=history.last("validation_perplexity"),
        parameters=count_parameters(model),
        device=device,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "lookup-experts")},
        },
    )
