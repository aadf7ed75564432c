"""How experts and routers begin.

Weights are drawn with `torch.nn.init`, which transformers can guard, so that loaded ones stay.
"""

from typing import Any

from torch import nn

from lookup_experts.model.experts import LayerExperts

INITS = ("zero", "normal")


def initializer_std(config: Any) -> float:
    """The standard deviation with which the backbone draws its own weights."""
    return getattr(config, "initializer_range", None) or 0.02


def initialize_experts(experts: LayerExperts, init: str, std: float) -> None:
    """Fill one layer's experts; `zero` silences their outputs."""
    nn.init.ones_(experts.norm.weight)
    for name, weight in experts.named_parameters(recurse=False):
        if init == "zero" and name == "down_proj":
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, 0.0, std)
