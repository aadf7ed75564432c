"""What transformers calls the keys and values of earlier tokens.

`cache` from 5.24 on, `past_key_values` before, and still in models that bring their own code.
"""

import inspect
from typing import Any

OLD_NAME, NEW_NAME = "past_key_values", "cache"


def cache_argument(model: Any) -> str:
    """The name of the argument by which the model's forward pass takes its cache.

    Ask once per model, not once per step: it looks at the signature.
    """
    return NEW_NAME if NEW_NAME in inspect.signature(model.forward).parameters else OLD_NAME


def cache_of(output: Any) -> Any:
    """The cache that a forward pass with `use_cache=True` gave back."""
    return output[NEW_NAME] if NEW_NAME in output else output[OLD_NAME]
