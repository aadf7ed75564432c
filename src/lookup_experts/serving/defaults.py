"""How tokens are chosen where a request doesn't say: as the model's own settings do."""

from dataclasses import dataclass
from typing import Any

GREEDY = 0.0


@dataclass(frozen=True)
class SamplingDefaults:
    """What OpenAI's API does by itself, unless the model's `generation_config` says otherwise."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, model: Any) -> "SamplingDefaults":
        """A model's. `do_sample: false` is greedy, as in transformers' `generate`."""
        config = model.generation_config
        given = {
            name: value
            for name in cls.__dataclass_fields__
            if (value := getattr(config, name, None)) is not None
        }
        if config.do_sample is False:
            given["temperature"] = GREEDY
        return cls(**given)

    def __str__(self) -> str:
        """What is not as in OpenAI's API: `temperature 0.6, top_k 20`; "" if all is."""
        plain = SamplingDefaults()
        return ", ".join(
            f"{name} {value:g}"
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) != getattr(plain, name)
        )
