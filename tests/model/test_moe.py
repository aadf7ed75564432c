"""The mixture of experts: its fast paths against the reference, and what it is as a model."""

import copy

import pytest
import torch
from tiny_models import greedy, greedy_reference, logits_of, moe_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model import moe
from lookup_experts.model.gateless_llama import GatelessLlamaForCausalLM
from lookup_experts.model.moe import (
    MoeGatelessLlamaForCausalLM,
    count_active,
    mix_selected,
    mix_selected_grouped,
    mix_selected_reference,
    mix_selected_single,
    mix_selected_sliced,
    select_experts,
)

POSITIONS, HIDDEN, WIDTH, EXPERTS = 13, 16, 24, 5
PATHS = [mix_selected, mix_selected_sliced, mix_selected_grouped]


def layer_inputs(positions=POSITIONS, selected=2, seed=0, only=None):
    """Random arguments of `mix_selected`, leaves that take gradients.

    Args:
        only: the experts that may be selected; default: all.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    logits = torch.randn(positions, EXPERTS, generator=generator)
    if only is not None:
        logits[:, [expert for expert in range(EXPERTS) if expert not in only]] -= 100
    chosen, weights = select_experts(logits, selected)
    weights = weights.detach().requires_grad_()
    return (
        drawn(positions, HIDDEN),
        chosen,
        weights,
        drawn(EXPERTS, WIDTH, HIDDEN),
        drawn(EXPERTS, HIDDEN, WIDTH),
    )


def outputs_and_gradients(path, inputs):
    """What a path gives, and the gradients of its four differentiable arguments."""
    output = path(*inputs)
    leaves = [tensor for tensor in inputs if tensor.is_floating_point()]
    generator = torch.Generator().manual_seed(9)
    seed = torch.randn(output.shape, generator=generator).to(output.dtype)
    return output, torch.autograd.grad(output, leaves, seed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"positions": 1},
        {"selected": 1},
        {"selected": EXPERTS},
        {"only": (1, 3)},  # the first and the last expert get nothing
        {"only": (0, 4), "positions": 40},
    ],
)
def test_every_path_gives_what_the_reference_gives(path, case):
    inputs = layer_inputs(**case)
    expected, expected_gradients = outputs_and_gradients(mix_selected_reference, inputs)
    output, gradients = outputs_and_gradients(path, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("selected", [1, 2, EXPERTS])
def test_a_single_position_gets_what_the_reference_gives(selected):
    inputs = layer_inputs(positions=1, selected=selected)
    expected, expected_gradients = outputs_and_gradients(mix_selected_reference, inputs)
    output, gradients = outputs_and_gradients(mix_selected_single, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_that_nobody_selects_has_a_gradient_of_zero(path):
    """Not None: with several processes, each must have a gradient for every parameter."""
    _, (_, _, up, down) = outputs_and_gradients(path, layer_inputs(only=(1, 3)))
    for gradient in (up, down):
        assert not gradient[[0, 2, 4]].any()
        assert gradient[[1, 3]].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("path", [*PATHS, mix_selected_reference])
def test_autocast_computes_in_bfloat16_over_float32_weights(path):
    inputs = layer_inputs()
    expected = mix_selected_reference(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = outputs_and_gradients(path, inputs)
    assert output.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=1.0)


def test_rows_that_the_grouped_kernel_cannot_take_are_sliced():
    aligned = torch.empty(2, 24, 16, dtype=torch.bfloat16)
    assert moe._has_grouped_product(aligned)
    assert not moe._has_grouped_product(torch.empty(2, 20, 16, dtype=torch.bfloat16))
    assert moe._has_grouped_product(torch.empty(2, 20, 16))


def test_weights_are_a_softmax_over_the_selected_alone():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]])
    selected, weights = select_experts(logits.bfloat16(), 2)
    assert selected[0].tolist() == [1, 2]
    assert sorted(selected[1].tolist()) == [0, 1]
    assert weights.dtype == torch.float32
    expected = torch.tensor([[3.0, 2.0], [0.0, 0.0]]).softmax(-1)
    torch.testing.assert_close(weights, expected)


def test_all_experts_selected_is_a_softmax_over_all():
    model = moe_model(num_experts_per_tok=6)
    ffn = model.moe_layers[0]
    hidden = torch.randn(2, 7, 32)
    said = torch.stack(
        [
            nn.functional.gelu(hidden @ up.T) @ down.T
            for up, down in zip(ffn.experts.up_proj, ffn.experts.down_proj, strict=True)
        ],
        dim=-2,
    )
    expected = (ffn.router(hidden).softmax(-1)[..., None] * said).sum(-2)
    torch.testing.assert_close(ffn(hidden), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_expert_is_added():
    ffn = moe_model(shared_size=40).moe_layers[1]
    hidden = torch.randn(3, 32)
    both = ffn(hidden)
    shared, ffn.shared = ffn.shared, None
    torch.testing.assert_close(both, ffn(hidden) + shared(hidden))


@pytest.mark.parametrize("shared", [None, 40])
def test_a_token_uses_its_selected_experts(shared):
    model = moe_model(shared_size=shared)
    total = sum(parameter.numel() for parameter in model.parameters())
    unused = 2 * (6 - 2) * 2 * 24 * 32  # layers, experts, up and down
    assert count_active(model) == total - unused
    dense = moe_model(num_experts_per_tok=6)
    assert count_active(dense) == sum(p.numel() for p in dense.parameters())


def test_weights_are_drawn_with_the_configured_deviation():
    experts = moe_model(initializer_range=0.05).moe_layers[0].experts
    for weight in experts.parameters():
        assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.1)


def test_a_saved_model_comes_back_as_itself(tmp_path):
    model = moe_model(num_experts_per_tok=3, z_loss=0.5)
    model.save_pretrained(tmp_path)
    ids = token_ids(2, 9)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), le.load(tmp_path)):
        assert type(again) is MoeGatelessLlamaForCausalLM
        assert (again.config.num_experts_per_tok, again.router_losses.z) == (3, 0.5)
        assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    all_experts = le.load(tmp_path, num_experts_per_tok=6)
    assert not torch.equal(logits_of(all_experts, ids), logits_of(model, ids))


def test_it_never_loads_as_the_dense_backbone(tmp_path):
    moe_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'moe_gateless_llama', not 'gateless_llama'"):
        GatelessLlamaForCausalLM.from_pretrained(tmp_path)


def test_generating_with_a_cache_equals_generating_without():
    model = moe_model()
    prompt = token_ids(1, 6)
    assert torch.equal(greedy(model, prompt, 8), greedy_reference(model, prompt, 8))


def test_a_copy_is_independent():
    model = moe_model()
    ids = token_ids(1, 5)
    copied = copy.deepcopy(model).train()
    copied(input_ids=ids, labels=ids).loss.backward()
    assert model.router_losses is not copied.router_losses
    assert model.router_losses.take_sums("cpu").tolist() == [0, 0, 0]


def test_lookup_experts_can_be_attached(tmp_path):
    model = moe_model()
    ids = token_ids(2, 5)
    before = logits_of(model, ids)
    le.attach(model, num_experts=2)
    assert torch.equal(logits_of(model, ids), before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(le.load(tmp_path), ids), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selected", [0, 7])
def test_more_selected_than_there_are_is_refused(selected):
    with pytest.raises(UserError, match=f"num_experts_per_tok is {selected}; expected 1 to 6"):
        moe_model(num_experts_per_tok=selected)


def test_its_experts_cannot_be_folded(tmp_path):
    moe_model().save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match="can't be folded into a table"):
        le.reparameterize(tmp_path / "moe", tmp_path / "out")
    assert not (tmp_path / "out").exists()
