"""What an attached model does differently from its backbone, once it is there.

Its class is a subclass of its backbone's, made when it is first needed (`load.py`), so that
`isinstance`, `generate` and the Trainer see the backbone they know. How it is saved is in
`saving.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.initialization import guard_torch_init_functions

from lookup_experts.errors import UserError
from lookup_experts.folders.adapters import tell_of_frozen_experts
from lookup_experts.folders.saving import SavingMixin
from lookup_experts.model.initialization import initialize_blocks, resize_blocks
from lookup_experts.model.input_gradients import InputGradientsMixin
from lookup_experts.model.rows import ExpertSource
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import (
    Entrance,
    forward_pass,
    lookup_blocks,
    resumed,
)


class LookupExpertsMixin(SavingMixin, InputGradientsMixin):
    """What an attached model does differently from its backbone."""

    _told_of_frozen_experts = False

    @property
    def lookup_settings(self) -> LookupSettings:
        """What was attached."""
        return LookupSettings.from_dict(self.config.lookup_experts)

    @property
    def lookup_blocks(self) -> list[Any]:
        """What each block with experts has of them, in order."""
        return lookup_blocks(self)

    @property
    def lookup_entrance(self) -> Entrance:
        """Where token ids become rows."""
        return self.base_model.lookup_entrance  # type: ignore[attr-defined]

    @property
    def expert_source(self) -> ExpertSource | None:
        """Where the model's expert outputs come from."""
        return self.lookup_entrance.source

    def set_expert_source(self, source: ExpertSource) -> None:
        """Take expert outputs from another source from the next forward pass on."""
        self.lookup_entrance.source = source

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Weights that a checkpoint doesn't hold; experts start silent, as in `attach`.

        The base model initialises what is inside of it by itself, and doesn't know experts.
        """
        super().initialize_weights()  # type: ignore[misc]
        if self.lookup_settings.form == "experts":
            with guard_torch_init_functions():  # weights that were loaded stay
                initialize_blocks(self, self.lookup_settings, "zero")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """As transformers does; what the experts have of each token id is resized with it, new ones
        drawn as the form does.

        Raises:
            UserError: the model is in table form, and its table has the ids that it has.
        """
        resizes = new_num_tokens is not None or pad_to_multiple_of is not None
        if resizes and self.lookup_settings.form == "table":
            raise UserError(
                "The vocabulary of a model in table form can't be resized, since its table has "
                "records for the token ids that it was made with. Resize the model in training "
                "form, and fold it anew."
            )
        embedding = super().resize_token_embeddings(  # type: ignore[misc]
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        if resizes:
            resize_blocks(self, self.lookup_settings, embedding.weight.shape[0])
        return embedding

    def train(self, mode: bool = True) -> Any:
        """As torch does; who trains adapters that leave routed experts frozen is told so once."""
        super().train(mode)  # type: ignore[misc]
        if mode and not self._told_of_frozen_experts:
            self._told_of_frozen_experts = tell_of_frozen_experts(self)
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Checkpointed blocks recompute with the token ids of their own forward pass.

        Without this, another forward before the backward (an evaluation, a second loss) would
        make the recomputation read the newer ids, and gradients would be wrong without an error.
        """
        if enable:
            given = dict(getattr(gradient_checkpointing_func, "keywords", {}))
            if given.get("use_reentrant", True):
                raise UserError(
                    "Gradient checkpointing with lookup experts needs use_reentrant=False; pass "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            context_fn = partial(_checkpoint_contexts, given.get("context_fn", _no_contexts))
            gradient_checkpointing_func = partial(
                _checkpoint_block,
                gradient_checkpointing_func,
                partial(gradient_checkpointing_func, context_fn=context_fn),
            )
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs
        )


def _checkpoint_block(given: Any, restoring: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a block through `restoring`, which recomputes with the rows of its own forward pass.

    A graph of `torch.compile` recomputes within itself, from the rows that it was given; there
    contexts are neither needed nor allowed.
    """
    checkpointed = given if torch.compiler.is_compiling() else restoring
    return checkpointed(*args, **kwargs)


def _checkpoint_contexts(
    inner: Callable[[], tuple[Any, Any]],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    forward, recompute = inner()
    return forward, _both(resumed(forward_pass()), recompute)


def _no_contexts() -> tuple[Any, Any]:
    return nullcontext(), nullcontext()


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Any:
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
        yield
