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


def find_adapter(model: Any) -> str | None:
    """The name of the first module in the model that is PEFT's; `""` is the model itself."""
    if "peft" not in sys.modules:
        return None
    named = model.named_modules()
    return next((str(name) for name, module in named if _is_of_peft(type(module))), None)


def _is_of_peft(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def refuse_adapters(model: Any, wanted: str) -> None:
    """Raise a `UserError` if the model has adapters that aren't merged.

    Args:
        model: an attached model, or a `PeftModel`.
        wanted: what can't be done with it: `saved` or `folded`.
    """
    found = find_adapter(model)
    if found is not None:
        raise UserError(
            f"This {type(model).__name__} can't be {wanted} with adapters that aren't merged into "
            f"its weights{found and f' ({found} is one)'}: take what merge_and_unload() of its "
            "PeftModel gives, or keep the adapters alone by save_pretrained of the PeftModel."
        )


def tell_of_frozen_experts(model: Any) -> bool:
    """Warn, if adapters are trained and no weight of any routed expert is; whether it did."""
    if model.lookup_settings.form != "experts" or find_adapter(model) is None:
        return False
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained or any(is_attached(name) and ".routed." in name for name in trained):
        return False
    gated = model.lookup_settings.expert_kind == "swiglu"
    products = [*(["gate_proj"] if gated else []), "up_proj", "down_proj"]
    # Weights of several experts in one are no modules.
    names = (name for name, _ in model.named_modules())
    are_modules = any(".routed." in name and name.endswith(".down_proj") for name in names)
    logging.getLogger("lookup_experts").warning(
        "The adapters train nothing of this model's routed experts, which stay as they are. To "
        'train them too, give PEFT modules_to_save=["lookup_experts"], or %s=%s.',
        "target_modules" if are_modules else "target_parameters",
        [f"routed.{name}" for name in products],
    )
    return True
