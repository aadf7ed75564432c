"""Whether a backbone is still the one that its experts will be loaded on.

Experts that are saved alone meet the backbone as it is stored. One that was changed in memory, by
an adapter that was merged, by training, or by new rows of its embedding, would be another one then.
Whatever does so changes each parameter that it changes all over, so a few numbers of each tell.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import weight_files
from lookup_experts.model.freezing import is_attached, is_quantised

_SAMPLES = 64
"""Numbers that are kept of each parameter."""


class BackboneSamples:
    """A few numbers of each floating-point parameter of a backbone, as it is now.

    What can't be looked at is passed over: quantised, sharded and offloaded parameters.

    Args:
        model: with or without experts.
    """

    def __init__(self, model: Any) -> None:
        weights = _backbone_weights(model.state_dict())
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._names = set(weights)
        self._shapes = {}
        self._samples = {}
        for name, weight in weights.items():
            if name in parameters and _can_be_looked_at(weight):
                self._shapes[name] = weight.shape
                self._samples[name] = _sample(weight)

    def difference(self, state: dict[str, Tensor]) -> str | None:
        """How a model differs from the one that was sampled, in words; None if it doesn't.

        A weight that was cast since is compared in its new dtype.

        Args:
            state: the model's state dict.
        """
        weights = _backbone_weights(state)
        for name, sample in self._samples.items():
            if name not in weights:
                return f"{name} is gone"
            weight, shape = weights[name], self._shapes[name]
            if not _can_be_looked_at(weight):
                continue
            if weight.shape != shape:
                return f"{name} is of shape {tuple(weight.shape)}, it was {tuple(shape)}"
            if not _are_equal(sample, _sample(weight)):
                return f"{name} has other values"
        added = weights.keys() - self._names
        return f"{min(added)} is new" if added else None


def require_backbone_of_files(model: Any, folder: Path) -> None:
    """Raise a `UserError` if a backbone isn't the one that a folder holds.

    Weights that transformers converts while it loads them, as those of many mixtures, are passed
    over.
    """
    conversions = getattr(model, "_weight_conversions", None) or ()
    if is_quantised(model) or any(getattr(each, "operations", None) for each in conversions):
        return
    own = {name: p for name, p in model.named_parameters() if _can_be_looked_at(p)}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in own.keys() & set(file.keys()):
                stored = file.get_tensor(name)
                if stored.shape != own[name].shape or not _are_equal(
                    _sample(stored), _sample(own[name])
                ):
                    raise UserError(
                        f"{name} of the model in memory isn't that in {path}, so experts can't be "
                        "saved alone, to be loaded with what is there: save the backbone first and "
                        'load it from where it is, or take save="full".'
                    )


def _backbone_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in state.items() if not is_attached(name)}


def _can_be_looked_at(weight: Any) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and weight.numel() > 0
    )


def _sample(weight: Tensor) -> Tensor:
    """[samples] numbers of a parameter, from its first to its last, on the CPU."""
    values = weight.detach()
    flat = (values.to_dense() if values.is_mkldnn else values).reshape(-1)  # packed: `PackedLinear`
    last = len(flat) - 1
    places = torch.arange(min(_SAMPLES, len(flat))) * last // max(1, min(_SAMPLES - 1, last))
    return flat[places.to(flat.device)].cpu()


def _are_equal(earlier: Tensor, now: Tensor) -> bool:
    # In float32, since not all dtypes can be compared.
    return torch.allclose(
        earlier.to(now.dtype).float(), now.float(), rtol=0, atol=0, equal_nan=True
    )
