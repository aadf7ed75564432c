"""A small backbone, and tables that were made on it while it was frozen."""

from pathlib import Path
from typing import Any

from tiny_models import randomize_experts
from transformers import AutoModelForCausalLM

import lookup_experts as le


def fold(backbone: Path, out: Path, seed: int, save: str = "experts", **settings: Any) -> Path:
    """The folder of a table whose experts say something.

    Args:
        backbone: the folder of the backbone.
        out: the folder to make.
        seed: of the experts' weights.
        save: see `le.reparameterize`.
        settings: of `le.attach`.
    """
    model = AutoModelForCausalLM.from_pretrained(backbone)
    le.attach(model, **{"train_backbone": False, "save": save, **settings})
    randomize_experts(model, seed=seed)
    le.reparameterize(model.eval(), out, encoding="float32", save=save)
    return out
