"""How experts and routers begin.

Weights are drawn with `torch.nn.init`, which transformers can guard, so that loaded ones stay.
"""

from typing import Any

from lookup_experts.model.forms import get_form
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import lookup_blocks

INITS = ("zero", "normal")


def initialize_blocks(model: Any, settings: LookupSettings, init: str) -> None:
    """Fill the weights of everything that is attached to a model in training form.

    Args:
        init: `zero`: what is added to the backbone is zero. `normal`: all weights as the backbone
            draws its own.
    """
    std = getattr(model.config, "initializer_range", None) or 0.02
    form = get_form(settings.row_form)
    for block in lookup_blocks(model):
        form.initialize(block, init, std)
