"""Steps of decoding that attend by two products give what `sdpa` gives."""

import pytest
import torch
from tiny_models import tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lookup_experts as le
from lookup_experts.model import attention

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no products in bfloat16 here"
)


class Module(torch.nn.Module):
    is_causal = True

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_sees_what_the_fused_attention_sees(groups, mask, scaling, monkeypatch):
    torch.manual_seed(0)
    query = torch.randn(4, 6, 1, 16).bfloat16()
    key, value = (torch.randn(4, 6 // groups, 40, 16).bfloat16() for _ in range(2))
    hidden = None
    if mask is not None:
        hidden = torch.rand(4, 1, 1, 40) < 0.7
        hidden[..., -1] = True
        if mask != torch.bool:
            hidden = torch.zeros(hidden.shape, dtype=mask).masked_fill(~hidden, -torch.inf)
    arguments = (Module(groups), query, key, value, hidden)
    with torch.no_grad():
        expected, _ = sdpa_attention_forward(*arguments, scaling=scaling)
        monkeypatch.setattr(attention, "sdpa_attention_forward", None)
        found, _ = attention.attend(*arguments, scaling=scaling)
    assert found.shape == expected.shape == (4, 1, 6, 16)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_loaded_models_decode_the_same_and_save_nothing_of_it(tmp_path):
    tiny_model("llama", initializer_range=0.1).to(torch.bfloat16).save_pretrained(tmp_path / "one")
    fast, plain = (le.load(tmp_path / "one", weights=kind) for kind in ("auto", "plain"))
    assert fast.config._attn_implementation == attention.NAME
    assert plain.config._attn_implementation == "sdpa"
    prompts = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0  # padded on the left
    for model in (fast, plain):
        model.generation_config.eos_token_id = None
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    found, expected = (
        model.generate(prompts, **options, output_scores=True, return_dict_in_generate=True)
        for model in (fast, plain)
    )
    for one, other in zip(found.scores[:3], expected.scores[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=5e-2)
    fast.save_pretrained(tmp_path / "two")
    assert attention.NAME not in (tmp_path / "two" / "config.json").read_text()


def test_what_is_no_step_goes_the_fused_way(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    fast, plain = (le.load(tmp_path, weights=kind) for kind in ("auto", "plain"))
    ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, plain(ids).logits)
    fast(ids[:, :1], labels=ids[:, :1]).logits.sum().backward()
    assert le.load(tmp_path, dtype="float32").config._attn_implementation == "sdpa"
