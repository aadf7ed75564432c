"""Attaching in place: exact at the start, nothing renamed, refusals before the first change."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import (
    FAMILIES,
    attached_model,
    gateless_model,
    greedy,
    greedy_reference,
    logits_of,
    randomize_experts,
    tiny_model,
    token_ids,
)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import routed_experts

IDS = token_ids(2, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_changes_nothing_until_the_experts_speak(family):
    model = tiny_model(family)
    before = logits_of(model, IDS)
    names = [name for name, _ in model.named_parameters()]
    backbone = type(model)
    attached = le.attach(model, num_experts=2, expert_size=8)
    assert attached is model
    assert isinstance(model, backbone)
    assert torch.equal(before, logits_of(model, IDS))
    new_names = [name for name, _ in model.named_parameters()]
    assert [name for name in new_names if ".lookup_experts." not in name] == names
    randomize_experts(model)
    assert (logits_of(model, IDS) - before).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_with_a_cache_as_without(family):
    model = attached_model(family)
    prompt = token_ids(1, 6)
    assert torch.equal(greedy(model, prompt, 5), greedy_reference(model, prompt, 5))


def test_both_kinds_start_silent():
    for kind in ("gelu", "swiglu"):
        model = tiny_model("llama")
        before = logits_of(model, IDS)
        le.attach(model, 3, expert_kind=kind)
        assert torch.equal(before, logits_of(model, IDS))
        assert all(bool((layer.up_proj != 0).all()) for layer in _experts(model))


def _experts(model):
    return routed_experts(model)


def test_zero_experts_learn_from_the_first_step():
    model = le.attach(tiny_model("llama"), 2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool((layer.down_proj.grad != 0).any()) for layer in _experts(model))


def test_normal_experts_are_drawn_as_the_backbone_draws():
    model = le.attach(tiny_model("llama", initializer_range=0.05), 4, expert_size=64, init="normal")
    for layer in _experts(model):
        assert layer.down_proj.std().item() == pytest.approx(0.05, rel=0.1)
        assert layer.up_proj.std().item() == pytest.approx(0.05, rel=0.1)
        assert torch.equal(layer.norm.weight, torch.ones(32))


def test_experts_are_as_wide_as_the_backbone_ffn_unless_said():
    assert le.attach(tiny_model("llama"), 1).lookup_settings.expert_size == 48
    assert (
        le.attach(
            tiny_model("gpt2", n_inner=40, intermediate_size=None), 1
        ).lookup_settings.expert_size
        == 40
    )
    assert le.attach(tiny_model("llama"), 1, expert_size=5).lookup_settings.expert_size == 5


def test_layers_choose_the_blocks_that_gain_experts():
    model = tiny_model("llama")
    before = logits_of(model, IDS)
    le.attach(model, 2, layers=[2, 0, 2], expert_size=8)
    assert model.lookup_settings.layers == (0, 2)
    assert [hasattr(block.mlp, "lookup_experts") for block in model.model.layers] == [
        True,
        False,
        True,
    ]
    randomize_experts(model)
    assert not torch.equal(before, logits_of(model, IDS))


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 7]])
def test_wrong_layers_are_refused(layers):
    _refused(tiny_model("llama"), r"blocks are 0 to 2", layers=layers)


def test_wrong_arguments_are_refused():
    _refused(tiny_model("llama"), "at least one expert", num_experts=0)
    _refused(tiny_model("llama"), "at least one expert", expert_size=-1)
    _refused(tiny_model("llama"), "at least one expert", expert_size=0)
    _refused(tiny_model("llama"), "Did you mean 'swiglu'", expert_kind="swigl")
    _refused(tiny_model("llama"), "Did you mean 'zero'", init="zeros")


def test_a_model_without_one_ffn_per_block_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "opt",
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    _refused(model, "model type 'opt'")


def test_a_model_whose_last_block_has_no_ffn_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].other = model.model.layers[2].mlp
    del model.model.layers[2].mlp
    _refused(model, r"model type 'llama'.*block 2")


def test_a_model_whose_blocks_share_an_ffn_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    _refused(model, "share an FFN")


def test_a_second_attach_is_refused():
    _refused(attached_model("llama"), "has lookup experts already")


def _refused(model, message: str, **arguments) -> None:
    """`attach` refuses, and the model is what it was."""
    before = _everything(model)
    with pytest.raises(UserError, match=message):
        le.attach(model, **arguments)
    assert _everything(model) == before


def _everything(model) -> tuple:
    """What an attachment changes: class, modules, parameters, hooks, configuration."""
    return (
        type(model),
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(weight)) for name, weight in model.named_parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        type(model.config),
        json.dumps(model.config.to_dict(), default=str, sort_keys=True),
    )


def test_dtype_and_device_are_those_of_each_ffn():
    model = le.attach(tiny_model("llama").bfloat16(), 2)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert logits_of(model, IDS).dtype == torch.bfloat16


def test_embeddings_without_ids_are_refused():
    model = attached_model("llama")
    with pytest.raises(UserError, match=r"needs input_ids.*was given inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(UserError, match="was given neither"):
        model()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_base_model_can_be_called_by_itself(family):
    model = attached_model(family)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        by_name = model.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden, by_name)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits_of(model, IDS))


def test_a_copy_is_another_model():
    model = attached_model("llama")
    expected = logits_of(model, IDS)
    copied = copy.deepcopy(model)
    randomize_experts(model, seed=9)
    assert torch.equal(logits_of(copied, IDS), expected)
    assert not torch.equal(logits_of(model, IDS), expected)
    logits_of(copied, token_ids(2, 9, seed=4))  # the copy's ids aren't the original's
    assert copied.lookup_entrance is not model.lookup_entrance


def test_a_model_can_be_copied_between_forward_and_backward():
    model = attached_model("llama").train()
    loss = model(input_ids=IDS, labels=IDS).loss
    copied = copy.deepcopy(model)
    loss.backward()
    torch.testing.assert_close(copied(input_ids=IDS, labels=IDS).loss, loss)


def test_settings_survive_their_dictionary():
    settings = LookupSettings(4, 16, (0, 2), "swiglu", 1e-5, "table", "abc")
    assert LookupSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_unknown_settings_are_refused_with_the_nearest():
    values = LookupSettings(4, 16, (0,)).to_dict()
    with pytest.raises(UserError, match=r"'num_expert'.*Did you mean 'num_experts'"):
        LookupSettings.from_dict(values | {"num_expert": 3})
    with pytest.raises(UserError, match="Unknown form 'tables'"):
        LookupSettings.from_dict(values | {"form": "tables"})
    del values["layers"]
    with pytest.raises(UserError, match="layers"):
        LookupSettings.from_dict(values)


def test_the_paper_backbone_is_a_llama_without_gates():
    model = gateless_model()
    assert isinstance(model, LlamaForCausalLM)
    assert not any("gate_proj" in name for name, _ in model.named_parameters())
    inputs = torch.randn(2, 32)
    mlp = model.model.layers[0].mlp
    expected = mlp.down_proj(torch.nn.functional.gelu(mlp.up_proj(inputs)))
    torch.testing.assert_close(mlp(inputs), expected)


def test_shapes_of_the_paper():
    from lookup_experts.model.gateless_llama import paper_config

    config = paper_config("410m", vocab_size=100)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (
        1024,
        24,
        4096,
    )
    assert (config.vocab_size, config.initializer_range) == (100, 0.01)
    with pytest.raises(UserError, match=r"Unknown shape '160'.*Did you mean '160m'"):
        paper_config("160")


def test_threads_may_share_a_model():
    """Rows were once handed to the blocks through one place for all threads: wrong logits."""
    model = attached_model("llama")
    batches = [token_ids(2, 7 + number) for number in range(4)]
    expected = [logits_of(model, ids) for ids in batches]

    def is_right(number: int) -> bool:
        return torch.equal(logits_of(model, batches[number % 4]), expected[number % 4])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_right, range(200)))


def test_what_others_hang_on_the_router_is_called_and_the_ffn_output_is_theirs():
    """Without gradients a block goes straight to the operations, unless somebody is in between."""
    model = attached_model("llama")
    ids = token_ids(2, 5)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        kept = []
        block.down_proj.register_forward_hook(
            lambda *call: kept.append((call[-1], call[-1].clone()))
        )
        seen = []
        handles = [
            module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
            for module in (block.lookup_experts, block.lookup_experts.router)
        ]
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert seen == ["Linear", "LookupExperts"]
        for handle in handles:
            handle.remove()
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert all(torch.equal(output, copy) for output, copy in kept)

        class Doubled(torch.nn.Linear):
            def forward(self, inputs):
                return 2 * super().forward(inputs)

        block.lookup_experts.router.__class__ = Doubled
        adapted = model(input_ids=ids).logits
        block.lookup_experts.router.__class__ = torch.nn.Linear
        block.lookup_experts.router.weight.mul_(2)
        torch.testing.assert_close(adapted, model(input_ids=ids).logits)
        assert not torch.equal(adapted, plain)
