"""The report on an encoding: each number by hand or against a plain computation."""

import json
import math

import numpy as np
import pytest
import torch
from random_tables import make_table
from tiny_models import VOCAB, attached_model, logits_of, token_ids

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.evaluation.perplexity import perplexity
from lookup_experts.evaluation.quality import (
    compare_on_text,
    format_quality,
    measure_quality,
    quality_against_experts,
    quality_against_table,
    row_error,
)
from lookup_experts.generation.reencoding import reencode
from lookup_experts.table.opening import open_table

TEXT = token_ids(1, 301, seed=5)[0]
ENCODINGS = ["float32", "bfloat16", "float16", "int8", "nf4", "nf3"]
# Relative errors of random rows: the largest of a tiny model, with room to spare.
TOLERANCES = dict(zip(ENCODINGS, [1e-6, 3e-3, 4e-4, 0.01, 0.12, 0.22], strict=True))


@pytest.fixture(scope="module")
def model(training_folder):
    return le.load(training_folder)


@pytest.fixture(scope="module")
def tables(tmp_path_factory, model):
    """A table of the model's experts in every encoding."""
    folder = tmp_path_factory.mktemp("tables")
    return {
        encoding: le.reparameterize(model, folder / encoding, encoding=encoding)
        for encoding in ENCODINGS
    }


def shifted(factors):
    """A reference from which a table of ones is off: rows of the given numbers, by layer."""

    def rows_of(ids):
        for factor in factors:
            yield torch.full((len(ids), 2, 8), factor)

    return rows_of


@pytest.fixture
def table_of_ones(tmp_path):
    from lookup_experts.table.build import BuildPlan, build_table

    table, _ = make_table(tmp_path / "random", encoding="float32")
    return build_table(tmp_path / "ones", BuildPlan(table.manifest, 7), shifted([1.0, 1.0]))


def test_row_errors_by_hand(table_of_ones):
    exact = row_error(table_of_ones, shifted([1.0, 1.0]))
    assert (exact.relative_error, exact.worst_layer_error) == (0, 0)
    assert exact.sampled_ids == 40  # all of them
    found = row_error(table_of_ones, shifted([1.0, 2.0]), num_ids=10)
    assert found.sampled_ids == 10
    assert (found.worst_layer, found.worst_layer_error) == (1, 0.5)
    assert found.relative_error == pytest.approx(math.sqrt(1 / (1 + 4)))


def test_silent_experts_are_stored_without_error(tmp_path):
    """An attached model's experts say nothing at first, and zero can't be divided by."""
    model = attached_model("llama")
    with torch.no_grad():
        for module in model.lookup_blocks:
            module.routed.down_proj.zero_()
    table = le.reparameterize(model, tmp_path / "out", encoding="nf4")
    found = quality_against_experts(table, model)
    assert (found.rows.relative_error, found.rows.worst_layer_error) == (0, 0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_row_errors_are_those_of_the_whole_table(encoding, model, tables):
    """There are fewer ids than are sampled, so nothing is left out."""
    found = quality_against_experts(tables[encoding], model)
    layout, shape = tables[encoding].layout, tables[encoding].layout.shape
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        differences, norms = [], []
        for module in model.lookup_blocks:
            rows = module.routed.forward_reference(embeddings)
            codes = layout.encoding.encode(rows)
            decoded = layout.encoding.decode(
                codes, shape.num_experts, shape.row_size, torch.float32
            )
            differences.append((decoded - rows).norm())
            norms.append(rows.norm())
    expected = torch.stack(differences).norm() / torch.stack(norms).norm()
    assert found.rows.relative_error == pytest.approx(float(expected), rel=0.01, abs=1e-6)
    assert found.rows.relative_error <= found.rows.worst_layer_error <= TOLERANCES[encoding]
    assert found.text is None


def test_sizes(model, tables):
    by_encoding = {name: quality_against_experts(table, model) for name, table in tables.items()}
    # 3 layers, 4 experts, 32 numbers: nf4 takes 4 bits and a float16 scale for each row of 32.
    assert by_encoding["float16"].record_bytes == 3 * 4 * 32 * 2
    assert by_encoding["nf4"].record_bytes == 3 * 4 * (16 + 2)
    assert by_encoding["nf4"].share_of_float16 == pytest.approx(18 / 64)
    assert by_encoding["float32"].share_of_float16 == 2
    assert by_encoding["float16"].table_bytes == VOCAB * 768
    assert (by_encoding["nf4"].block_size, by_encoding["int8"].block_size) == (768, None)


# ----------------------------------------------------------------------------------- on a text


def test_an_exact_table_changes_nothing(model, tables):
    found = compare_on_text(model, tables["float32"], TEXT, 64)
    assert (found.predicted_tokens, found.context) == (300, 64)
    assert found.top1_agreement == 1
    assert abs(found.kl_divergence) < 1e-6
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)


