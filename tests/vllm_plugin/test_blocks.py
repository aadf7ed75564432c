"""What a block gains: its FFN adds what experts say, whatever kind of FFN it is."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from vllm.forward_context import ForwardContext, override_forward_context

from lookup_experts.model.forms import LookupBlock
from lookup_experts.vllm_plugin.blocks import place_block
from lookup_experts.vllm_plugin.step import Step

SIZE = 8


class Rows:
    num_positions = 5

    def mix(self, layer, weights, experts=None):
        return weights.repeat(1, SIZE)


class Source:
    def rows(self, token_ids, ready=False, base_model=None):
        return Rows()


class AddsTwice(LookupBlock):
    """Twice what the FFN was given, and 3 from its rows."""

    def forward(self, hidden_states, rows, observe=None):
        weights = hidden_states.new_full((rows.num_positions, 1), 3.0)
        return 2 * hidden_states + rows.mix(self.layer, weights).view(hidden_states.shape)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.weight * x


class Block(nn.Module):
    """As a block of vLLM's: it calls its FFN with flat hidden states."""

    def __init__(self):
        super().__init__()
        self.mlp = Halves()

    def forward(self, states):
        return states + self.mlp(states)


def placed(block, step):
    known = {}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=known))
    place_block(block.mlp, AddsTwice(0), SIZE, "layers.0.mlp", step, config)
    return ForwardContext(no_compile_layers=known, attn_metadata={}, slot_mapping={})


@pytest.fixture
def step():
    step = Step()
    step.source = Source()
    return step


@pytest.mark.parametrize("own_forward", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(5, SIZE), (1, 5, SIZE)])
@torch.no_grad()
def test_an_ffn_adds_what_its_experts_say(step, own_forward, compiled, shape):
    block = Block()
    if own_forward:  # as vLLM gives it to modules that it takes from transformers
        block.mlp.forward = MethodType(lambda self, x: self.weight * x + 1, block.mlp)
    context = placed(block, step)
    run = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    states = torch.randn(shape)
    with override_forward_context(context), step.of(torch.arange(5), None):
        found = run(states)
    torch.testing.assert_close(found, 3.5 * states + 3 + own_forward)


def test_names_of_parameters_stay(step):
    block = Block()
    placed(block, step)
    assert dict(block.named_parameters()).keys() == {"mlp.weight"}


@torch.no_grad()
def test_a_block_that_leaves_its_experts_out_is_an_error(step):
    block = Block()
    placed(block, step)
    with (
        pytest.raises(RuntimeError, match="Of 1 blocks with lookup experts 0 asked"),
        step.of(torch.arange(5), None),
    ):
        Halves.forward(block.mlp, torch.ones(5, SIZE))
