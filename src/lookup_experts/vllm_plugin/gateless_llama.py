"""The paper's backbone (`model/gateless_llama.py`) in vLLM: Llama with FFNs without a gate."""

from copy import copy
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper


class GatelessMLP(nn.Module):
    """`down(gelu(up(x)))`, exact GELU, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, quant_config: Any, prefix: str):
        super().__init__()
        options = {"bias": False, "quant_config": quant_config, "return_bias": False}
        self.up_proj = ColumnParallelLinear(
            hidden_size, intermediate_size, prefix=f"{prefix}.up_proj", **options
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, prefix=f"{prefix}.down_proj", **options
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class GatelessLlamaDecoderLayer(LlamaDecoderLayer):
    """A block of Llama's with another FFN."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        own = config or vllm_config.model_config.hf_config
        gated = copy(own)
        gated.hidden_act = "silu"  # all that Llama's FFN takes; it is replaced at once
        super().__init__(vllm_config, prefix, gated)
        quant_config = self.get_quant_config(vllm_config)
        self.mlp = GatelessMLP(
            own.hidden_size, own.intermediate_size, quant_config, f"{prefix}.mlp"
        )


class GatelessLlamaModel(LlamaModel):
    """Llama's, for checkpoints whose FFNs have no gate that `up_proj` is to be joined with."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            name: place
            for name, place in LlamaModel.hf_to_vllm_mapper.orig_to_new_stacked.items()
            if "up_proj" not in place[0]
        }
    )


class GatelessLlamaForCausalLM(LlamaForCausalLM):
    """Llama with the FFNs of the paper's backbone."""

    hf_to_vllm_mapper = GatelessLlamaModel.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, layer_type=GatelessLlamaDecoderLayer
        )

    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> nn.Module:
        return GatelessLlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
