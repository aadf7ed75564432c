"""What is refused before a worker starts, and what vLLM has to be told beforehand."""

from pathlib import Path
from typing import Any

import vllm
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from lookup_experts.errors import UserError
from lookup_experts.folders.configuration import ATTACHED, backbone_config_class
from lookup_experts.folders.experts_alone import backbone_folder
from lookup_experts.folders.model_folder import local_folder, read_config
from lookup_experts.folders.official import official_kind
from lookup_experts.model.embedding_settings import KEY as OFFLOADED_EMBEDDINGS
from lookup_experts.model.settings import LookupSettings
from lookup_experts.vllm_plugin.blocks import OPERATION
from lookup_experts.vllm_plugin.sources import check_table, reader_options

TESTED_VERSION = "0.32"
"""Of vLLM; another may call the parts of a model in another way."""
BACKBONES = (
    "GPTNeoXForCausalLM",
    "GatelessLlamaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""The tested ones, by the names of their classes in transformers."""


def is_tested_version() -> bool:
    """Whether this vLLM is one that the package was tested with."""
    return vllm.__version__.startswith(f"{TESTED_VERSION}.")


def require_tested_version() -> None:
    """Raise a `UserError` unless `is_tested_version`."""
    if not is_tested_version():
        raise UserError(
            f"Models with lookup experts are tested with vLLM {TESTED_VERSION}, and this is vLLM "
            f"{vllm.__version__}: install {TESTED_VERSION}, or a lookup-experts made for this one."
        )


def refuse_or_adapt(vllm_config: Any) -> None:
    """Look through a configuration of vLLM's for a model with experts, and complete it.

    Raises:
        UserError: this model can't be served, or not in the way asked for.
        TableError: its table is missing, damaged, or another model's.
    """
    require_tested_version()
    model_config = vllm_config.model_config
    _check_backbone(model_config)
    settings = LookupSettings.from_dict(model_config.hf_config.lookup_experts)
    _check_ways(vllm_config, settings)
    reader_options(vllm_config.additional_config)
    folder = local_folder(model_config.model)
    _check_reference(folder, settings)
    if settings.form == "table":
        check_table(folder, settings, model_config.hf_config)
    # In memory vLLM gets a configuration of the very class that it knows.
    model_config.hf_config.__class__ = backbone_config_class(type(model_config.hf_config))
    _let_graphs_be_split(vllm_config.compilation_config)


def _check_backbone(model_config: Any) -> None:
    if hasattr(model_config.hf_config, OFFLOADED_EMBEDDINGS):
        raise UserError(
            f"{model_config.model} has embeddings in tables, which vLLM can't read; `mole serve` "
            "does."
        )
    backbone = model_config.architecture.removeprefix(ATTACHED)
    if backbone not in BACKBONES:
        raise UserError(
            f"vLLM can't run a {backbone} with lookup experts: these are tested with "
            f"{', '.join(BACKBONES)}. `mole serve` takes any."
        )


def _check_ways(vllm_config: Any, settings: LookupSettings) -> None:
    """Refuse ways of running that experts have no part in."""
    model_config = vllm_config.model_config
    stages = vllm_config.parallel_config.pipeline_parallel_size
    refused = {
        "a quantised backbone": model_config.quantization is not None,
        "adapters (LoRA)": vllm_config.lora_config is not None,
        "prompts of embeddings, which have no token ids": model_config.enable_prompt_embeds,
        "its blocks in several processes (pipeline parallel) as long as experts, which need the "
        "embedding, aren't folded into a table": stages > 1 and settings.form == "experts",
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise UserError(f"In vLLM a model with lookup experts can't have {what}.")


def _check_reference(folder: Path, settings: LookupSettings) -> None:
    """Refuse a backbone elsewhere that isn't there, or that vLLM can't read."""
    if settings.backbone is None:
        return
    place = backbone_folder(folder, settings)
    if settings.backbone.file is not None or official_kind(place, read_config(place)) is not None:
        raise UserError(
            f"{folder} has experts for a backbone in {place} that vLLM can't read; save the model "
            'with save="full" for it.'
        )


def _let_graphs_be_split(compilation: Any) -> None:
    """Have what experts add computed between captured graphs, as attention is.

    A step's records lie elsewhere than the last one's, and asking for them is the host's work,
    which no graph repeats.
    """
    if current_platform.is_cpu():
        return
    if compilation.splitting_ops is None:  # what vLLM would take
        cache_updates = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
        compilation.splitting_ops = [*compilation._attention_ops, *cache_updates]
    compilation.splitting_ops.append(OPERATION)
    if compilation.cudagraph_mode is not CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
