"""A Trainer that evaluates the experts once per optimizer step, not once per micro batch."""

from contextlib import ExitStack
from typing import Any

import torch

from lookup_experts.errors import UserError
from lookup_experts.model.shared_outputs import shared_expert_outputs


class SharesExpertOutputs:
    """Put before `Trainer` among the bases: `class MyTrainer(SharesExpertOutputs, Trainer)`.

    The Trainer fetches all micro batches of a step before it computes the first, so the step's
    token ids are known in time. Gradients are those of a Trainer without this.

    Attributes:
        share_expert_outputs: whether to do so; may be set between steps.
    """

    share_expert_outputs = True
    _micro_batches: tuple[Any, ...] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does; notes the step's micro batches."""
        samples = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._micro_batches = tuple(samples[0]) if self.share_expert_outputs else ()
        self._num_computed = 0
        self._sharing = ExitStack()
        return samples

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer does, within `shared_expert_outputs` from a step's first micro batch on
        to its last."""
        if not self._micro_batches:
            return super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        if self._num_computed == 0:
            self._sharing.enter_context(shared_expert_outputs(model, self._step_ids()))
        self._num_computed += 1
        with ExitStack() as stack:
            # An exception ends the sharing; so does the step's last micro batch.
            stack.push(self._sharing.pop_all())
            loss: torch.Tensor = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
            if self._num_computed < len(self._micro_batches):
                self._sharing = stack.pop_all()
        return loss

    def _step_ids(self) -> list[torch.Tensor]:
        for batch in self._micro_batches:
            if "input_ids" not in batch:
                raise UserError(
                    "share_expert_outputs needs micro batches with input_ids; these have "
                    f"{', '.join(batch)}."
                )
        device = self.args.device  # type: ignore[attr-defined]
        return [batch["input_ids"].to(device) for batch in self._micro_batches]
