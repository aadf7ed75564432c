"""Configurations that Hugging Face's `AutoConfig` learns: light, no model code is imported.

Three model types are added. `gateless_llama` is the paper's backbone (`baselines.py`) and
`moe_gateless_llama` the same with a mixture of experts in place of its FFNs (`moe.py`).
`lookup_experts` is any backbone with experts attached. Its `config.json` nests the backbone's
settings under another name than transformers looks for, and states a number of layers that is a
sentence: without this package nothing can take the folder for the plain backbone.

`AutoModelForCausalLM` picks a model by the class of its configuration, so a configuration of
ours registers its model class when one is made; importing model code any earlier would run
into transformers' own circular imports.
"""

import json
from functools import cache
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from lookup_experts.errors import UserError

LOADING_HINT = (
    "This folder is a model with lookup experts, not a plain one: "
    "`import lookup_experts`, then use AutoModelForCausalLM or lookup_experts.load"
)
# What a saved configuration keeps outside of the nested backbone.
_TOP_LEVEL = ("architectures", "dtype", "transformers_version", "lookup_experts")


class GatelessLlamaConfig(LlamaConfig):
    """The paper's backbone: Llama's attention and norms, an FFN without a gate, exact GELU."""

    model_type = "gateless_llama"

    hidden_act: str = "gelu"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_models(type(self))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        stated = config_dict.get("model_type", cls.model_type)
        if stated != cls.model_type:
            raise UserError(
                f"This is the configuration of a model of type {stated!r}, not {cls.model_type!r}; "
                "load it with AutoModelForCausalLM or lookup_experts.load."
            )
        return super().from_dict(config_dict, **kwargs)


class MoeGatelessLlamaConfig(GatelessLlamaConfig):
    """The same with a mixture of experts (`moe.py`); `intermediate_size` is that of one expert.

    `shared_size` is the hidden size of an expert that every token uses; None: there is none.
    """

    model_type = "moe_gateless_llama"

    num_experts: int = 10
    num_experts_per_tok: int = 2
    shared_size: int | None = None
    load_balance_loss: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_experts_per_token(self.num_experts_per_tok, self.num_experts)


def check_experts_per_token(selected: int, num_experts: int) -> None:
    """Raise a `UserError` unless so many of the experts can be selected."""
    if not 1 <= selected <= num_experts:
        raise UserError(
            f"num_experts_per_tok is {selected}; expected 1 to {num_experts}, the number of "
            "experts."
        )


class LookupConfigMixin:
    """What the configuration of an attached model adds to that of its backbone.

    In memory it looks like the backbone's, model type included, with one more attribute
    `lookup_experts` (`attach.LookupSettings` as a dict); only its file is of another shape.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        register_models(type(self))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(_flattened(config_dict), **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        flat = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        saved = {key: flat.pop(key) for key in _TOP_LEVEL if key in flat}
        saved["backbone_type"] = flat.pop("model_type")
        saved["backbone"] = flat
        saved["model_type"] = LookupExpertsConfig.model_type
        saved["num_hidden_layers"] = LOADING_HINT
        return json.dumps(saved, indent=2, sort_keys=True) + "\n"


class LookupExpertsConfig(PreTrainedConfig):
    """The model type `lookup_experts` as `AutoConfig` meets it in a `config.json`.

    It is never the configuration of a model: `from_dict` gives one of the backbone's kind.
    """

    model_type = "lookup_experts"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for key in ("backbone", "backbone_type", "lookup_experts"):
            if key not in config_dict:
                raise UserError(f"The configuration of a model with lookup experts has no {key!r}.")
        backbone = CONFIG_MAPPING[config_dict["backbone_type"]]
        return attached_config_class(backbone).from_dict(config_dict, **kwargs)


def _flattened(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it is saved -> as it is in memory, where it already has that shape."""
    if "backbone" not in config_dict:
        return config_dict
    top_level = {key: config_dict[key] for key in _TOP_LEVEL if key in config_dict}
    return {**config_dict["backbone"], **top_level}


@cache
def attached_config_class(backbone: type) -> Any:
    """The configuration class of a backbone with experts attached; one for each backbone."""
    return type(
        f"LookupExperts{backbone.__name__}",
        (LookupConfigMixin, backbone),
        {"__module__": __name__, "__doc__": f"{backbone.__name__} with lookup experts."},
    )


def register_models(config_class: Any) -> None:
    """Tell `AutoModelForCausalLM` which class the given configuration class belongs to."""
    from transformers import AutoModelForCausalLM

    from lookup_experts.model.huggingface import model_class_for

    AutoModelForCausalLM.register(config_class, model_class_for(config_class), exist_ok=True)


# Importing this module is what makes the real classes known in place of their stand-ins
# (`_transformers_hook.py`).
AutoConfig.register(GatelessLlamaConfig.model_type, GatelessLlamaConfig, exist_ok=True)
AutoConfig.register(MoeGatelessLlamaConfig.model_type, MoeGatelessLlamaConfig, exist_ok=True)
AutoConfig.register(LookupExpertsConfig.model_type, LookupExpertsConfig, exist_ok=True)
