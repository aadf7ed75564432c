"""Several tables read as one."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch
from lanes import LateLane
from random_tables import flip_bit, make_table, random_records
from reading import open_by, open_on, ways_here

from lookup_experts.errors import TableError
from lookup_experts.table.counts import keep_counts, read_counts
from lookup_experts.table.host_memory import aligned_buffer
from lookup_experts.table.joined import join_tables
from lookup_experts.table.opening import reopen_table
from lookup_experts.table.reader import read_table

VOCAB = 40


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Three tables of other numbers, in several shards, and all their records in order."""
    tables, records = [], []
    for number in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(
                "random_tables.random_records",
                lambda layout, number=number: random_records(layout, number),
            )
            table, own = make_table(tmp_path / f"part{number}", ids_per_shard=15)
        tables.append(table)
        records.append(own)
    return tables, np.concatenate(records)


@pytest.mark.parametrize("way", ways_here())
def test_every_store_reads_all_of_them(parts, way):
    tables, records = parts
    ids = np.array([119, 0, 40, 39, 80, 79, 14, 15, 55, 95])
    with open_by(way, join_tables(tables), verify_checksums=True) as store:
        out = aligned_buffer(len(ids) * records.shape[1]).reshape(len(ids), -1)
        store.read(ids, out)
        assert (out == records[ids]).all()
        memory = aligned_buffer(len(ids) * records.shape[1]).reshape(len(ids), -1)
        store.begin(ids, memory, np.arange(len(ids))[::-1].copy()).wait()
        assert (memory[::-1] == records[ids]).all()


@pytest.mark.parametrize("lane", [None, LateLane])
def test_a_reader_of_them(parts, lane):
    """Through its row cache, past it, and as on a GPU."""
    tables, _ = parts
    joined = join_tables(tables)
    generator = torch.Generator().manual_seed(0)
    with open_on(lane and lane(), joined, cache_bytes=4000) as reader, torch.no_grad():
        for count in (3, 7, 200, 5):
            ids = torch.randint(0, 3 * VOCAB, (1, count), generator=generator)
            found = reader.rows(ids)
            for layer in range(2):
                rows = found.layer(layer)[found.index.view(-1)]
                for position, record in enumerate(ids[0].tolist()):
                    own = tables[record // VOCAB]
                    with open_on(None, own) as alone:
                        expected = alone.rows(torch.tensor([[record % VOCAB]])).layer(layer)[0]
                    assert torch.equal(rows[position], expected)


@pytest.mark.parametrize(
    "again", [reopen_table, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_it_is_the_same_again(parts, again):
    tables, _ = parts
    assert again(join_tables(tables)) == join_tables(tables)


def test_readers_of_it_are_copied_and_pickled(parts):
    tables, _ = parts
    ids = torch.tensor([[3, 60, 119]])
    with torch.no_grad():
        reader = read_table(join_tables(tables), torch.float32, store="direct", cache=8000)
        expected = reader.rows(ids).layer(1)
        for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
            assert torch.equal(other.rows(ids).layer(1), expected)
            other.close()
        reader.close()


def test_another_table_in_the_place_of_a_part(parts):
    tables, _ = parts
    joined = join_tables(tables)
    folder = tables[1].folder
    shutil.rmtree(folder)
    make_table(folder, ids_per_shard=20)
    with pytest.raises(TableError, match="holds another table now"):
        reopen_table(joined)


@pytest.mark.parametrize("way", ways_here())
def test_damage_is_told_by_the_parts_own_id(parts, way):
    tables, records = parts
    shard = tables[1].shards[1]
    flip_bit(tables[1].path(shard), tables[1].layout.record_offset(2) + 1)
    message = f"{tables[1].path(shard)}: the record of id {shard.first_id + 2} is damaged"
    ids, out = np.array([VOCAB + shard.first_id + 2]), np.empty((1, records.shape[1]), np.uint8)
    with (
        pytest.raises(TableError, match=message),
        open_by(way, join_tables(tables), verify_checksums=True) as store,
    ):
        store.read(ids, out)


def test_counts_of_those_that_have_some(parts):
    tables, _ = parts
    joined = join_tables(tables)
    assert read_counts(joined) is None
    counts = np.arange(VOCAB)
    keep_counts(tables[1].folder, counts, VOCAB)
    found = read_counts(joined)
    assert found.tolist() == [0] * VOCAB + counts.tolist() + [0] * VOCAB
