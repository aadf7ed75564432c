"""`mix_positions` and `expert_outputs`: what autograd gives, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import attached_model, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lookup_experts.model.computed_rows import Positions, mix_positions
from lookup_experts.model.expert_products import EXPERT_KINDS, expert_outputs
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.model.per_position import PerPositionExperts
from lookup_experts.model.rows import mix_reference


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@settings(max_examples=40, deadline=None)
@given(
    num_ids=st.integers(1, 9),
    unused=st.integers(0, 3),
    num_experts=st.integers(1, 5),
    hidden_size=st.integers(1, 9),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 12),
)
def test_mixing_agrees_with_the_reference(num_ids, unused, num_experts, hidden_size, batch, tokens):
    """Ids without a position, as those of other micro batches, included."""
    shape = (num_experts, num_ids + unused, hidden_size)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch * tokens, num_experts, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, num_ids, (batch, tokens))
    upstream = torch.randn(batch * tokens, hidden_size, dtype=torch.float64)
    positions = Positions(index, num_ids + unused, num_experts)
    fast = mix_positions(rows, positions, weights)
    slow = mix_reference(rows.transpose(0, 1), index.view(-1), weights)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, [rows, weights], upstream)
    exact = torch.autograd.grad(slow, [rows, weights], upstream)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frequent_id_has_an_exact_gradient_in_bfloat16():
    """`F.embedding_bag` adds up in the dtype of the rows, and was 1 % off."""
    torch.manual_seed(0)
    rows = torch.randn(4, 20, 16, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(4000, dtype=torch.int64)
    index[:500] = torch.randint(0, 20, (500,))
    weights = torch.randn(4000, 4).softmax(-1)
    upstream = torch.randn(4000, 16, dtype=torch.bfloat16)
    mixed = mix_positions(rows, Positions(index, 20, 4), weights)
    (found,) = torch.autograd.grad(mixed, [rows], upstream)
    wide = rows.detach().double().requires_grad_()
    slow = mix_reference(wide.transpose(0, 1), index, weights.bfloat16().double())
    (exact,) = torch.autograd.grad(slow, [wide], upstream.double())
    assert relative(found, exact) < 3e-3  # half of bfloat16's epsilon, by rounding the result


@pytest.mark.parametrize("frozen", ["inputs", "weights", "down", "nothing"])
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_only_what_is_trained_gets_gradients(kind, frozen):
    torch.manual_seed(0)
    inputs = torch.randn(5, 6, requires_grad=frozen != "inputs")
    into = [
        torch.randn(3, 7, 6, requires_grad=frozen != "weights")
        for _ in range(2 if kind == "swiglu" else 1)
    ]
    down = torch.randn(3, 4, 7, requires_grad=frozen not in ("down", "weights"))
    trained = [tensor for tensor in (inputs, *into, down) if tensor.requires_grad]
    outputs = expert_outputs(kind, inputs, into, down)
    found = torch.autograd.grad(outputs.sum(), trained)
    hidden = [torch.einsum("ue,nde->nud", inputs, weight) for weight in into]
    act = torch.nn.functional
    active = act.silu(hidden[0]) * hidden[1] if kind == "swiglu" else act.gelu(hidden[0])
    slow = torch.einsum("nud,nod->nuo", active, down)
    torch.testing.assert_close(outputs, slow, rtol=1e-5, atol=1e-5)
    exact = torch.autograd.grad(slow.sum(), trained)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_without_gradients_the_outputs_are_the_same_bits():
    experts = LayerExperts(3, 6, 7, 4)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    embeddings = torch.randn(5, 6)
    with torch.no_grad():
        without = experts(embeddings)
    assert torch.equal(without, experts(embeddings))


# --- a whole model ------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation's result has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.numel())
        return result


def training_step(model, source, ids) -> None:
    model.set_expert_source(source)
    model.zero_grad()
    hidden = model.base_model(input_ids=ids).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()


def per_position(model) -> PerPositionExperts:
    return PerPositionExperts()


def test_no_step_of_training_makes_a_tensor_of_all_positions_and_experts():
    """Forward and backward, the whole model: [B, T, N, d] is 40,960 numbers here."""
    model = attached_model("gateless_llama", num_experts=8)
    ids = token_ids(2, 80, vocab_size=6)
    positions_and_experts = 2 * 80 * 8 * 32
    largest = {}
    for name, source in (("unique", model.expert_source), ("all", per_position(model))):
        with LargestTensor() as seen:
            training_step(model, source, ids)
        largest[name] = seen.numbers
    assert largest["unique"] < positions_and_experts
    assert largest["all"] >= positions_and_experts


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_bfloat16_is_as_near_to_the_exact_gradients_as_the_reference(kind):
    """Against float64; unique ids may be off by no more than per-position, and a tenth."""
    ids = token_ids(2, 48, vocab_size=12)
    exact_model = attached_model("gateless_llama", expert_kind=kind, scale=0.1).double()
    training_step(exact_model, exact_model.expert_source, ids)
    exact = {name: weight.grad for name, weight in exact_model.named_parameters()}
    model = attached_model("gateless_llama", expert_kind=kind, scale=0.1)
    errors = []
    for source in (model.expert_source, per_position(model)):
        with torch.autocast("cpu", torch.bfloat16):
            training_step(model, source, ids)
        errors.append(
            torch.tensor(
                [
                    relative(weight.grad, exact[name])
                    for name, weight in model.named_parameters()
                    if ".lookup_experts." in name
                ]
            )
        )
    fast, slow = errors
    assert fast.mean() <= 1.1 * slow.mean()
    assert fast.max() < 0.05


def test_what_layers_share_is_computed_once():
    """The unique ids, their embeddings and their order: once per batch, however many layers."""
    model = attached_model("gateless_llama")
    calls: dict[str, int] = {}

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            calls[name] = calls.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    with Counted():
        training_step(model, model.expert_source, token_ids(2, 9))
    assert calls["_unique2"] == 1
    assert calls["embedding"] == 2  # the backbone's and the experts'
    assert sum(count for name, count in calls.items() if "sort" in name) == 1
