"""A router's product below the FFN's first one gives what the router gives."""

from copy import deepcopy

import pytest
import torch
from tiny_models import attached_model, gateless_model, randomize_experts, token_ids

import lookup_experts as le
from lookup_experts.model.joint_router import MOST_POSITIONS, JointLinear, join_routers


def bfloat16_model(family="llama"):
    if family == "gateless":
        model = le.attach(gateless_model(), 4)
        randomize_experts(model)
    else:
        model = attached_model(family)
    return model.to(torch.bfloat16).eval()


def seen_weights(model, ids):
    """The router weights of every layer in a pass over ids [B, T], and the logits."""
    seen = []
    model.lookup_attachment.context.observe = lambda layer, weights: seen.append(weights.float())
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
    model.lookup_attachment.context.observe = None
    return torch.stack(seen), logits.float()


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def joined_layers(model):
    return [module for module in model.modules() if isinstance(module, JointLinear)]


def uses_joint(model, ids, monkeypatch):
    """Whether the routers' own products are left out in a pass over ids."""
    calls = []
    with monkeypatch.context() as patch:
        kind = type(model.lookup_attachment.modules[0])
        own = kind.router_weights
        patch.setattr(kind, "router_weights", lambda *a: calls.append(1) or own(*a))
        seen_weights(model, ids)
    assert len(calls) in (0, len(model.lookup_attachment.modules))
    return not calls


@pytest.mark.parametrize("family", ["llama", "gateless", "gpt_neox"])
@pytest.mark.parametrize("shape", [(2, 1), (8, 1), (3, 5), (1, MOST_POSITIONS)])
def test_short_steps(family, shape, monkeypatch):
    model, ids = bfloat16_model(family), token_ids(*shape)
    expected = seen_weights(model, ids)
    join_routers(model)
    assert_alike(seen_weights(model, ids), expected)
    # gpt_neox's first layer has a bias: its router stays alone.
    assert uses_joint(model, ids, monkeypatch) == (family != "gpt_neox")


@pytest.mark.parametrize("shape", [(1, 1), (1, MOST_POSITIONS + 1)])
def test_one_position_and_prompts_go_by_the_routers_own_product(shape, monkeypatch):
    model, ids = bfloat16_model(), token_ids(*shape)
    expected = seen_weights(model, ids)
    join_routers(model)
    assert all(map(torch.equal, seen_weights(model, ids), expected))
    assert not uses_joint(model, ids, monkeypatch)


def test_names_and_weights_stay(tmp_path):
    model = bfloat16_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    join_routers(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    model.save_pretrained(tmp_path)
    again = le.load(tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in before.items())


def test_weights_that_change_are_followed(monkeypatch):
    """In place they are still the same memory; elsewhere the router goes by itself."""
    model, other, ids = bfloat16_model(), bfloat16_model(), token_ids(4, 1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    expected = seen_weights(other, ids)
    join_routers(model)
    model.load_state_dict(other.state_dict())
    assert_alike(seen_weights(model, ids), expected)
    assert uses_joint(model, ids, monkeypatch)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_alike(seen_weights(model, ids), expected)
    assert not uses_joint(model, ids, monkeypatch)


@pytest.mark.parametrize("which", ["first", "router"])
def test_one_weight_that_is_replaced(which, monkeypatch):
    model, ids = bfloat16_model(), token_ids(4, 1)
    join_routers(model)
    for first, lookup in zip(joined_layers(model), model.lookup_attachment.modules, strict=True):
        layer = first if which == "first" else lookup.router
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 0.5)
    expected = bfloat16_model()
    expected.load_state_dict(model.state_dict())
    assert all(map(torch.equal, seen_weights(model, ids), seen_weights(expected, ids)))
    assert not uses_joint(model, ids, monkeypatch)


def test_other_dtypes_gradients_and_hooks(monkeypatch):
    model, ids = bfloat16_model(), token_ids(4, 1)
    join_routers(model)
    grads = model(ids, use_cache=False, labels=ids).loss
    grads.backward()
    assert all(layer.weight.grad is not None for layer in joined_layers(model))
    seen = []
    router = model.lookup_attachment.modules[0].router
    handle = router.register_forward_hook(lambda *_: seen.append(1))
    seen_weights(model, ids)
    assert seen == [1]
    handle.remove()
    model.float()
    expected = bfloat16_model().float()
    assert_alike(seen_weights(model, ids), seen_weights(expected, ids))
    assert not uses_joint(model, ids, monkeypatch)


def test_a_copy_computes_with_its_own_weights(monkeypatch):
    model, ids = bfloat16_model(), token_ids(4, 1)
    join_routers(model)
    copied = deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(0.5)
    expected = bfloat16_model()
    expected.load_state_dict(copied.state_dict())
    assert_alike(seen_weights(copied, ids), seen_weights(expected, ids))
    assert_alike(seen_weights(model, ids), seen_weights(bfloat16_model(), ids))


def test_float32_is_left_alone():
    model = attached_model().eval()
    join_routers(model)
    assert not joined_layers(model)


def test_a_loaded_table_model_joins(tmp_path, monkeypatch):
    le.reparameterize(bfloat16_model(), tmp_path / "folded", encoding="bfloat16")
    model, ids = le.load(tmp_path / "folded"), token_ids(8, 1)
    assert uses_joint(model, ids, monkeypatch)
    assert_alike(seen_weights(model, ids), seen_weights(bfloat16_model(), ids))
