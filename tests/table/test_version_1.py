"""Tables of format version 1 are read, verified, copied and re-encoded; new ones are of 2."""

import json
import shutil

import numpy as np
import pytest
import torch
from random_tables import edit_json, flip_bit, make_table
from reading import Expected, open_reader_by, ways_here
from tiny_models import logits_of, token_ids
from version_1 import write_version_1

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.generation.inspection import inspect_folder, verify_folder
from lookup_experts.generation.reencoding import reencode
from lookup_experts.table.encoding import ENCODINGS
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.manifest import TableManifest
from lookup_experts.table.opening import open_table
from lookup_experts.table.store_choice import STORES, open_store
from lookup_experts.table.verifying import verify_table

IDS = token_ids(2, 9)


@pytest.fixture
def old_folder(table_folder, tmp_path):
    """The inference folder, with its table in version 1."""
    folder = shutil.copytree(table_folder, tmp_path / "old")
    table = open_table(folder / "table")
    shape, encoding = table.layout.shape, table.layout.encoding
    records = np.zeros((shape.vocab_size, table.layout.stride), np.uint8)
    with open_store(table, "mmap", notify=print) as store:
        store.read(np.arange(shape.vocab_size), records)
    shutil.rmtree(folder / "table")
    (folder / "table").mkdir()
    write_version_1(
        folder / "table",
        [records[:, table.layout.layer_slice(layer)] for layer in range(shape.num_layers)],
        (shape.vocab_size, shape.num_layers, shape.num_experts, shape.row_size),
        (encoding.name, encoding.block_size),
        ids_per_shard=40,
        fingerprint=table.manifest.fingerprint,
        embedding_hash=table.manifest.embedding_hash,
    )
    return folder


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("row_size", [1, 20, 700])
def test_it_is_read_and_verified(tmp_path, encoding, row_size):
    table, records = make_table(
        tmp_path, row_size=row_size, encoding=encoding, ids_per_shard=15, version=1
    )
    assert table.layout.version == 1 and table.layout.stride == records.shape[1]
    assert verify_table(table).intact
    ids = torch.tensor([[3, 39, 3, 0]])
    for way in ways_here():
        with open_reader_by(way, table, verify_checksums=True) as reader, torch.no_grad():
            Expected(table, records).assert_right(reader.rows(ids), ids)


def test_damage_in_it_is_found(tmp_path):
    table, _ = make_table(tmp_path, ids_per_shard=15, version=1)
    flip_bit(table.path(table.shards[1]), table.layout.record_offset(3) + 1)
    assert [bad.id for bad in verify_table(table).bad] == [table.shards[1].first_id + 3]


@pytest.mark.parametrize("store", STORES)
def test_a_model_reads_it(old_folder, table_folder, store):
    assert json.loads((old_folder / "table" / MANIFEST_NAME).read_text())["version"] == 1
    expected = logits_of(le.load(table_folder), IDS)
    assert torch.equal(logits_of(le.load(old_folder, store=store), IDS), expected)


def test_it_is_inspected_verified_and_saved_again(old_folder, tmp_path):
    assert not verify_folder(old_folder).problems
    assert inspect_folder(old_folder)["table"]["shape"]["row_size"] == 32
    model = le.load(old_folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(le.load(tmp_path / "again"), IDS), logits_of(model, IDS))


def test_written_again_it_is_of_version_2(old_folder, tmp_path):
    """In the same encoding too, which is refused otherwise."""
    made = reencode(old_folder, tmp_path / "new", encoding="float32", notify=print)
    assert json.loads((made.folder / MANIFEST_NAME).read_text())["version"] == 2
    assert verify_table(made).intact
    expected = logits_of(le.load(old_folder), IDS)
    assert torch.equal(logits_of(le.load(tmp_path / "new"), IDS), expected)
    with pytest.raises(UserError, match="is in float32 already"):
        reencode(tmp_path / "new", tmp_path / "newer", encoding="float32", notify=print)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_written_again_in_the_same_encoding_it_has_the_same_codes(tmp_path, encoding):
    _, records = make_table(
        tmp_path / "old", row_size=300, encoding=encoding, ids_per_shard=15, version=1
    )
    made = reencode(tmp_path / "old", tmp_path / "new", encoding=encoding, notify=print)
    found = np.zeros((40, made.layout.stride), np.uint8)
    with open_store(made, "mmap", notify=print) as store:
        store.read(np.arange(40), found)
    size = made.layout.record_bytes
    assert (found[:, :size] == records[:, :size]).all()


def test_its_manifest_can_be_written_again(tmp_path):
    table, _ = make_table(tmp_path, ids_per_shard=15, version=1)
    text = (tmp_path / MANIFEST_NAME).read_text()
    assert table.manifest.to_json() == text
    assert TableManifest.from_json(text) == table.manifest


@pytest.mark.parametrize("version", [0, 3, "2", None, 2.0])
def test_any_other_version_is_refused_by_name(tmp_path, version):
    make_table(tmp_path)
    edit_json(tmp_path / MANIFEST_NAME, lambda content: content.update(version=version))
    with pytest.raises(TableError, match=rf"field version is {version!r}, expected 1 or 2"):
        open_table(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_alone_does_not_make_it_another(tmp_path, version):
    make_table(tmp_path, version=3 - version)
    edit_json(tmp_path / MANIFEST_NAME, lambda content: content.update(version=version))
    with pytest.raises(TableError, match=r"table\.json: field"):
        open_table(tmp_path)


def test_shards_of_another_version_are_noticed(tmp_path):
    """Of a size that is the same in both."""
    table, _ = make_table(tmp_path / "new", row_size=16)
    make_table(tmp_path / "old", row_size=16, version=1)
    assert table.layout.stride == 128
    name = table.shards[0].file
    shutil.copy(tmp_path / "old" / name, tmp_path / "new" / name)
    with pytest.raises(TableError, match=r"version is '1', expected '2'"):
        open_table(tmp_path / "new")
