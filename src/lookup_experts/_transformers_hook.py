"""Makes transformers know the package's model types, without importing transformers.

`import lookup_experts` must be fast, and `AutoModelForCausalLM.from_pretrained` must know our
folders afterwards. So the registration waits until transformers' list of configurations has been
imported, by whomever. At that moment transformers is half imported and no configuration class can
be defined yet; what is registered are stand-ins, which give way to the classes of
`model/configuration.py` as soon as one of them is used.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "transformers.models.auto.configuration_auto"
# Model type -> class in `model/configuration.py`.
MODEL_TYPES = {
    "gateless_llama": "GatelessLlamaConfig",
    "moe_gateless_llama": "MoeGatelessLlamaConfig",
    "lookup_experts": "LookupExpertsConfig",
}


def register_when_transformers_is_imported() -> None:
    """Register the stand-ins now if transformers' configurations are loaded, else right after."""
    if TARGET in sys.modules:
        _register_stand_ins(sys.modules[TARGET])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register_stand_ins(configuration_auto: Any) -> None:
    for model_type, class_name in MODEL_TYPES.items():
        stand_in = _StandIn(class_name, (), {"model_type": model_type})
        configuration_auto.CONFIG_MAPPING.register(model_type, stand_in, exist_ok=True)


class _StandIn(type):
    """A class that is another one as soon as anything is asked of it."""

    def _class(cls) -> Any:
        configuration = importlib.import_module("lookup_experts.model.configuration")
        return getattr(configuration, cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._class(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._class()(*args, **kwargs)


class _AfterImport(MetaPathFinder):
    """Finds the target by the usual finders and registers once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            _register_stand_ins(module)

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec
