"""Which models vLLM is told of."""

from vllm import ModelRegistry

from lookup_experts.folders.configuration import ATTACHED
from lookup_experts.folders.offloaded_model import PREFIX as OFFLOADED
from lookup_experts.vllm_plugin.checks import is_tested_version, refuse_or_adapt

_ROOM = __package__
_PREFIXES = (ATTACHED, OFFLOADED, ATTACHED + OFFLOADED)
GATELESS = "GatelessLlamaForCausalLM"


def register_models() -> None:
    """The paper's backbone, and whatever vLLM has for causal LMs, with tables of ours.

    Few of the latter are supported. All are registered, so that what isn't supported is refused in
    a sentence, and not by a list of all that vLLM knows.
    """
    ModelRegistry.register_model(GATELESS, f"{_ROOM}.gateless_llama:{GATELESS}")
    names = [
        prefix + backbone
        for backbone in ModelRegistry.get_supported_archs()
        if backbone.endswith("ForCausalLM") and not backbone.startswith(_PREFIXES)
        for prefix in _PREFIXES
    ]
    for name in names:
        ModelRegistry.register_model(name, f"{_ROOM}.attached_model:{name}")
    if is_tested_version():  # elsewhere the model itself refuses
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

        class Check(VerifyAndUpdateConfig):
            """Called by vLLM once it has put a configuration together."""

            verify_and_update_config = staticmethod(refuse_or_adapt)

        MODELS_CONFIG_MAP.update(dict.fromkeys(names, Check))
