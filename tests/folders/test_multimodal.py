"""Models that take images beside text: attached to their text part, with images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import greedy, randomize_experts, tiny_config, token_ids
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.generation.inspection import verify_folder
from lookup_experts.model.blocks import find_ffns

VOCAB, IMAGE, VIDEO = 97, 96, 95
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
# As many blocks as the text part has: they aren't to be taken for it.
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}
_QWEN_TEXT = {
    **_TEXT,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 94,
    "vision_end_token_id": 93,
}


def _ids_with_an_image(placeholder: int = IMAGE) -> Tensor:
    """Two texts, each with one image of four positions."""
    ids = token_ids(2, 11, vocab_size=90)
    ids[:, 2:6] = placeholder
    return ids


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@dataclass
class Family:
    """A tiny multi-modal model and what it takes beside the ids of `_ids_with_an_image`."""

    config: Callable[[], Any]
    image: Callable[[Tensor], dict[str, Tensor]]


def _plain_image(ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _pixels(2, 3, 16, 16)}


def _qwen_image(ids: Tensor, patch: int) -> dict[str, Tensor]:
    return {
        "pixel_values": _pixels(32, 3 * 2 * patch * patch),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def _gemma3(placeholder: int = IMAGE) -> Any:
    return AutoConfig.for_model(
        "gemma3",
        text_config=dict(_TEXT, model_type="gemma3_text"),
        vision_config=dict(_VISION, model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=placeholder,
    )


FAMILIES = {
    "gemma3": Family(
        _gemma3,
        lambda ids: {**_plain_image(ids), "token_type_ids": (ids >= IMAGE).int()},
    ),
    "llava": Family(
        lambda: AutoConfig.for_model(
            "llava",
            text_config=dict(_TEXT, model_type="llama"),
            vision_config=dict(_VISION, model_type="clip_vision_model"),
            image_token_index=IMAGE,
        ),
        _plain_image,
    ),
    "qwen2_5_vl": Family(
        lambda: AutoConfig.for_model(
            "qwen2_5_vl", text_config=_QWEN_TEXT, vision_config=_QWEN_VISION, **_QWEN_IDS
        ),
        lambda ids: _qwen_image(ids, 14),
    ),
    "qwen3_vl": Family(
        lambda: AutoConfig.for_model(
            "qwen3_vl",
            text_config=_QWEN_TEXT,
            vision_config={**_QWEN_VISION, "deepstack_visual_indexes": [0]},
            **_QWEN_IDS,
        ),
        lambda ids: _qwen_image(ids, 16),
    ),
    "gemma4": Family(
        lambda: AutoConfig.for_model(
            "gemma4",
            text_config={
                **_TEXT,
                "vocab_size_per_layer_input": VOCAB,
                "hidden_size_per_layer_input": 8,
            },
            vision_config={
                **_VISION,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 8,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=94,
        ),
        lambda ids: {
            "pixel_values": _pixels(2, 16, 3 * 8 * 8).sigmoid(),
            "image_position_ids": torch.cartesian_prod(*[torch.arange(4)] * 2).repeat(2, 1, 1),
            "mm_token_type_ids": (ids == IMAGE).int(),
        },
    ),
}


def _backbone(family: str, config: Any = None) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family].config() if config is None else config
    return AutoModelForImageTextToText.from_config(config).eval()


def _attach(model: Any, **settings: Any) -> Any:
    le.attach(model, 3, expert_size=8, init="normal", **settings)
    randomize_experts(model)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def _inputs(family: str) -> list[dict[str, Tensor]]:
    """With an image in each text, and without."""
    ids = _ids_with_an_image()
    text = token_ids(2, 9, vocab_size=90)
    plain: dict[str, Tensor] = {"input_ids": text}
    if family == "gemma3":
        plain["token_type_ids"] = torch.zeros_like(text)
    elif family == "gemma4":
        plain["mm_token_type_ids"] = torch.zeros_like(text)
    return [{"input_ids": ids, **FAMILIES[family].image(ids)}, plain]


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


# ------------------------------------------------------------------------------------- attaching


def test_silent_experts_change_nothing(family):
    model = _backbone(family)
    expected = [_logits(model, inputs) for inputs in _inputs(family)]
    le.attach(model, 2)
    assert len(model.lookup_blocks) == 2
    assert model.lookup_settings.expert_size == 48
    for inputs, logits in zip(_inputs(family), expected, strict=True):
        assert torch.equal(_logits(model, inputs), logits)


def test_experts_add_nothing_where_images_are(family):
    model = _attach(_backbone(family))
    before, added = [], []
    for ffn in find_ffns(model):
        ffn.register_forward_hook(lambda *call: before.append(call[-1]), prepend=True)
        ffn.register_forward_hook(lambda *call: added.append(call[-1] - before[-1]))
    with_image, plain = _inputs(family)
    is_image = with_image["input_ids"] == IMAGE
    _logits(model, with_image)
    for output in added:
        assert not output[is_image].any()
        assert (output[~is_image].norm(dim=-1) > 0.1).all()
    added.clear()
    _logits(model, plain)
    assert all((output.norm(dim=-1) > 0.1).all() for output in added)


def test_gradients_reach_experts_from_texts_with_images(family):
    model = _attach(_backbone(family), train_backbone=False).train()
    inputs = _inputs(family)[0]
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, labels=labels).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == (
            ".lookup_experts." in name
        ), name


# --------------------------------------------------------------------------- saving and folding


def test_a_round_trip(family, tmp_path):
    model = _attach(_backbone(family))
    expected = [_logits(model, inputs) for inputs in _inputs(family)]
    model.save_pretrained(tmp_path / "saved")
    for load in (AutoModelForImageTextToText.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "saved")
        assert type(loaded) is type(model)
        for inputs, logits in zip(_inputs(family), expected, strict=True):
            torch.testing.assert_close(_logits(loaded.eval(), inputs), logits)
    assert type(le.load(tmp_path / "saved")) is type(model)


def test_experts_alone(family, tmp_path):
    _backbone(family).save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForImageTextToText.from_pretrained(tmp_path / "backbone")
    model = _attach(backbone, train_backbone=False, save="experts")
    model.save_pretrained(tmp_path / "experts")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "experts")
    for inputs in _inputs(family):
        torch.testing.assert_close(_logits(loaded, inputs), _logits(model, inputs))


@pytest.mark.parametrize("store", ["memory", "direct"])
def test_folded_it_says_the_same(store, family, tmp_path):
    model = _attach(_backbone(family))
    model.save_pretrained(tmp_path / "saved")
    le.reparameterize(tmp_path / "saved", tmp_path / "out", encoding="float32")
    assert not verify_folder(tmp_path / "out").problems
    folded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", store=store)
    for inputs in _inputs(family):
        torch.testing.assert_close(
            _logits(folded, inputs), _logits(model, inputs), rtol=1e-5, atol=1e-5
        )
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        found = greedy(folded, inputs["input_ids"], 8, **rest)
        assert torch.equal(found, greedy(model, inputs["input_ids"], 8, **rest))


def test_a_placeholder_needs_no_row(tmp_path):
    """Gemma 3's image id can lie beyond the vocabulary."""
    model = _attach(_backbone("gemma3", _gemma3(placeholder=VOCAB + 3)))
    ids = _ids_with_an_image(VOCAB + 3)
    inputs = {"input_ids": ids, **FAMILIES["gemma3"].image(ids)}
    expected = _logits(_attach(_backbone("gemma3")), _inputs("gemma3")[0])
    torch.testing.assert_close(_logits(model, inputs), expected)
    le.reparameterize(model, tmp_path / "out", encoding="float32")
    torch.testing.assert_close(_logits(le.load(tmp_path / "out"), inputs), expected)
    with pytest.raises(UserError, match="outside"):
        _logits(model, {"input_ids": ids.where(ids < VOCAB, VOCAB + 2)})


