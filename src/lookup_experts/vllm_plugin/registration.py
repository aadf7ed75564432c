"""Which models vLLM is told of."""

from vllm import ModelRegistry

from lookup_experts.folders.configuration import ATTACHED
from lookup_experts.vllm_plugin.checks import is_tested_version, refuse_or_adapt

_ROOM = __package__
GATELESS = "GatelessLlamaForCausalLM"


def register_models() -> None:
    """The paper's backbone, and whatever vLLM has for causal LMs with experts attached.

    Not all of the latter are supported. They are registered all the same, so that what isn't is
    refused in a sentence, and not by a list of all that vLLM knows.
    """
    ModelRegistry.register_model(GATELESS, f"{_ROOM}.gateless_llama:{GATELESS}")
    backbones = [name for name in ModelRegistry.get_supported_archs() if _is_backbone(name)]
    for backbone in backbones:
        name = ATTACHED + backbone
        ModelRegistry.register_model(name, f"{_ROOM}.attached_model:{name}")
    if is_tested_version():  # elsewhere the model itself refuses
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

        class Check(VerifyAndUpdateConfig):
            """Called by vLLM once it has put a configuration together."""

            verify_and_update_config = staticmethod(refuse_or_adapt)

        for backbone in backbones:
            MODELS_CONFIG_MAP[ATTACHED + backbone] = Check


def _is_backbone(name: str) -> bool:
    return name.endswith("ForCausalLM") and not name.startswith(ATTACHED)
