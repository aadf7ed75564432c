"""Keys and values are passed and found by whatever name transformers and the model use."""

import pytest
import torch
from tiny_models import attached_model, tiny_model, token_ids
from transformers.utils import ModelOutput

from lookup_experts.model.cache_names import cache_argument, cache_of


@pytest.mark.parametrize("make", [tiny_model, attached_model])
def test_a_models_own_cache_is_taken_back(make, recwarn):
    model, ids = make("llama").eval(), token_ids(1, 9)
    with torch.inference_mode():
        cache = {cache_argument(model): cache_of(model(ids[:, :8], use_cache=True))}
        found = model(ids[:, 8:], use_cache=True, **cache).logits[:, -1]
        expected = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


class OwnCode:
    """A model with code of its own, from before the new name."""

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        return ModelOutput(past_key_values=past_key_values)


def test_models_with_code_of_their_own_keep_the_old_name():
    model = OwnCode()
    assert cache_argument(model) == "past_key_values"
    assert cache_of(model.forward(None, past_key_values=["keys"])) == ["keys"]
