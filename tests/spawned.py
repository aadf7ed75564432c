"""What a spawned process does in a test; such a process finds functions of modules alone."""

from typing import Any

import torch
from tiny_models import logits_of


def tell_logits(models: dict[str, Any], ids: Any, configs: list[Any], answers: Any) -> None:
    """Put the logits of models, as arrays, and the JSON of configurations into a queue."""
    torch.set_num_threads(1)
    logits = {name: logits_of(model, ids).numpy() for name, model in models.items()}
    answers.put((logits, [config.to_json_string() for config in configs]))
