"""Every form of rows from training to a table and back, at widths of all kinds."""

import pytest
import torch
from tiny_models import gateless_model, logits_of, token_ids
from torch import nn

import lookup_experts as le
from lookup_experts.errors import TableError
from lookup_experts.model.settings import ROW_FORMS
from lookup_experts.table.opening import open_table

IDS = token_ids(3, 40)


def trained(form: str, row_size: int | None):
    torch.manual_seed(1)
    model = le.attach(gateless_model(), form=form, row_size=row_size, init="normal")
    for block in model.lookup_blocks:
        for weight in block.parameters():
            nn.init.normal_(weight, 0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("store", ["memory", "mmap", "direct"])
@pytest.mark.parametrize("row_size", [None, 1, 7, 48])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_a_table_gives_what_training_form_gave(form, row_size, store, tmp_path):
    model = trained(form, row_size)
    expected = logits_of(model, IDS)
    le.reparameterize(model, tmp_path / "folded", encoding="float32")
    loaded = le.load(tmp_path / "folded", store=store)
    for ids in (IDS, IDS[:1, :1], IDS[:, :5]):
        torch.testing.assert_close(
            logits_of(loaded, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=1e-5, atol=1e-5)
    kept = {name for name, _ in loaded.named_parameters() if ".lookup_experts." in name}
    assert kept and not [name for name in kept if ".routed." in name]


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "int8", "nf4", "nf3"])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_every_encoding_holds_every_form(form, encoding, tmp_path):
    model = trained(form, 12)
    le.reparameterize(model, tmp_path / "folded", encoding=encoding)
    found = logits_of(le.load(tmp_path / "folded", store="direct", cache="64kB"), IDS)
    plain = logits_of(model, IDS)
    worst = {"bfloat16": 0.02, "float16": 0.005, "int8": 0.03}.get(encoding, 0.3)
    assert float((found - plain).norm() / plain.norm()) < worst


@pytest.mark.parametrize("form", ROW_FORMS)
def test_a_folder_says_how_wide_its_rows_are(form, tmp_path):
    le.reparameterize(trained(form, 5), tmp_path / "five")
    le.reparameterize(trained(form, 6), tmp_path / "six")
    rows = 4 if form == "mole" else 1
    shape = open_table(tmp_path / "five" / "table").layout.shape
    assert (shape.num_experts, shape.row_size) == (rows, 5)
    (tmp_path / "five" / "table").rename(tmp_path / "away")
    (tmp_path / "six" / "table").rename(tmp_path / "five" / "table")
    with pytest.raises(TableError, match="made for"):
        le.load(tmp_path / "five")


@pytest.mark.parametrize("form", ROW_FORMS)
def test_generation_goes_on_as_in_training_form(form, tmp_path):
    model = trained(form, 8)
    le.reparameterize(model, tmp_path / "folded", encoding="float32")
    loaded = le.load(tmp_path / "folded", store="direct", cache="1MB")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(IDS[:2, :6], **options), model.generate(IDS[:2, :6], **options)
    )
