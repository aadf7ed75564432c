"""The forms of rows: made and read as their papers say, at any width, and silent at first."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import gateless_model, token_ids
from torch import Tensor, nn

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.forms import Sizes, get_form
from lookup_experts.model.forms.meki import MekiBlock, MekiRows
from lookup_experts.model.per_position import PerPositionExperts
from lookup_experts.model.settings import ROW_FORMS, LookupSettings

REPOSITORY = Path(__file__).resolve().parents[2]


class Given:
    """Rows that are there, [U, N, r], for every layer."""

    def __init__(self, rows: Tensor, index: Tensor) -> None:
        self.rows, self.index = rows, index
        self.num_positions = index.numel()

    def layer(self, layer, experts=None):
        return self.rows

    def mix(self, layer, weights, experts=None):
        return torch.einsum("tnr,tn->tr", self.rows[self.index.view(-1)], weights)


def attached(form: str, row_size: int | None = None, init: str = "normal", **arguments):
    torch.manual_seed(0)
    model = le.attach(gateless_model(), form=form, row_size=row_size, init=init, **arguments)
    for block in model.lookup_blocks:  # so that they matter
        for weight in block.parameters():
            if init == "normal":
                nn.init.normal_(weight, 0.0, 0.3)
    return model.eval()


# --- MeKi ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meki_oracle() -> dict[str, Tensor]:
    file = REPOSITORY.parent / "shared" / "oracles" / "meki" / "meki-d64-r16.safetensors"
    if not file.exists():
        pytest.skip("the oracle of MeKi's authors (../shared/oracles/meki) is not here")
    return load_file(file)


def meki_of(oracle: dict[str, Tensor]) -> tuple[MekiRows, MekiBlock]:
    """The layer with the authors' weights."""
    vocab_size, row_size = oracle["module.embeddings.weight"].shape
    expert_size, hidden_size = oracle["module.word_emb_projection.gate_proj.weight"].shape
    maker = MekiRows(vocab_size, hidden_size, expert_size, row_size, 1e-6)
    reader = MekiBlock(0, hidden_size, row_size, 1e-6)
    theirs = {
        name.removeprefix("module.")
        .replace("word_emb_projection.", "")
        .replace("embeddings.", "static."): weight
        for name, weight in oracle.items()
        if name.startswith("module.")
    }
    # The gate on the hidden state and the SwiGLU's have one name each in the authors' module.
    theirs["gate_proj.weight"] = oracle["module.word_emb_projection.gate_proj.weight"]
    maker.load_state_dict({name: theirs[name] for name in maker.state_dict()})
    reader.load_state_dict(
        {
            "gate_proj.weight": oracle["module.gate_proj.weight"],
            "out_proj.weight": oracle["module.out_proj.weight"],
            "post_norm.weight": oracle["module.post_norm.weight"],
        }
    )
    return maker, reader


def test_the_oracle_of_meki(meki_oracle):
    maker, reader = meki_of(meki_oracle)
    ids, hidden = meki_oracle["input_ids"], meki_oracle["hidden_states"]
    every = torch.arange(len(meki_oracle["word_embedding"]))
    with torch.no_grad():
        table = maker(meki_oracle["word_embedding"], every).transpose(0, 1)
        torch.testing.assert_close(table[:, 0], meki_oracle["table"], rtol=1e-5, atol=1e-5)
        unique, index = ids.unique(return_inverse=True)
        trained = maker(meki_oracle["word_embedding"][unique], unique).transpose(0, 1)
        for rows, where, name in ((trained, index, "train"), (table, ids, "table")):
            added = reader(hidden, Given(rows, where))
            expected = meki_oracle[f"expected.{name}"]
            torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)


def test_meki_has_no_experts_to_count():
    with pytest.raises(UserError, match="one row per layer, not 4; leave the number"):
        le.attach(gateless_model(), 4, form="meki")
    with pytest.raises(UserError, match="by 'swiglu', not 'gelu'"):
        le.attach(gateless_model(), form="meki", expert_kind="gelu")
    model = le.attach(gateless_model(), form="meki", row_size=8)
    assert model.lookup_settings.num_experts == 1


# --- every form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row_size", [None, 1, 5, 40])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_unique_ids_agree_with_every_position(form, row_size):
    model = attached(form, row_size)
    ids = token_ids(2, 9)
    own = model.expert_source
    gradients, logits = [], []
    for source in (own, PerPositionExperts()):
        model.set_expert_source(source)
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("row_size", [None, 6])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_a_form_adds_nothing_at_first_and_then_learns(form, row_size):
    ids = token_ids(2, 9)
    plain = gateless_model()
    with torch.no_grad():
        before = plain(input_ids=ids).logits
    model = le.attach(plain, form=form, row_size=row_size)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, first[name])]
    assert not [name for name in still if "lookup_experts" in name]


@pytest.mark.parametrize("row_size", [None, 5])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_few_operations_give_what_the_plain_ones_do(form, row_size):
    """Without gradients a block adds into the FFN's output; with them it doesn't."""
    model = attached(form, row_size)
    for length in (1, 7):
        ids = token_ids(2, length)
        with torch.no_grad():
            quick = model(input_ids=ids).logits
        torch.testing.assert_close(quick, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_size", [None, 5])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_a_form_is_saved_and_loaded(form, row_size, tmp_path):
    model = attached(form, row_size)
    ids = token_ids(1, 6)
    model.save_pretrained(tmp_path)
    loaded = le.load(tmp_path)
    assert loaded.lookup_settings == model.lookup_settings
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@settings(max_examples=30, deadline=None)
@given(num_experts=st.integers(1, 5), row_size=st.integers(1, 24), num_ids=st.integers(0, 6))
def test_rows_of_mole_have_the_width_that_was_asked_for(num_experts, row_size, num_ids):
    chosen = LookupSettings(num_experts, 7, (0,), row_size=row_size)
    form, sizes = get_form("mole"), Sizes(11, 6, 9)
    maker, reader = form.new_maker(chosen, sizes), form.new_reader(0, chosen, sizes)
    reader.routed = maker
    form.initialize(reader, "normal", 0.3)
    embeddings = torch.randn(num_ids, 6)
    rows = maker(maker.inputs(embeddings))
    assert rows.shape == (num_experts, num_ids, row_size)
    torch.testing.assert_close(
        rows.transpose(0, 1), maker.forward_reference(embeddings), rtol=1e-4, atol=1e-5
    )
    assert (reader.out_proj is None) == (row_size == 9)


def test_what_does_not_fit_is_refused():
    for wrong in (0, -3):
        with pytest.raises(UserError, match=f"row_size is {wrong}; a row has"):
            le.attach(gateless_model(), row_size=wrong)
    with pytest.raises(UserError, match=r"'mekki'.*Did you mean 'meki'"):
        le.attach(gateless_model(), form="mekki")


def test_the_papers_form_is_saved_as_it_always_was():
    """Folders of the paper's form are for older versions as well."""
    values = le.attach(gateless_model(), 2, row_size=32).lookup_settings.to_dict()
    assert "row_form" not in values and "row_size" not in values
    assert LookupSettings.from_dict(values).row_form == "mole"
