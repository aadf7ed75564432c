"""Lookup experts for any Hugging Face causal LM.

    import lookup_experts as le

    model = le.attach(hf_model, num_experts=4)        # training form, in place
    le.reparameterize(model, "out", tokenizer=...)    # experts -> a table on disk
    model = le.load("out", store="direct")            # reads the table while it generates

    le.offload("gemma-3n", "out")                     # embeddings of a released model -> tables

Importing this package imports neither torch nor transformers; once transformers is imported, its
`AutoModelForCausalLM.from_pretrained` knows the folders that this package writes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lookup_experts.errors import UserError
from lookup_experts.folders.registration import register_when_transformers_is_imported

if TYPE_CHECKING:
    from lookup_experts.folders.attach import attach
    from lookup_experts.folders.load import load
    from lookup_experts.generation.folding import reparameterize
    from lookup_experts.generation.offload import offload
    from lookup_experts.model.shared_outputs import shared_expert_outputs

__version__ = "0.1.0"
__all__ = ["UserError", "attach", "load", "offload", "reparameterize", "shared_expert_outputs"]

_WHERE = {
    "attach": "lookup_experts.folders.attach",
    "load": "lookup_experts.folders.load",
    "offload": "lookup_experts.generation.offload",
    "reparameterize": "lookup_experts.generation.folding",
    "shared_expert_outputs": "lookup_experts.model.shared_outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lookup_experts' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


register_when_transformers_is_imported()
