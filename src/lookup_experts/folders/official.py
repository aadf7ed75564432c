"""The folders that the authors of MoLE publish.

Their `config.json` says `"model_type": "llama"` and their weights are something else: an FFN
without a gate and, for MoLE and MoE, experts and routers. Loaded as what they say they are, they
give wrong logits without an error. So a folder is judged by the names of its tensors as well as by
its configuration.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import (
    read_state,
    refuse_partial_loading,
    tensor_names,
)
from lookup_experts.model.gateless_llama import GatelessLlamaForCausalLM
from lookup_experts.model.moe import MoeGatelessLlamaConfig, MoeGatelessLlamaForCausalLM
from lookup_experts.model.settings import LookupSettings

# Architectures that the authors' `config.json` files name.
OFFICIAL = {"DenseForCausalLM": "dense", "MoleForCausalLM": "mole", "MoeForCausalLM": "moe"}
_EXPERT_KEY = re.compile(r"(model\.layers\.\d+)\.experts\.(\d+)\.(up_proj|down_proj)\.weight")
_PLACES = {
    "mole": {
        "experts": "mlp.lookup_experts.routed",
        "router": "mlp.lookup_experts.router",
        "expert_layernorm": "mlp.lookup_experts.routed.norm",
    },
    "moe": {"experts": "mlp.experts", "router": "mlp.router"},
}
"""Where the authors' parts of a layer are in our models."""
_LAYER_KEY = re.compile(r"(model\.layers\.\d+)\.(router|expert_layernorm)\.weight")


def official_kind(folder: Path, config: dict[str, Any]) -> str | None:
    """`dense`, `mole` or `moe` for a folder in the authors' format, None for any other.

    Raises:
        UserError: the configuration says one thing and the weights another.
    """
    if config.get("model_type") != "llama":
        return None
    architecture = (config.get("architectures") or [""])[0]
    stated = OFFICIAL.get(architecture)
    names = tensor_names(folder)
    found = None
    if any(_LAYER_KEY.fullmatch(name) for name in names):
        found = "mole" if any("expert_layernorm" in name for name in names) else "moe"
    elif not any(".gate_proj." in name for name in names):
        found = "dense"
    if stated and stated != found:
        raise UserError(
            f"{folder}: config.json names the architecture {architecture}, but the weights are "
            f"those of a {found or 'plain Llama'} model. One of the two belongs to another model."
        )
    return found


BACKBONES: dict[str, Any] = {
    "dense": GatelessLlamaForCausalLM,
    "mole": GatelessLlamaForCausalLM,
    "moe": MoeGatelessLlamaForCausalLM,
}
"""Kind -> the class of the model, for `mole` of what the experts are attached to."""


def load_official(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    model_class: Any,
    dtype: Any = "auto",
    num_experts_per_tok: int | None = None,
) -> Any:
    """A model of ours with the weights of a folder in the authors' format.

    Args:
        folder: holds `config.json` and safetensors weights.
        kind: what `official_kind` says of it.
        config: its `config.json`.
        model_class: of `BACKBONES`; for `mole` the class of such a backbone with experts attached.
        dtype: of the weights; `auto` keeps that of the files.
        num_experts_per_tok: of a mixture of experts, how many are selected; default: what
            `config.json` says, else 2, the paper's.
    """
    state = read_state(folder)
    fields = {
        key: value
        for key, value in config.items()
        if key not in ("architectures", "model_type", "hidden_act", "num_experts", "auto_map")
    }
    if kind in _PLACES:
        state = _stack_experts(state, _PLACES[kind])
    if kind == "mole":
        fields["lookup_experts"] = official_settings(folder, config).to_dict()
    elif kind == "moe":
        fields["num_experts"] = _whole_number(folder, config, "num_experts")
        if num_experts_per_tok is not None:
            fields["num_experts_per_tok"] = num_experts_per_tok
    model, report = model_class.from_pretrained(
        None,
        config=model_class.config_class(**fields),
        state_dict=state,
        dtype=next(iter(state.values())).dtype if dtype == "auto" else dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are in the report
    )
    refuse_partial_loading(folder, report, "missing", "mismatched", "unexpected")
    return model


def official_settings(folder: Path, config: dict[str, Any]) -> LookupSettings:
    """What the `config.json` of a MoLE checkpoint in the authors' format says of its experts."""
    return LookupSettings(
        num_experts=_whole_number(folder, config, "num_experts"),
        expert_size=_whole_number(folder, config, "intermediate_size"),
        layers=tuple(range(_whole_number(folder, config, "num_hidden_layers"))),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def moe_settings(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """What the `config.json` of a mixture of experts, the authors' or ours, says of its experts.

    Keys: `num_experts` (per layer), `num_experts_per_tok` (the paper's 2 where nothing is said),
    `expert_size`, `hidden_size`, `num_layers`.
    """
    default = MoeGatelessLlamaConfig.num_experts_per_tok
    return {
        "num_experts": _whole_number(folder, config, "num_experts"),
        "num_experts_per_tok": config.get("num_experts_per_tok", default),
        "expert_size": _whole_number(folder, config, "intermediate_size"),
        "hidden_size": _whole_number(folder, config, "hidden_size"),
        "num_layers": _whole_number(folder, config, "num_hidden_layers"),
    }


def _whole_number(folder: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise UserError(f"{folder}: config.json should state {key} as a whole number.")
    return value


def _stack_experts(state: dict[str, Tensor], places: dict[str, str]) -> dict[str, Tensor]:
    """The authors' names -> ours: one tensor per expert becomes one per layer.

    Args:
        state: the authors' tensors.
        places: of `_PLACES`.
    """
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := _EXPERT_KEY.fullmatch(name):
            key = f"{match[1]}.{places['experts']}.{match[3]}"
            experts.setdefault(key, {})[int(match[2])] = tensor
        elif match := _LAYER_KEY.fullmatch(name):
            stacked[f"{match[1]}.{places[match[2]]}.weight"] = tensor
        else:
            stacked[name] = tensor
    for key, parts in experts.items():
        stacked[key] = torch.stack([parts[number] for number in sorted(parts)])
    return stacked
