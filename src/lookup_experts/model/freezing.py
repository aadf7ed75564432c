"""Training experts and routers alone, beside a frozen backbone, even a quantised one."""

from functools import cache
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.made_classes import make_class

_EXPERTS = ".lookup_experts."
"""In the names of all parameters that `attach` adds, and of no other."""


def is_attached(name: str) -> bool:
    """Whether a parameter of this name belongs to the experts or a router, not to the backbone."""
    return _EXPERTS in name


def freeze_backbone(model: Any) -> None:
    """Take the gradients from all parameters but those of experts and routers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_attached(name))


def allow_training(model: Any) -> None:
    """Let transformers' Trainer train experts on a quantised backbone.

    It refuses quantised models to which nothing trainable was added, and knows of no additions but
    PEFT's. Whether gradients pass through the quantised layers is still for the quantiser to say.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_qat_trainable:
        kind: Any = type(quantizer)
        quantizer.__class__ = _trainable(kind)
    for layer in _packable_layers(model):
        layer.support_avx512bf16_for_cpu = False


@cache
def _trainable(quantizer: Any) -> Any:
    """The class of a quantiser that says its models can be trained; one for each class."""
    name = quantizer.__name__
    return make_class(_trainable, quantizer, name, (quantizer,), is_qat_trainable=True)


def is_quantised(model: Any) -> bool:
    """Whether a quantiser keeps weights of the model packed.

    transformers has one for every model from a GGUF file, also where all weights were unpacked.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return False
    from_gguf = quantizer.quantization_config.quant_method == "gguf"
    return not (from_gguf and all(p.is_floating_point() for p in model.parameters()))


def forget_quantizer(model: Any) -> None:
    """Let a model whose weights were all unpacked from a GGUF file be one like any other."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not is_quantised(model):
        quantizer.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)


def require_unpacked(model: Any) -> None:
    """Raise a `UserError` if no gradient would pass through the model's quantised layers."""
    for layer in _packable_layers(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise UserError(
                "This model's 4-bit layers were evaluated before, which packed them for inference: "
                "no gradient would pass through them. Load the model anew and attach the experts "
                "before anything is evaluated."
            )


def _packable_layers(model: Any) -> list[Any]:
    """The 4-bit layers of bitsandbytes, which pack themselves for inference when first evaluated.

    They do so where the processor has AVX512-BF16. From then on no gradient passes through them,
    in training neither, and what is saved of them has its scales in another order (version 0.50).
    """
    return [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
