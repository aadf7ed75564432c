"""Gradient accumulation with shared expert outputs: the gradients of plain accumulation."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import attached_model, gateless_model, token_ids
from torch.nn.parallel import DistributedDataParallel

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.forms import mole as experts_module
from lookup_experts.training.models import enable_gradient_checkpointing

BATCHES = [token_ids(2, 11, seed=seed, vocab_size=23) for seed in range(4)]


def accumulate(model, batches, share: bool) -> dict[str, torch.Tensor]:
    """Every gradient after a step over the batches."""
    model.zero_grad()
    with le.shared_expert_outputs(model, batches) if share else nullcontext():
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
    return gradients_of(model)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}


def assert_same(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 3e-6 * gradient.norm(), name


@pytest.mark.parametrize("num_batches", [1, 2, 4])
@pytest.mark.parametrize("family", ["gateless_llama", "gemma"])
def test_gradients_are_those_of_plain_accumulation(family, num_batches):
    """The embedding's too, which the experts see; gemma scales it and ties the head to it."""
    model = attached_model(family, expert_kind="swiglu" if family == "gemma" else "gelu")
    exact = accumulate(model, BATCHES[:num_batches], share=False)
    assert_same(accumulate(model, BATCHES[:num_batches], share=True), exact)


def test_experts_are_evaluated_once_per_layer(monkeypatch):
    calls = []
    outputs = experts_module.LayerExperts.forward
    monkeypatch.setattr(
        experts_module.LayerExperts,
        "forward",
        lambda self, normalized, ids: calls.append(len(normalized)) or outputs(self, normalized),
    )
    model = attached_model()
    accumulate(model, BATCHES, share=True)
    unique = len(torch.cat(BATCHES).unique())
    assert calls == [unique] * model.config.num_hidden_layers
    calls.clear()
    accumulate(model, BATCHES, share=False)
    assert len(calls) == len(BATCHES) * model.config.num_hidden_layers


def test_with_gradient_checkpointing():
    model = attached_model("gateless_llama").train()
    exact = accumulate(model, BATCHES, share=False)
    enable_gradient_checkpointing(model)
    assert_same(accumulate(model, BATCHES, share=True), exact)


def test_an_evaluation_in_between_changes_nothing():
    model = attached_model()
    exact = accumulate(model, BATCHES, share=False)
    model.zero_grad()
    with le.shared_expert_outputs(model, BATCHES):
        for ids in BATCHES:
            loss = model(input_ids=ids, labels=ids).loss
            with torch.no_grad():
                model(input_ids=torch.full((1, 3), 90))  # an id that no micro batch has
            loss.backward()
    assert_same(gradients_of(model), exact)


@pytest.mark.parametrize("frozen", ["embed_tokens", ".routed.", ".self_attn."])
def test_a_part_may_be_frozen(frozen):
    model = attached_model()
    for name, weight in model.named_parameters():
        weight.requires_grad_(frozen not in name)
    exact = accumulate(model, BATCHES, share=False)
    assert_same(accumulate(model, BATCHES, share=True), exact)


def test_bfloat16_sums_are_taken_in_float32():
    """Sixteen micro batches of the same: adding up in bfloat16 would be off by several per cent."""
    model = attached_model("gateless_llama").bfloat16()
    batches = BATCHES[:1] * 16
    shared = accumulate(model, batches, share=True)
    once = accumulate(model, batches[:1], share=False)
    for name in shared:
        if ".routed." in name:
            exact = 16 * once[name].float()
            assert (shared[name].float() - exact).norm() <= 0.01 * exact.norm(), name


def test_the_model_is_as_before_afterwards():
    model = attached_model()
    source = model.expert_source
    with le.shared_expert_outputs(model, BATCHES[:1]):
        assert model.expert_source is not source
        model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    assert model.expert_source is source
    with pytest.raises(ZeroDivisionError), le.shared_expert_outputs(model, BATCHES):
        raise ZeroDivisionError
    assert model.expert_source is source


@pytest.mark.usefixtures("group_of_one")
def test_distributed_data_parallel_reduces_every_gradient_once():
    """One process is enough to have the reducer refuse a gradient that comes twice or never."""
    model = attached_model("gateless_llama")
    exact = accumulate(model, BATCHES, share=False)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second step finds out whether the first was complete
        model.zero_grad()
        with le.shared_expert_outputs(wrapped, BATCHES):
            with wrapped.no_sync():
                for ids in BATCHES[:-1]:
                    wrapped(input_ids=ids, labels=ids).loss.backward()
            wrapped(input_ids=BATCHES[-1], labels=BATCHES[-1]).loss.backward()
        assert_same(gradients_of(model), exact)


# --- what would give wrong gradients is refused -------------------------------------------------


def step(model, ids):
    return model(input_ids=ids, labels=ids).loss


def test_one_micro_batch_too_many():
    model = attached_model()
    with (
        pytest.raises(RuntimeError, match="of 1 micro batches; this forward pass is one more"),
        le.shared_expert_outputs(model, BATCHES[:1]),
    ):
        step(model, BATCHES[0]).backward()
        step(model, BATCHES[0])


def test_one_micro_batch_too_few():
    model = attached_model()
    with (
        pytest.raises(RuntimeError, match="of 4 micro batches, but only 1 were computed"),
        le.shared_expert_outputs(model, BATCHES),
    ):
        step(model, BATCHES[0]).backward()


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_last_micro_batch_without_a_backward_pass(num_batches):
    model = attached_model()
    with (
        pytest.raises(RuntimeError, match="last micro batch had no backward pass"),
        le.shared_expert_outputs(model, BATCHES[:num_batches]),
    ):
        for ids in BATCHES[: num_batches - 1]:
            step(model, ids).backward()
        step(model, BATCHES[num_batches - 1])


def test_a_backward_pass_that_comes_too_late():
    model = attached_model()
    with (
        pytest.raises(RuntimeError, match="came after the last one's"),
        le.shared_expert_outputs(model, BATCHES[:2]),
    ):
        first = step(model, BATCHES[0])
        step(model, BATCHES[1]).backward()
        first.backward()


def test_ids_that_were_not_given():
    model = attached_model()
    with (
        pytest.raises(RuntimeError, match="token ids that shared_expert_outputs was not given"),
        le.shared_expert_outputs(model, BATCHES),
    ):
        step(model, torch.tensor([[95, 96]]))


def test_models_without_experts_to_share(table_folder):
    for model, words in (
        (gateless_model(), "GatelessLlamaForCausalLM with no experts"),
        (le.load(table_folder), "with TableReader"),
    ):
        with (
            pytest.raises(UserError, match=words),
            le.shared_expert_outputs(model, BATCHES),
        ):
            pass
    with (
        pytest.raises(UserError, match="given no micro batch"),
        le.shared_expert_outputs(attached_model(), []),
    ):
        pass
