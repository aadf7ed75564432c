"""Weights that accelerate keeps elsewhere: on disk, or in RAM for a model that runs on a GPU.

Such a weight is on the device `meta`, without values, but for the call of the module that holds it.
Modules are called, so forward passes need nothing of this; what reads weights does: saving,
fingerprints. The values are taken from where accelerate has them, which for a file is a mapping
into memory, and the model stays as it is. accelerate isn't imported: what it looks after has
`_hf_hook`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.errors import UserError


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate will bring them."""
    first = next(module.parameters())
    if not first.is_meta:
        return first.device
    for child in module.modules():
        for hook in _hooks(child):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return first.device


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`module.named_parameters()` with their values, wherever those are.

    Raises:
        UserError: a parameter has no values anywhere.
    """
    kept = _kept_elsewhere(module)
    for name, parameter in module.named_parameters():
        yield name, _with_values(name, parameter, kept)


def state_with_values(
    module: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Of `module.state_dict()` the tensors whose names are wanted, with their values.

    Raises:
        UserError: a tensor has no values anywhere.
    """
    kept = _kept_elsewhere(module)
    return {
        name: _with_values(name, value, kept)
        for name, value in module.state_dict().items()
        if wanted(name)
    }


def _with_values(name: str, tensor: Tensor, kept: dict[str, tuple[Any, str]]) -> Tensor:
    if not tensor.is_meta:
        return tensor
    try:
        values, key = kept[name]
        value: Tensor = values[key]
    except KeyError:
        raise UserError(
            f"The model's {name} has no values: it is on the device meta, and accelerate keeps "
            "none of it elsewhere, so it can't be saved or folded. Load it onto a device first."
        ) from None
    return value.to(tensor.dtype)


def _kept_elsewhere(module: nn.Module) -> dict[str, tuple[Any, str]]:
    """Name of each tensor below `module` -> a mapping in which accelerate keeps it, and its key.

    Looking into a mapping may read a file, which is left to those who want the tensor.
    """
    kept: dict[str, tuple[Any, str]] = {}
    for place, child in module.named_modules(remove_duplicate=False):
        for hook in _hooks(child):
            values = getattr(hook, "weights_map", None)
            if values is None:
                continue
            whole = hook.place_submodules
            keys = child.state_dict() if whole else (*child._parameters, *child._buffers)
            kept.update({f"{place}.{key}" if place else key: (values, key) for key in keys})
    return kept


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of a module; it nests them where a device map has nested entries."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))
