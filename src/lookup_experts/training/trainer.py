"""Transformers' Trainer as recipes want it: its arguments, and the few things done differently."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from lookup_experts.errors import UserError
from lookup_experts.model.freezing import is_attached
from lookup_experts.training.accumulation import SharesExpertOutputs
from lookup_experts.training.checkpoints import (
    UNFINISHED,
    load_optimizer,
    load_weights,
    publish_checkpoint,
    save_state,
    write_data_position,
)
from lookup_experts.training.history import perplexity
from lookup_experts.training.order import MixedSequences
from lookup_experts.training.recipe import RecipeFile
from lookup_experts.training.row_updates import (
    RowAdamW,
    clip_gradients,
    exchange_gradients,
    keep_whole,
)
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.sharding import (
    is_sharded,
    write_gathered_model,
    write_sharded_model,
)

_LEAST_LOGS = 4
"""Of a run, however short it is."""


def num_processes() -> int:
    """How many processes train together: what torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return os.environ.get("RANK", "0") == "0"


def training_arguments(recipe: RecipeFile, run: RunFolder, validates: bool) -> TrainingArguments:
    """The recipe in the Trainer's words.

    `precision: bf16` is its mixed precision: weights, gradients and optimizer in float32, matrix
    products in bfloat16 by autocast, on CPU as on GPUs.
    """
    training = recipe.training
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=training.num_steps,
        per_device_train_batch_size=training.sequences_per_micro_batch,
        per_device_eval_batch_size=training.sequences_per_micro_batch,
        gradient_accumulation_steps=_micro_batches_per_step(recipe),
        optim="adamw_torch_fused",
        learning_rate=training.learning_rate,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.min_lr_ratio},
        warmup_steps=round(training.warmup_fraction * training.num_steps),
        bf16=training.precision == "bf16",
        seed=training.seed,
        logging_steps=min(training.log_every, math.ceil(training.num_steps / _LEAST_LOGS)),
        logging_nan_inf_filter=False,  # it hides what `RefuseNonFinite` looks for
        eval_strategy="steps" if validates else "no",
        eval_steps=training.validate_every,
        save_steps=training.checkpoint_every,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        # A blocking copy of a batch would wait for all of the step before.
        accelerator_config={"non_blocking": on_gpu},
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not on_gpu,
    )
    # The Trainer would use several GPUs of one process by DataParallel, which copies the model in
    # every step and knows nothing of attached experts; torchrun is the way to use them.
    if num_processes() == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _micro_batches_per_step(recipe: RecipeFile) -> int:
    """How many micro batches each process computes for one step."""
    training = recipe.training
    at_once = training.sequences_per_micro_batch * num_processes()
    if training.sequences_per_step % at_once:
        raise UserError(
            f"training.sequences_per_step {training.sequences_per_step} can't be shared among "
            f"{num_processes()} processes with {training.sequences_per_micro_batch} sequences "
            "each; change training.sequences_per_micro_batch or the number of processes."
        )
    return training.sequences_per_step // at_once


class RecipeTrainer(SharesExpertOutputs, Trainer):
    """Keeps the order of its data set, decays matrices alone, writes whole checkpoints.

    Args:
        run: where everything goes.
        recipe: what is trained and how.
        model: what is trained.
        train_dataset: the sequences of the whole run in their order.
        eval_dataset: those of a validation, or None.
        callbacks: what happens beside the steps.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: RecipeFile,
        model: Any,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(recipe, run, validates=eval_dataset is not None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # which prints every log on stdout
        if is_sharded(model):
            self._leave_placement_to_the_model()
        self._static_rows = keep_whole(model)
        if self._static_rows:
            self.accelerator.clip_grad_norm_ = self._clip_with_rows
        self.share_expert_outputs = recipe.training.share_expert_outputs
        self._run = run
        self._keep_checkpoints = recipe.training.keep_checkpoints
        self._sequences_per_step = recipe.training.sequences_per_step
        self._backbone_learning_rate = recipe.backbone_learning_rate
        self._was_loaded = bool(getattr(model, "name_or_path", ""))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices, the head and the stacked ones of experts among them; no embeddings, norms."""
        embeddings = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and id(parameter) not in embeddings
        ]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, of what takes gradients; a backbone may have its own learning rate."""
        optimizer = super().create_optimizer(model)
        if self._backbone_learning_rate is not None:
            self._set_apart_backbone(optimizer, self._backbone_learning_rate)
        if self._static_rows:
            optimizer = RowAdamW(optimizer.param_groups, self._static_rows)
            self.optimizer: Any = optimizer
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        # Of parameters of which some are cut and others are not, the Trainer asks nobody else.
        return self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _clip_with_rows(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        """In place of accelerate's, once per step."""
        exchange_gradients(self._static_rows)
        return clip_gradients(list(parameters), self._static_rows, max_norm)

    def _settle_rows(self) -> None:
        """Before weights are written."""
        if self._static_rows:
            self.optimizer.optimizer.settle()

    def _set_apart_backbone(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Each group of parameters becomes two; the experts' come first and give the log's rate."""
        attached = {id(p) for name, p in self.model.named_parameters() if is_attached(name)}
        groups = []
        for own, lr in ((True, self.args.learning_rate), (False, learning_rate)):
            for group in optimizer.param_groups:
                parameters = [p for p in group["params"] if (id(p) in attached) is own]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": lr})
        optimizer.param_groups[:] = groups

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        elif "loss" in logs:
            self._take_router_losses_apart(logs)
        super().log(logs, *args, **kwargs)

    def _take_router_losses_apart(self, logs: dict[str, float]) -> None:
        """What is logged as the loss is the language model's, auxiliary losses stand beside it."""
        losses = getattr(self.model, "router_losses", None)
        if losses is None:
            return
        sums = self.accelerator.gather(losses.take_sums(self.args.device)[None]).sum(dim=0)
        balance, z = (sums[:2] / sums[2]).tolist()
        logs["loss"] -= losses.load_balance * balance + losses.z * z
        logs |= {"load_balance_loss": balance, "z_loss": z}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Let the Trainer write under another name; rename when every process is done."""
        self.args.output_dir = str(self._run.checkpoints / UNFINISHED)
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.output_dir = str(self._run.checkpoints)
        self.accelerator.wait_for_everyone()
        if is_main_process():
            step = self.state.global_step
            publish_checkpoint(self._run.checkpoints, step, self._keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _leave_placement_to_the_model(self) -> None:
        """Keep accelerate from wrapping a sharded model in DDP; it still adds the autocast."""
        prepare_model = self.accelerator.prepare_model

        def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
            return prepare_model(model, device_placement=False, evaluation_mode=True)

        self.accelerator.prepare_model = prepare

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does, but not into checkpoints: `save_state` writes their weights."""
        if not _internal_call:
            super().save_model(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._settle_rows()
        save_state(Path(output_dir), self.model, self.optimizer.optimizer)
        if not is_main_process():
            return
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        if isinstance(self.train_dataset, MixedSequences):
            num_sequences = self.state.global_step * self._sequences_per_step
            position = self.train_dataset.position(num_sequences)
            write_data_position(Path(output_dir), position)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.model, self.optimizer.optimizer)
            schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)

    def save_trained_model(self, folder: Path) -> None:
        """Write what `from_pretrained` takes; all processes take part, the main one writes."""
        self._settle_rows()
        if is_sharded(self.model):
            write = write_gathered_model if self._was_loaded else write_sharded_model
            write(self.model, folder, writes=is_main_process())
            return
        self.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
