"""An addition that waits for the next one.

A block adds its FFN's output to the residual stream. Where lookup experts add to that output
first, it is one more operation on the way; and in a step of decoding each costs, however few the
numbers. So the FFN may give a `DeferredSum` instead: added to another tensor it becomes the sum of
all at once, and in any other operation it is the sum that it stands for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lookup_experts.model.rows import Addition


class DeferredSum(Tensor):
    """`addition.add_to(output)`, when it is needed. No gradients.

    It has no memory of its own: code that reads it past torch's operations fails, and gets no
    half of the sum.

    Args:
        output: of an FFN, [..., d].
        addition: what is added to it.
    """

    _output: Tensor
    _addition: Addition
    _sum: Tensor | None

    @staticmethod
    def __new__(cls, output: Tensor, addition: Addition) -> "DeferredSum":
        made: DeferredSum = Tensor._make_wrapper_subclass(
            cls, output.shape, dtype=output.dtype, device=output.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made._output, made._addition, made._sum = output, addition, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation is torch.ops.aten.add.Tensor and not kwargs:
            summed = _add(*args)
            if summed is not None:
                return summed
        return operation(*tree_map(_as_sum, args), **tree_map(_as_sum, kwargs or {}))

    def sum_now(self) -> Tensor:
        """What it stands for."""
        if self._sum is None:
            self._sum = self._addition.add_to(self._output)
        return self._sum


def _add(first: Any, second: Any) -> Tensor | None:
    """The sum of a deferred one and another; None where it isn't that simple."""
    if isinstance(second, DeferredSum):
        first, second = second, first
    if (
        isinstance(second, DeferredSum)
        or not isinstance(second, Tensor)
        or first._sum is not None
        or second.shape != first.shape
        or second.dtype != first.dtype
        or second.device != first.device
    ):
        return None
    total: Tensor = first._addition.add_to(first._output, second)
    return total


def _as_sum(argument: Any) -> Any:
    return argument.sum_now() if isinstance(argument, DeferredSum) else argument
