"""A tiny model with code of its own, as a folder that transformers loads by `trust_remote_code`."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

_NOTE = """
import os
with open(os.environ["OWN_CODE_RAN"], "a") as _file:
    _file.write(__name__.rpartition(".")[2] + "\\n")
"""

_CONFIGURATION = """
from transformers import PretrainedConfig


class PocketConfig(PretrainedConfig):
    model_type = "pocket"
    attribute_map = {"hidden_size": "n_embd"}

    def __init__(self, vocab_size=97, n_embd=32, intermediate_size=48, num_hidden_layers=3,
                 sharpness=2.0, **kwargs):
        self.vocab_size = vocab_size
        self.n_embd = n_embd
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.sharpness = sharpness
        super().__init__(**kwargs)
"""

_PARTS = """
import torch
from torch import nn

from .helpers_pocket import squared


class PocketMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.down_proj(squared(self.up_proj(hidden_states)))
"""

_HELPERS = """
import torch


def squared(x):
    return torch.relu(x).square()
"""

_MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_pocket import PocketConfig
from .parts_pocket import PocketMLP


class PocketBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sharpness = config.sharpness
        self.norm = nn.LayerNorm(config.hidden_size)
        self.look = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = PocketMLP(config)

    def forward(self, hidden_states, visible):
        normed = self.norm(hidden_states)
        scores = self.sharpness * self.look(normed) @ normed.transpose(1, 2)
        scores = scores.masked_fill(~visible, float("-inf"))
        hidden_states = hidden_states + scores.softmax(-1) @ normed
        return hidden_states + self.mlp(self.norm(hidden_states))


class PocketPreTrainedModel(PreTrainedModel):
    config_class = PocketConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.3)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()


class PocketModel(PocketPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PocketBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        for layer in self.layers:
            hidden_states = layer(hidden_states, visible)
        return hidden_states


class PocketForCausalLM(PocketPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = PocketModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids))
        loss = None
        if labels is not None:
            predicted = logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(predicted, labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""

_TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class PocketTokenizer(PreTrainedTokenizerFast):
    pass
"""

FILES = {
    "configuration_pocket.py": _CONFIGURATION,
    "modeling_pocket.py": _MODELING,
    "parts_pocket.py": _PARTS,
    "helpers_pocket.py": _HELPERS,
}
TOKENIZER_FILE = "tokenization_pocket.py"


def write_own_code_model(folder: Path, tokenizer: object = None, vocab_size: int = 97) -> None:
    """Make a folder with the model in it, and a tokenizer that has code of its own too.

    Whoever runs one of its files must have set `OWN_CODE_RAN` to the path of a file that then gets
    a line.
    """
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_text(content + _NOTE)
    config = {
        "model_type": "pocket",
        "architectures": ["PocketForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_pocket.PocketConfig",
            "AutoModel": "modeling_pocket.PocketModel",
            "AutoModelForCausalLM": "modeling_pocket.PocketForCausalLM",
        },
        "sharpness": 1.5,
        "vocab_size": vocab_size,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"use_cache": false}')
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        (folder / TOKENIZER_FILE).write_text(_TOKENIZATION + _NOTE)
        path = folder / "tokenizer_config.json"
        described = json.loads(path.read_text())
        described |= {
            "tokenizer_class": "PocketTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_pocket.PocketTokenizer"]},
        }
        path.write_text(json.dumps(described))