# -------------------------------------------------------------------------------------- refusals


class NamelessConfig(PreTrainedConfig):
    model_type = "nameless"
    hidden_size = 8


class Nameless(PreTrainedModel):
    config_class = NamelessConfig
    base_model_prefix = "model"


class Pixels(Nameless):
    main_input_name = "pixel_values"


def _without_placeholders() -> Any:
    class Composite(NamelessConfig):
        def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
            return NamelessConfig()

    return Nameless(Composite())


REFUSED = {
    "an encoder and a decoder": lambda: AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(
            "t5", vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
        )
    ),
    "takes pixel_values": lambda: Pixels(NamelessConfig()),
    "no causal LM that transformers knows": lambda: Nameless(NamelessConfig()),
    "doesn't say which token ids": _without_placeholders,
    "LlamaModel has no language-model head.*LlamaForCausalLM": lambda: AutoModel.from_config(
        tiny_config("llama")
    ),
    "LlamaForSequenceClassification has no language-model head": lambda: (
        AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    ),
    "LlavaModel has no language-model head.*LlavaForConditionalGeneration": lambda: (
        AutoModel.from_config(FAMILIES["llava"].config())
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_experts_have_no_place_in_is_refused_before_the_first_change(reason):
    model = REFUSED[reason]()
    kind, names = type(model), list(model.state_dict())
    with pytest.raises(UserError, match=reason) as refused:
        le.attach(model, 2)
    assert "\n" not in str(refused.value)
    assert type(model) is kind
    assert list(model.state_dict()) == names
    assert not model._forward_pre_hooks
    assert not hasattr(model.config, "lookup_experts")
