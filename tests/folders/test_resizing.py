"""The vocabulary of attached models, resized as transformers does it."""

import pytest
import torch
from tiny_models import VOCAB, attached_model, gateless_model, logits_of, token_ids

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.settings import ROW_FORMS

IDS = token_ids(2, 9)


def attached(form: str):
    experts = {"row_size": 6} if form == "meki" else {"num_experts": 2, "row_size": 6}
    torch.manual_seed(0)
    return le.attach(gateless_model(), form=form, init="normal", **experts).eval()


@pytest.mark.parametrize("vocab_size", [120, 64])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_more_and_fewer_token_ids(form, vocab_size, tmp_path):
    model = attached(form)
    ids = IDS % 60 + 1
    expected = logits_of(model, ids)[..., :64]
    model.resize_token_embeddings(vocab_size)
    torch.testing.assert_close(logits_of(model, ids)[..., :64], expected)
    model.save_pretrained(tmp_path / "experts")
    loaded = le.load(tmp_path / "experts")
    le.reparameterize(loaded, tmp_path / "folded", encoding="float32")
    folded = le.load(tmp_path / "folded", store="direct")
    last = torch.full((1, 3), vocab_size - 1)
    for chosen in (ids, last):
        for other in (loaded, folded):
            found = logits_of(other, chosen)
            torch.testing.assert_close(found, logits_of(model, chosen), rtol=1e-5, atol=1e-5)


def test_new_static_rows_are_drawn_and_learn():
    """With the spread of the backbone's own initialisation, which is 0.3 here."""
    model = attached("meki")
    before = [block.routed.static.weight.clone() for block in model.lookup_blocks]
    model.resize_token_embeddings(2000)
    added = [block.routed.static.weight[VOCAB:] for block in model.lookup_blocks]
    for block, old in zip(model.lookup_blocks, before, strict=True):
        static = block.routed.static
        assert static.weight.shape == (2000, 6) and static.num_embeddings == 2000
        assert torch.equal(static.weight[:VOCAB], old)
    assert all(float(new.detach().std()) == pytest.approx(0.3, rel=0.1) for new in added)
    assert not torch.equal(added[0], added[1])
    new_id = torch.full((1, 4), 1999)
    model(input_ids=new_id, labels=new_id).loss.backward()
    for block in model.lookup_blocks:
        gradient = block.routed.static.weight.grad
        assert gradient[1999].any() and not gradient[:1999].any()


def test_frozen_rows_stay_frozen():
    model = attached("meki")
    model.lookup_blocks[0].routed.static.weight.requires_grad_(False)
    model.resize_token_embeddings(100)
    assert [b.routed.static.weight.requires_grad for b in model.lookup_blocks] == [
        False,
        True,
        True,
    ]


def test_a_multiple_is_a_size_too():
    model = attached("meki")
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.lookup_blocks[0].routed.static.num_embeddings == 128
    assert model.resize_token_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("form", ROW_FORMS)
def test_a_table_has_the_ids_that_it_has(form, tmp_path):
    le.reparameterize(attached(form), tmp_path / "folded")
    folded = le.load(tmp_path / "folded")
    with pytest.raises(UserError, match=r"in table form can't be resized.*Resize the model in"):
        folded.resize_token_embeddings(120)
    with pytest.raises(UserError, match="can't be resized"):
        folded.resize_token_embeddings(pad_to_multiple_of=64)
    assert folded.resize_token_embeddings().weight.shape[0] == VOCAB
    assert logits_of(folded, IDS).shape[-1] == VOCAB


def test_every_family_resizes():
    model = attached_model("gpt2", form="meki", num_experts=1, expert_size=None)
    model.resize_token_embeddings(VOCAB + 3)
    assert logits_of(model, torch.full((1, 2), VOCAB + 2)).isfinite().all()
