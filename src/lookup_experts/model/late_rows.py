"""The rows of an embedding that are read while the model already computes with them.

An embedding that has a part of its row for each layer is asked at the model's entrance, but a layer
needs its part in its own block only. `LateRows` stands for all of them meanwhile: what the model
does to the whole (a factor, a sum with something of the same shape, a choice of positions) is noted
and done to a layer's part when that is needed. Whatever else is asked of it, it answers as the
tensor that it stands for.

A part goes through the same operations as it would have gone through within the whole, element by
element, so the numbers are the same to the last bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lookup_experts.model.rows import EmbeddingRows

_ELEMENTWISE: dict[Any, Callable[[Any, Any], Tensor]] = {
    torch.Tensor.add: torch.add,
    torch.Tensor.mul: torch.mul,
    torch.add: torch.add,
    torch.mul: torch.mul,
    torch.multiply: torch.mul,
}
"""What can be put off, by the functions that torch names it as."""


class Late(ABC):
    """Something that is a tensor as soon as its numbers are needed."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The numbers, waited for."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return function(*_as_tensors(args), **_as_tensors(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, places: Any) -> Any:
        return self.tensor()[places]

    def _elementwise(self, function: Callable[[Any, Any], Tensor], other: Any) -> Any:
        mine: Any = self
        return function(mine, other)

    def __len__(self) -> int:
        return len(self.tensor())

    def __neg__(self) -> Tensor:
        return -self.tensor()

    def __sub__(self, other: Any) -> Any:
        return self.tensor() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.tensor()

    def __truediv__(self, other: Any) -> Any:
        return self.tensor() / other

    def __add__(self, other: Any) -> Any:
        return self._elementwise(torch.add, other)

    def __radd__(self, other: Any) -> Any:
        return self._elementwise(torch.add, other)

    def __mul__(self, other: Any) -> Any:
        return self._elementwise(torch.mul, other)

    def __rmul__(self, other: Any) -> Any:
        return self._elementwise(torch.mul, other)


def _as_tensors(value: Any) -> Any:
    """`value` with tensors in the place of what is late, inside of lists and the like as well."""
    if isinstance(value, Late):
        return value.tensor()
    if type(value) in (tuple, list):
        return type(value)(_as_tensors(inner) for inner in value)
    if type(value) is dict:
        return {key: _as_tensors(inner) for key, inner in value.items()}
    return value


class _Step(NamedTuple):
    """An operation of two things, of which the rows are one."""

    function: Callable[[Any, Any], Tensor]
    other: Any
    """A number, a tensor of one, or one [B, T, L, r]."""
    is_first: bool
    """Whether `other` is the first of the two."""

    def of(self, rows: Tensor, layer: int | None = None) -> Tensor:
        """Of all rows, or of those [B, T, r] of one layer."""
        other = self.other
        if layer is not None and isinstance(other, Tensor) and other.dim():
            other = other[:, :, layer, :]
        return self.function(other, rows) if self.is_first else self.function(rows, other)


class LateRows(Late):
    """Rows [B, T, L·r], or [B, T, L, r] once the model has split them.

    Args:
        rows: of the batch, one per id and layer.
        index: int64 [B, T], position -> place among the unique ids.
        layers: L.
        dtype: of the numbers.
        is_split: whether the layers have a dimension of their own.
        steps: what is to be done to them.
    """

    def __init__(
        self,
        rows: EmbeddingRows,
        index: Tensor,
        layers: int,
        dtype: torch.dtype,
        is_split: bool = False,
        steps: tuple[_Step, ...] = (),
    ) -> None:
        self.dtype, self.device = dtype, index.device
        self._rows, self._index, self._layers = rows, index, layers
        self._is_split, self._steps = is_split, steps
        self._whole: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""
        layers, row_size = self._layers, self._rows.row_size
        sizes = (layers, row_size) if self._is_split else (layers * row_size,)
        return torch.Size((*self._index.shape, *sizes))

    def tensor(self) -> Tensor:
        """See `Late.tensor`."""
        if self._whole is None:
            rows = whole_rows(self._rows, self._index, self._layers, self.dtype)
            rows = rows if self._is_split else rows.flatten(-2)
            for step in self._steps:
                rows = step.of(rows)
            self._whole = rows
        return self._whole

    def of_layer(self, layer: int) -> Tensor:
        """[B, T, r], waited for; of rows that are read layer by layer no others."""
        if self._whole is not None or not self._rows.in_parts:
            return self.tensor()[:, :, layer, :]
        rows = _take(self._rows.layer(layer), self._index, self.dtype)
        for step in self._steps:
            rows = step.of(rows, layer)
        return rows

    def reshape(self, *shape: Any) -> Any:
        """As a tensor's; splitting the layers waits for nothing."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        split = (*self._index.shape, self._layers, self._rows.row_size)
        if tuple(sizes) == split and self._index.dim() == 2:
            return self._with(is_split=True)
        return self.tensor().reshape(*shape)

    view = reshape

    def __getitem__(self, places: Any) -> Any:
        if self._is_split and isinstance(places, tuple) and len(places) == 4:
            batch, positions, layer, numbers = places
            if batch == numbers == slice(None) and isinstance(positions, slice):
                if isinstance(layer, int) and positions == slice(None):
                    return LateLayer(self, layer % self._layers)
                if layer == slice(None):
                    return self._at(positions)
        return self.tensor()[places]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        elementwise = _ELEMENTWISE.get(function)
        if elementwise is not None and len(args) == 2 and not kwargs:
            for mine, other, is_first in ((args[0], args[1], False), (args[1], args[0], True)):
                if isinstance(mine, LateRows) and mine._can_put_off(other):
                    return mine._with(steps=(*mine._steps, _Step(elementwise, other, is_first)))
        return super().__torch_function__(function, types, args, kwargs)

    def _can_put_off(self, other: Any) -> bool:
        """Whether an operation with `other` can be done by layer, and keeps dtype and place."""
        if isinstance(other, int | float):
            return True
        if not isinstance(other, Tensor) or not other.is_floating_point():
            return False
        if other.dim() == 0:
            return True
        return (
            self._is_split
            and other.shape == self.shape
            and other.dtype == self.dtype
            and other.device == self.device
        )

    def _at(self, positions: slice) -> "LateRows":
        steps = tuple(
            step._replace(other=step.other[:, positions])
            if isinstance(step.other, Tensor) and step.other.dim()
            else step
            for step in self._steps
        )
        return self._with(index=self._index[:, positions], steps=steps)

    def _with(self, **changed: Any) -> "LateRows":
        now: dict[str, Any] = {
            "index": self._index,
            "is_split": self._is_split,
            "steps": self._steps,
        }
        return LateRows(rows=self._rows, layers=self._layers, dtype=self.dtype, **(now | changed))


class LateLayer(Late):
    """One layer's part of `LateRows`: [B, T, r]."""

    def __init__(self, rows: LateRows, layer: int) -> None:
        self.dtype, self.device = rows.dtype, rows.device
        self._rows, self._layer = rows, layer
        self._part: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""
        whole = self._rows.shape
        return torch.Size((*whole[:2], whole[3]))

    def tensor(self) -> Tensor:
        """See `Late.tensor`."""
        if self._part is None:
            self._part = self._rows.of_layer(self._layer)
        return self._part


def whole_rows(rows: EmbeddingRows, index: Tensor, layers: int, dtype: torch.dtype) -> Tensor:
    """The rows of all layers, waited for.

    Args:
        rows: of a batch, one per id and layer.
        index: int64 [...], position -> place among the unique ids.
        layers: L.
        dtype: to give them in.

    Returns:
        [..., L, r]
    """
    if not rows.in_parts:
        return _take(rows.every_layer(), index, dtype)
    parts = [_take(rows.layer(layer), index, dtype) for layer in range(layers)]
    return torch.stack(parts, dim=-2)


def _take(rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Of rows [U, .., 1, r] those of `index` [...]: [..., .., r]."""
    taken = rows.squeeze(-2).index_select(0, index.reshape(-1))
    return taken.to(dtype).view(*index.shape, *taken.shape[1:])
