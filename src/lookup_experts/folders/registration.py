"""Makes transformers know the package's model types, without importing transformers.

`import lookup_experts` must be fast, and `AutoModelForCausalLM.from_pretrained` must know our
folders afterwards. So the registration waits until transformers' list of configurations has been
imported, by whomever. At that moment transformers is half imported and no configuration class can
be defined yet; what is registered are stand-ins, which give way to the real classes, of
configuration and model, as soon as one of them is used, or the module that has them is imported.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = {
    "gateless_llama": ("model.gateless_llama", "GatelessLlamaConfig", "GatelessLlamaForCausalLM"),
    "moe_gateless_llama": ("model.moe", "MoeGatelessLlamaConfig", "MoeGatelessLlamaForCausalLM"),
    "lookup_experts": ("folders.load", "LookupExpertsConfig", None),
}
"""Model type -> module of this package, class of the configuration, class of the model; which one
that of an attached model is depends on its backbone."""


def register_when_transformers_is_imported() -> None:
    """Register the stand-ins, and later the real classes, now or as soon as it can be done."""
    _after_import(CONFIGURATIONS, _register_stand_ins)
    for model_type, (place, _, _) in MODELS.items():
        _after_import(_module_name(place), partial(_register, model_type))


def _module_name(place: str) -> str:
    return f"{__package__.partition('.')[0]}.{place}"


def _register_stand_ins(configuration_auto: Any) -> None:
    for model_type, (_, class_name, _) in MODELS.items():
        stand_in = _StandIn(class_name, (), {"model_type": model_type})
        configuration_auto.CONFIG_MAPPING.register(model_type, stand_in, exist_ok=True)


def _register(model_type: str, module: ModuleType) -> None:
    """Let the real classes of a model type take the place of its stand-in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, config_name, model_name = MODELS[model_type]
    config_class = getattr(module, config_name)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    if model_name is not None:
        AutoModelForCausalLM.register(config_class, getattr(module, model_name), exist_ok=True)


class _StandIn(type):
    """A class that is another one as soon as anything is asked of it."""

    def _class(cls) -> Any:
        place, class_name, _ = MODELS[vars(cls)["model_type"]]
        return getattr(importlib.import_module(_module_name(place)), class_name)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._class(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._class()(*args, **kwargs)


def _after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with a module now if it is imported, else right after it will be."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


class _AfterImport(MetaPathFinder):
    """Finds one module by the usual finders and goes on once it has been executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_go_on(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = execute_then_go_on  # type: ignore[method-assign]
        return spec
