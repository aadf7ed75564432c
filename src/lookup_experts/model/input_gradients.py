"""Gradient checkpointing lets the embedding's outputs require gradients, by a hook.

transformers' own hook is local to a function, so that no model with it can be pickled.
"""

from typing import Any

from torch import Tensor, nn


class InputGradientsMixin:
    """For classes of models: their hook can be pickled."""

    def enable_input_require_grads(self) -> None:
        """Let the outputs of the embedding require gradients."""
        super().enable_input_require_grads()  # type: ignore[misc]
        for handle in self._require_grads_hooks:  # type: ignore[attr-defined]
            handle.hooks_dict_ref()[handle.id] = require_gradient


def require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    """Forward hook of an embedding."""
    output.requires_grad_(True)
