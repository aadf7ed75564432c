"""The layer: `mix` and the experts against their references, unique ids against every position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import attached_model, gateless_model, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.computed_rows import FFNExperts
from lookup_experts.model.expert_products import EXPERT_KINDS, normalize
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.model.per_position import PerPositionExperts
from lookup_experts.model.rows import mix, mix_reference
from lookup_experts.model.wiring import routed_experts

U, N, D = 7, 3, 8


def contiguous(memory: Tensor) -> Tensor:
    return memory[: U * N * D].view(U, N, D)


def transposed(memory: Tensor) -> Tensor:
    """What `LayerExperts` gives."""
    return memory[: U * N * D].view(N, U, D).transpose(0, 1)


def in_records(memory: Tensor) -> Tensor:
    """A layer of flat records whose stride is a multiple of d."""
    return memory[: U * 6 * D].view(U, 6 * D)[:, 2 * D : 5 * D].view(U, N, D)


def in_odd_records(memory: Tensor) -> Tensor:
    """Records whose stride is no multiple of d."""
    width = N * D + 5
    return memory[: U * width].view(U, width)[:, 3 : 3 + N * D].unflatten(1, (N, D))


def every_second_expert(memory: Tensor) -> Tensor:
    return memory[: U * 2 * N * D].view(U, 2 * N, D)[:, ::2]


def units_apart(memory: Tensor) -> Tensor:
    return memory[: U * N * D].view(U, D, N).transpose(1, 2)


def one_row_for_all(memory: Tensor) -> Tensor:
    return memory[: N * D].view(1, N, D).expand(U, N, D)


LAYOUTS = [
    contiguous,
    transposed,
    in_records,
    in_odd_records,
    every_second_expert,
    units_apart,
    one_row_for_all,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_mix_agrees_with_its_reference_in_values_and_gradients(layout):
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(1000, generator=generator)
    index = torch.randint(0, U, (2, 11), generator=generator)
    weights = torch.randn(2, 11, N, generator=generator).softmax(-1)
    upstream = torch.randn(2, 11, D, generator=generator)
    results = []
    for function in (mix, mix_reference):
        leaves = [memory.clone().requires_grad_(), weights.clone().requires_grad_()]
        mixed = function(layout(leaves[0]), index, leaves[1])
        gradients = torch.autograd.grad(mixed, leaves, upstream)
        results.append((mixed, *gradients))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    num_ids=st.integers(1, 9),
    num_experts=st.integers(1, 5),
    hidden_size=st.integers(1, 9),
    offset=st.integers(0, 10),
    gap=st.integers(0, 20),
)
def test_mix_takes_rows_of_any_stride(num_ids, num_experts, hidden_size, offset, gap):
    width = num_experts * hidden_size
    memory = torch.randn(offset + num_ids * (width + gap))
    rows = memory.as_strided(
        (num_ids, num_experts, hidden_size), (width + gap, hidden_size, 1), offset
    )
    index = torch.arange(num_ids).repeat(2)
    weights = torch.randn(2 * num_ids, num_experts)
    torch.testing.assert_close(mix(rows, index, weights), mix_reference(rows, index, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda layout: layout.__name__)
def test_mix_in_half_precision_is_as_good_as_its_reference(layout, dtype):
    rows = layout(torch.randn(1000).to(dtype))
    index = torch.randint(0, U, (3, 5))
    weights = torch.randn(3, 5, N).softmax(-1)
    exact = mix_reference(rows.double(), index, weights.to(dtype).double())
    mixed = mix(rows, index, weights)
    assert mixed.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(mixed.double(), exact, rtol=2 * epsilon, atol=2 * epsilon)


def test_mix_of_nothing_is_nothing():
    index = torch.empty(2, 0, dtype=torch.int64)
    for rows in (torch.empty(0, N, D), torch.empty(N, 0, D).transpose(0, 1), torch.ones(U, N, D)):
        assert mix(rows, index, torch.empty(2, 0, N)).shape == (2, 0, D)


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation's result has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.numel())
        return result


def test_no_tensor_of_all_positions_and_experts_is_made():
    batch, tokens, num_experts, hidden_size = 2, 64, 8, 16
    rows = torch.randn(5, num_experts, hidden_size, requires_grad=True)
    weights = torch.randn(batch, tokens, num_experts, requires_grad=True)
    index = torch.randint(0, 5, (batch, tokens))
    largest = {}
    for function in (mix, mix_reference):
        with LargestTensor() as seen:
            function(rows, index, weights).sum().backward()
        largest[function] = seen.numbers
    assert largest[mix] <= batch * tokens * max(num_experts, hidden_size)
    assert largest[mix_reference] >= batch * tokens * num_experts * hidden_size


def drawn_experts(kind: str, num_experts: int = 3) -> LayerExperts:
    torch.manual_seed(3)
    experts = LayerExperts(num_experts, 10, 12, 8, kind)
    for weight in experts.parameters():
        nn.init.normal_(weight, 0.0, 0.5)
    return experts


def evaluated(experts: LayerExperts, embeddings: Tensor) -> Tensor:
    """[U, e] -> [U, N, d], as a model in training form does it."""
    return experts(normalize(embeddings, experts.norm_eps)).transpose(0, 1)


@pytest.mark.parametrize("num_ids", [0, 1, 6])
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_batched_experts_agree_with_one_after_the_other(kind, num_experts, num_ids):
    experts = drawn_experts(kind, num_experts)
    embeddings = torch.randn(num_ids, 10, requires_grad=True)
    upstream = torch.randn(num_ids, num_experts, 8)
    results = []
    for function in (evaluated, LayerExperts.forward_reference):
        rows = function(experts, embeddings)
        gradients = torch.autograd.grad(rows, [embeddings, *experts.parameters()], upstream)
        results.append((rows, *gradients))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_an_expert_is_the_formula_of_the_paper():
    experts = drawn_experts("gelu")
    embedding = torch.randn(1, 10)
    normed = embedding / (embedding.square().mean() + 1e-6).sqrt() * experts.norm.weight
    hidden = experts.up_proj[1] @ normed[0]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(evaluated(experts, embedding)[0, 1], experts.down_proj[1] @ hidden)


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'gelo'.*Did you mean 'gelu'"):
        LayerExperts(1, 2, 2, 2, kind="gelo")


def per_position(model) -> PerPositionExperts:
    return PerPositionExperts()


BATCHES = {
    "many duplicates": token_ids(2, 24, vocab_size=9),
    "no duplicates": torch.arange(1, 31).view(2, 15),
    "all the same": torch.full((2, 7), 5),
    "padding": torch.cat([torch.zeros(2, 6, dtype=torch.int64), token_ids(2, 6)], dim=1),
    "one token": torch.tensor([[3]]),
}


@pytest.mark.parametrize("family", ["gateless_llama", "gemma"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_unique_ids_give_the_loss_and_gradients_of_every_position(family, batch):
    ids = BATCHES[batch]
    model = attached_model(family, expert_kind="swiglu" if family == "gemma" else "gelu")
    mask = (ids != 0).long()
    gradients, losses = [], []
    for source in (model.expert_source, per_position(model)):
        model.set_expert_source(source)
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Where all ids are the same, the gradients of attention are zero but for rounding.
    rounding = 1e-6 * torch.stack([exact.norm() for exact in gradients[1].values()]).norm()
    for name, exact in gradients[1].items():
        assert (gradients[0][name] - exact).norm() <= 1e-5 * exact.norm() + rounding, name


def test_the_layer_adds_what_the_formula_says():
    model = attached_model("gateless_llama", layers=[1])
    ids = token_ids(1, 6)
    block = model.model.layers[1].mlp
    seen = {}
    block.lookup_experts.register_forward_hook(
        lambda module, args, output: seen.update(inputs=args[0], output=output)
    )
    with torch.no_grad():
        model(input_ids=ids)
    hidden = seen["inputs"]
    router = (hidden @ block.lookup_experts.router.weight.T).softmax(-1)
    rows = block.lookup_experts.routed.forward_reference(model.get_input_embeddings()(ids[0]))
    expected = torch.einsum("btn,tnd->btd", router, rows)
    torch.testing.assert_close(seen["output"], expected, rtol=1e-5, atol=1e-5)


def test_router_weights_are_a_float32_softmax_in_any_dtype():
    model = attached_model("llama").bfloat16()
    block = model.model.layers[0].mlp.lookup_experts
    weights = block.router_weights(torch.randn(5, 32, dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


def test_ids_outside_the_vocabulary_are_refused():
    model = attached_model("llama")
    for wrong in (-1, 97, 10_000):
        with pytest.raises(UserError, match=rf"Token id {wrong} is outside the vocabulary \(0 to"):
            model(input_ids=torch.tensor([[1, wrong, 3]]))
    with torch.no_grad():  # and the model is none the worse for it
        assert model(input_ids=token_ids(1, 3)).logits.isfinite().all()


def test_a_block_outside_of_a_forward_pass_says_what_is_missing():
    model = attached_model("llama")
    with pytest.raises(RuntimeError, match="outside a forward pass of its base model"):
        model.model.layers[0].mlp(torch.zeros(1, 2, 32))


def test_hidden_states_of_another_batch_are_refused():
    model = attached_model("llama")
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(
        lambda *_: model.model.layers[0].mlp(torch.zeros(1, 3, 32)) and None
    )
    with torch.no_grad(), pytest.raises(RuntimeError, match="don't belong to the token ids"):
        model(input_ids=token_ids(2, 5))


def test_a_model_without_a_source_says_so():
    model = attached_model("llama")
    model.set_expert_source(None)
    with pytest.raises(RuntimeError, match="no expert source"):
        model(input_ids=token_ids(1, 2))


def test_the_scaling_of_an_embedding_is_part_of_what_experts_see():
    """gemma's embedding multiplies by sqrt(d); experts must be evaluated on what it gives."""
    model = attached_model("gemma3_text")
    embedding = model.get_input_embeddings()
    rows = FFNExperts(model.lookup_settings).rows(token_ids(1, 4), base_model=model.base_model)
    unique = token_ids(1, 4).unique()
    experts = routed_experts(model)[0]
    torch.testing.assert_close(rows.layer(0, experts), experts.forward_reference(embedding(unique)))
    assert not torch.allclose(embedding(unique), embedding.weight[unique])


def test_zero_experts_are_silent_in_the_paper_backbone():
    model = gateless_model()
    ids = token_ids(2, 5)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = le.attach(model, 2)(input_ids=ids).logits
    assert torch.equal(before, after)


def test_an_observer_sees_the_router_weights_of_every_layer():
    model = attached_model(num_experts=3)
    seen: dict[int, torch.Tensor] = {}
    model.lookup_entrance.observe = lambda layer, weights: seen.update({layer: weights})
    with torch.no_grad():
        model(token_ids(1, 4))
    assert sorted(seen) == list(range(model.config.num_hidden_layers))
    for weights in seen.values():
        assert weights.shape == (4, 3)
        assert torch.allclose(weights.sum(-1), torch.ones(4))
