"""The configuration of an attached model: that of its backbone, saved in another shape.

Its `config.json` nests the backbone's settings under another name than transformers looks for, and
states a number of layers that is a sentence: without this package nothing can take the folder for
the plain backbone.
"""

import json
from functools import cache
from typing import Any

from lookup_experts.made_classes import make_class
from lookup_experts.model.embedding_settings import KEY

MODEL_TYPE = "lookup_experts"
"""In the `config.json` of any backbone with experts attached."""
ATTACHED = "LookupExperts"
"""What the name of an attached model's class says beside that of its backbone."""
LOADING_HINT = (
    "This folder is a model with tables of lookup-experts, not a plain one: "
    "`import lookup_experts`, then use AutoModelForCausalLM or lookup_experts.load"
)
# What a saved configuration keeps outside of the nested backbone.
_TOP_LEVEL = ("architectures", "dtype", "transformers_version", "lookup_experts", KEY)


class LookupConfigMixin:
    """What the configuration of an attached model adds to that of its backbone.

    In memory it looks like the backbone's, model type included, with one more attribute
    `lookup_experts` (`LookupSettings` as a dict), or `offloaded_embeddings`
    (`embedding_settings.py`), or both; only its file is of another shape.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(_flattened(config_dict), **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        flat = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        if "auto_map" in flat and self.attribute_map:  # type: ignore[attr-defined]
            flat["attribute_map"] = self.attribute_map  # type: ignore[attr-defined]
        return json.dumps(nested(flat), indent=2, sort_keys=True) + "\n"


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """A plain model's configuration in the shape in which ours are saved."""
    flat = dict(flat)
    saved = {key: flat.pop(key) for key in _TOP_LEVEL if key in flat}
    model_type = flat.pop("model_type", None)
    saved["backbone_type"] = flat.pop("backbone_type", model_type)  # stated by `OwnCodeConfig`
    saved["backbone"] = flat
    saved["model_type"] = MODEL_TYPE
    saved["num_hidden_layers"] = LOADING_HINT
    return saved


def _flattened(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it is saved -> as it is in memory, where it already has that shape."""
    if "backbone" not in config_dict:
        return config_dict
    top_level = {key: config_dict[key] for key in _TOP_LEVEL if key in config_dict}
    return {**config_dict["backbone"], **top_level}


@cache
def attached_config_class(backbone: type) -> Any:
    """The configuration class of a backbone with experts attached; one for each backbone."""
    if issubclass(backbone, LookupConfigMixin):  # with embeddings in tables
        return backbone
    return make_class(
        attached_config_class,
        backbone,
        ATTACHED + backbone.__name__,
        (LookupConfigMixin, backbone),
        __doc__=f"{backbone.__name__} with lookup experts.",
        _auto_class=None,  # where the backbone's has one: that is what its code is saved for
    )


def backbone_config_class(config_class: type) -> Any:
    """The backbone's configuration class, of the configuration class of an attached model."""
    return config_class.__mro__[2]  # (ours, mixin, backbone)
