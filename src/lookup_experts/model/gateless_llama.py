"""The paper's backbone as a Hugging Face model type.

MoLE's experiments (arXiv 2503.15798, section 4.1) use Pythia's shapes with Llama's attention and
RMSNorm, an FFN without a gate and with the exact GELU, and an output head of its own.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.input_gradients import InputGradientsMixin

# Hidden size, layers, heads and FFN size of the paper's models; vocabulary 50,304, context 2,048.
SHAPES = {
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8},
}
PAPER_VOCAB_SIZE = 50304


class GatelessLlamaConfig(LlamaConfig):
    """The paper's backbone: Llama's attention and norms, an FFN without a gate, exact GELU."""

    model_type = "gateless_llama"

    hidden_act: str = "gelu"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        stated = config_dict.get("model_type", cls.model_type)
        if stated != cls.model_type:
            raise UserError(
                f"This is the configuration of a model of type {stated!r}, not {cls.model_type!r}; "
                "load it with AutoModelForCausalLM or lookup_experts.load."
            )
        return super().from_dict(config_dict, **kwargs)


def paper_config(shape: str, **overrides: Any) -> GatelessLlamaConfig:
    """The configuration of the paper's dense model of a shape: 160m, 410m or 1b."""
    if shape not in SHAPES:
        raise unknown_name("shape", shape, SHAPES)
    sizes: dict[str, Any] = {
        **SHAPES[shape],
        "intermediate_size": 4 * SHAPES[shape]["hidden_size"],
        "vocab_size": PAPER_VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.01,
        **overrides,
    }
    return GatelessLlamaConfig(**sizes)


class GatelessMLP(nn.Module):
    """`down(gelu(up(x)))`, exact GELU, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class GatelessLlamaForCausalLM(InputGradientsMixin, LlamaForCausalLM):
    """Llama with the FFNs of the paper's backbone."""

    config_class = GatelessLlamaConfig

    def __init__(self, config: GatelessLlamaConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.mlp = GatelessMLP(config.hidden_size, config.intermediate_size)
        self.init_weights()