@pytest.mark.parametrize("encoding", ["int8", "nf3"])
def test_a_text_is_judged_as_the_folded_model_judges_it(encoding, model, tables):
    """The loaded inference folder, by a plain computation."""
    table = tables[encoding]
    folded = le.load(table.folder.parent, store="memory")
    found = compare_on_text(model, table, TEXT[:61], 60)
    inputs, targets = TEXT[None, :60], TEXT[1:61]
    expected, other = (logits_of(m, inputs)[0].double().log_softmax(-1) for m in (model, folded))
    divergence = (expected.exp() * (expected - other)).sum(-1).mean()
    agreement = (expected.argmax(-1) == other.argmax(-1)).double().mean()
    nats = [-logs[torch.arange(60), targets].mean() for logs in (expected, other)]
    assert found.kl_divergence == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
    assert found.top1_agreement == pytest.approx(float(agreement))
    assert found.reference_perplexity == pytest.approx(float(nats[0].exp()), rel=1e-5)
    assert found.perplexity == pytest.approx(float(nats[1].exp()), rel=1e-5)
    assert found.perplexity == pytest.approx(perplexity(folded, TEXT[:61], 60).perplexity, rel=1e-5)


def test_batches_change_nothing(model, tables):
    one = compare_on_text(model, tables["nf4"], TEXT, 16)
    many = compare_on_text(model, tables["nf4"], TEXT, 16, batch_size=5)
    assert one.kl_divergence == pytest.approx(many.kl_divergence, rel=1e-4)
    assert one.top1_agreement == many.top1_agreement


def test_fewer_bits_cost_more(model, tables):
    reports = {name: compare_on_text(model, table, TEXT, 64) for name, table in tables.items()}
    divergences = [reports[name].kl_divergence for name in ("float16", "int8", "nf4", "nf3")]
    assert divergences == sorted(divergences)
    assert reports["nf3"].top1_agreement < reports["float16"].top1_agreement


def test_the_model_is_left_as_it_was(model, tables):
    before, own = logits_of(model, TEXT[None, :20]), model.expert_source
    compare_on_text(model, tables["nf3"], TEXT, 64)
    assert model.expert_source is own
    assert torch.equal(logits_of(model, TEXT[None, :20]), before)
    with pytest.raises(UserError):
        compare_on_text(model, tables["nf3"], torch.tensor([0, VOCAB]), 64)
    assert model.expert_source is own


def test_a_reencoded_table_is_compared_with_its_source(table_folder, tmp_path):
    made = reencode(table_folder, tmp_path / "out", encoding="nf4")
    source, loaded = open_table(table_folder / "table"), le.load(table_folder, store="direct")
    found = quality_against_table(made, source, loaded, TEXT)
    same = quality_against_table(source, source, loaded, TEXT)
    assert 0.01 < found.rows.relative_error < 0.12
    assert found.text.kl_divergence > 0
    assert (same.rows.relative_error, same.text.kl_divergence, same.text.top1_agreement) == (
        0,
        0,
        1,
    )
    assert found.text.reference_perplexity == same.text.perplexity


# ------------------------------------------------------------------------------- the report


def test_the_report_in_words_and_in_json(model, tables):
    quality = quality_against_experts(tables["nf4"], model, TEXT)
    plain = json.loads(json.dumps(quality.to_dict()))
    assert plain["encoding"] == "nf4"
    assert plain["rows"]["sampled_ids"] == VOCAB
    assert plain["text"]["predicted_tokens"] == 300
    words = format_quality(quality)
    assert "nf4 in blocks of 768" in words
    assert "28.1% of float16" in words
    assert f"{quality.text.perplexity:.4f}" in words
    assert "on 300 tokens in windows of 128" in words
    assert "perplexity" not in format_quality(quality_against_experts(tables["nf4"], model))


def test_a_sample_of_a_large_vocabulary_is_enough(tmp_path):
    """The relative error over 256 ids is within a few percent of that over all."""
    from lookup_experts.table.build import build_table, decode_records, plan_reencoding
    from lookup_experts.table.encoding import get_encoding
    from lookup_experts.table.store_choice import open_store

    source, _ = make_table(tmp_path / "source", vocab_size=2000, row_size=64, encoding="float32")
    plan = plan_reencoding(source, get_encoding("nf4"))
    with open_store(source, "mmap", notify=lambda message: None) as store:
        made = build_table(tmp_path / "made", plan, decode_records(store))
        sampled = measure_quality(made, decode_records(store)).rows
        whole = row_error(made, decode_records(store), num_ids=2000)
    assert (sampled.sampled_ids, whole.sampled_ids) == (256, 2000)
    assert sampled.relative_error == pytest.approx(whole.relative_error, rel=0.05)
    assert np.isfinite(whole.relative_error)
