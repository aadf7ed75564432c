"""Adapters of PEFT on an attached model: what they leave frozen, and that they aren't saved.

PEFT puts modules of its own in the place of the model's. Computing goes through them (`wiring.py`);
names and weights are no longer the model's, so what reads those has to be given a merged model.
PEFT isn't imported: its modules are known by where their classes come from.
"""

import logging
import sys
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.model.freezing import is_attached


def has_adapters(model: Any) -> bool:
    """Whether a module of PEFT is the model, or anywhere in it."""
    return "peft" in sys.modules and any(
        kind.__module__.partition(".")[0] == "peft"
        for kind in {base for module in model.modules() for base in type(module).__mro__}
    )


def refuse_adapters(model: Any, wanted: str) -> None:
    """Raise a `UserError` if the model has adapters that aren't merged.

    Args:
        model: an attached model, or a `PeftModel`.
        wanted: what can't be done with it: `saved` or `folded`.
    """
    if has_adapters(model):
        raise UserError(
            f"A {type(model).__name__} with adapters can't be {wanted}, since they aren't merged "
            "into its weights: take what merge_and_unload() of its PeftModel gives; "
            "save_pretrained of the PeftModel saves the adapters alone."
        )


def tell_of_frozen_experts(model: Any) -> bool:
    """Warn, if adapters are trained and no weight of any routed expert is; whether it did."""
    if model.lookup_settings.form != "experts" or not has_adapters(model):
        return False
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained or any(is_attached(name) and ".routed." in name for name in trained):
        return False
    products = ("gate_proj", "up_proj", "down_proj")
    products = products if model.lookup_settings.expert_kind == "swiglu" else products[1:]
    logging.getLogger("lookup_experts").warning(
        "The adapters train nothing of this model's routed experts, which stay as they are. To "
        'train them too, give PEFT modules_to_save=["lookup_experts"], or target_parameters=%s.',
        [f"routed.{name}" for name in products],
    )
    return True
