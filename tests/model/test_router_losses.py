"""Auxiliary losses of routers: their formulas, and that only training has them."""

import pytest
import torch
from tiny_models import attached_model, moe_model, token_ids
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lookup_experts.errors import UserError
from lookup_experts.model.router_losses import add_router_losses, load_balance_loss, z_loss


def router_logits(positions=40, experts=5, seed=0):
    return torch.randn(positions, experts, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("selected", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_is_mixtrals_for_one_layer(selected, padded):
    logits = router_logits()
    mask = (torch.arange(40) % 3 > 0).long() if padded else None
    theirs = load_balancing_loss_func(
        (logits,), 5, selected, None if mask is None else mask.view(4, 10)
    )
    torch.testing.assert_close(load_balance_loss(logits, selected, mask), theirs)


def test_load_balance_of_a_balanced_and_of_a_collapsed_router():
    balanced = 50 * torch.eye(4).repeat(3, 1)
    assert load_balance_loss(balanced, 1).item() == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(12, 1)
    assert load_balance_loss(collapsed, 1).item() == pytest.approx(4)


def test_following_its_gradient_balances_a_router():
    logits = (router_logits(200) + torch.tensor([3.0, 0, 0, 0, 0])).requires_grad_()
    before = load_balance_loss(logits, 2)
    (gradient,) = torch.autograd.grad(before, logits)
    after = load_balance_loss(logits - 200 * gradient, 2)
    assert after < before


def test_z_loss_is_the_square_of_the_log_of_the_sum():
    logits = router_logits(3, 2)
    expected = sum(float(torch.log(torch.exp(row).sum())) ** 2 for row in logits) / 3
    assert z_loss(logits).item() == pytest.approx(expected, rel=1e-5)
    assert z_loss(logits, torch.tensor([1, 1, 0])).item() == pytest.approx(
        z_loss(logits[:2]).item()
    )
    assert z_loss(logits.bfloat16()).dtype == torch.float32


def losses_by_hand(model, ids):
    """(load balance, z): the means over the layers, from the routers' own outputs."""
    seen = []
    hooks = [
        ffn.router.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for ffn in model.moe_layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    balance = sum(load_balance_loss(logits, 2) for logits in seen) / len(seen)
    return float(balance), float(sum(z_loss(logits) for logits in seen) / len(seen))


def test_only_the_training_loss_has_them():
    model = moe_model(load_balance_loss=0.3, z_loss=0.2)
    ids = token_ids(2, 9)
    language_model = float(model(input_ids=ids, labels=ids).loss.detach())
    balance, z = losses_by_hand(model, ids)
    model.train()
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    assert loss == pytest.approx(language_model + 0.3 * balance + 0.2 * z, rel=1e-5)
    sums = model.router_losses.take_sums("cpu").tolist()
    assert sums == pytest.approx([balance, z, 1], rel=1e-5)
    assert model.router_losses.take_sums("cpu").tolist() == [0, 0, 0]
    as_tuple = model(input_ids=ids, labels=ids, return_dict=False)
    assert float(as_tuple[0].detach()) == pytest.approx(loss, rel=1e-6)


def test_without_labels_there_is_nothing_to_add():
    model = moe_model().train()
    assert model(input_ids=token_ids(1, 4)).loss is None
    assert model.router_losses.take_sums("cpu").tolist() == [0, 0, 0]


def test_padding_does_not_count():
    model = moe_model(load_balance_loss=1.0).train()
    ids = token_ids(1, 6)
    labels = ids.clone()
    model(input_ids=ids, labels=labels)
    expected = model.router_losses.take_sums("cpu")
    padding = torch.zeros(1, 3, dtype=torch.long)
    model(
        input_ids=torch.cat([ids, padding], 1),
        labels=torch.cat([labels, padding - 100], 1),
        attention_mask=torch.cat([torch.ones_like(ids), padding], 1),
    )
    torch.testing.assert_close(model.router_losses.take_sums("cpu"), expected)


def test_a_micro_batch_weighs_as_much_as_its_language_model_loss():
    """The Trainer's way: sums over micro batches, divided by the items of the whole step."""
    model = moe_model(load_balance_loss=0.5, z_loss=0.5).train()
    ids = token_ids(1, 9)
    whole = float(model(input_ids=ids, labels=ids).loss.detach())
    items = torch.tensor(4 * 8)
    quarter = float(model(input_ids=ids, labels=ids, num_items_in_batch=items).loss.detach())
    assert 4 * quarter == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_their_gradient_or_says_that_it_cannot(reentrant):
    ids = token_ids(2, 9)
    model = moe_model(load_balance_loss=1.0, z_loss=1.0).train()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(UserError, match="use_reentrant"):
            model(input_ids=ids, labels=ids)
        return
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    # Recomputation in the backward pass was not counted.
    assert model.router_losses.take_sums("cpu")[2] == 2


def test_they_can_be_added_to_lookup_experts():
    model = attached_model("llama").train()
    ids = token_ids(2, 9)
    before = float(model(input_ids=ids, labels=ids).loss.detach())
    add_router_losses(model, 1, 0.3, 0.2)
    loss = model(input_ids=ids, labels=ids).loss
    balance, z, _ = model.router_losses.take_sums("cpu").tolist()
    assert balance >= 1 - 1e-4
    assert float(loss.detach()) == pytest.approx(before + 0.3 * balance + 0.2 * z, rel=1e-5)
    model.eval()
    assert float(model(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(before, rel=1e-6)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = moe_model().train()
    ids = token_ids(1, 5)
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=ids, labels=ids[:, :0].expand(2, 0))
    model(input_ids=ids, labels=ids)
    assert model.router_losses.take_sums("cpu")[2] == 1
