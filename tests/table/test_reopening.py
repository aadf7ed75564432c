"""Copies of a reader, pickled, deep or in another process: each reads the table for itself."""

import copy
import io
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from lanes import LateLane
from random_tables import make_table
from reading import Expected, open_files

from lookup_experts.errors import TableError
from lookup_experts.table import reader as reader_module
from lookup_experts.table.reader import TableReader
from lookup_experts.table.store_choice import STORES, open_store

IDS = torch.tensor([[3, 7, 3], [0, 39, 12]])


def silent(_message: str) -> None:
    """For tests that don't look at the messages."""


@pytest.fixture
def made(tmp_path):
    return make_table(tmp_path / "table", row_size=300, encoding="bfloat16", ids_per_shard=17)


def reader_over(table, store="direct", cache_bytes=10**5, verify_checksums=True):
    opened = open_store(table, store, verify_checksums=verify_checksums, notify=silent)
    return TableReader(table, opened, torch.bfloat16, cache=cache_bytes)


def by_pickle(reader):
    return pickle.loads(pickle.dumps(reader))


def by_torch(reader):
    file = io.BytesIO()
    torch.save({"reader": reader}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["reader"]


COPIES = {"pickle": by_pickle, "torch.save": by_torch, "deepcopy": copy.deepcopy}


@pytest.fixture(params=COPIES)
def copied_by(request):
    return COPIES[request.param]


def assert_right(reader, made) -> None:
    with torch.no_grad():
        Expected(*made, torch.bfloat16).assert_right(reader.rows(IDS), IDS)


@pytest.mark.parametrize("store", STORES)
def test_a_copy_has_the_options_and_nothing_else_in_common(store, made, copied_by):
    before = open_files()
    reader = reader_over(made[0], store)
    assert_right(reader, made)
    copied = copied_by(reader)
    assert copied.stats().batches == 0
    for name in ("store", "cache_bytes"):
        assert getattr(copied.stats(), name) == getattr(reader.stats(), name)
    assert copied._store.verify_checksums
    counted = reader.stats()
    assert_right(copied, made)
    assert reader.stats() == counted
    reader.close()
    assert_right(copied, made)
    copied.close()
    assert open_files() == before


@pytest.mark.parametrize("store", STORES)
def test_closing_a_copy_leaves_the_original(store, made, copied_by):
    reader = reader_over(made[0], store)
    copied_by(reader).close()
    assert_right(reader, made)
    reader.close()


def test_a_table_in_ram_is_there_once_for_deep_copies(made):
    reader = reader_over(made[0], "memory")
    copied = copy.deepcopy(reader)
    assert copied._whole.data_ptr() == reader._whole.data_ptr()
    pickled = by_pickle(reader)
    assert pickled._whole.data_ptr() != reader._whole.data_ptr()


def test_a_copy_that_is_moved_leaves_the_original(made, copied_by, monkeypatch):
    reader = reader_over(made[0])
    copied = copied_by(reader)
    with monkeypatch.context() as patch:
        patch.setattr(reader_module, "open_lane", lambda device: LateLane())
        copied.move_to("cpu")
    assert copied._on_device is not None and reader._on_device is None
    for each in (reader, copied, reader):
        assert_right(each, made)


def test_checksums_are_compared_by_a_copy_too(made, copied_by):
    table, _ = made
    for verify_checksums in (False, True):
        copied = copied_by(reader_over(table, verify_checksums=verify_checksums))
        assert copied._store.verify_checksums is verify_checksums


def test_rows_outlive_the_copying(made, copied_by):
    reader = reader_over(made[0])
    with torch.no_grad():
        rows = reader.rows(IDS)
        copied = copied_by(reader)
        Expected(*made, torch.bfloat16).assert_right(rows, IDS)
    assert_right(copied, made)


def test_another_process_reads_it_from_another_folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from lookup_experts.table.opening import open_table

    reader = reader_over(open_table("table"))
    reader.move_to("cpu")
    (tmp_path / "reader.pickle").write_bytes(pickle.dumps((reader, IDS)))
    other = tmp_path / "other"
    other.mkdir()
    program = (
        "import pickle, sys, torch\n"
        "reader, ids = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    torch.save(reader.rows(ids).layer(1), sys.argv[2])\n"
    )
    result = tmp_path / "rows.pt"
    arguments = [tmp_path / "reader.pickle", result]
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=other, check=True)
    expected = Expected(*made, torch.bfloat16).layer(1, torch.unique(IDS))
    with torch.no_grad():
        assert torch.equal(
            torch.load(result)[reader.rows(IDS).index],
            expected[torch.unique(IDS, return_inverse=True)[1]],
        )


def test_a_device_that_is_not_there_is_the_processors(made):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    function, arguments = reader_over(made[0]).__reduce__()
    arguments = [
        torch.device("cuda") if isinstance(given, torch.device) else given for given in arguments
    ]
    reader = function(*arguments)
    assert reader.device == torch.device("cpu")
    assert_right(reader, made)


def test_a_closed_reader_can_not_be_copied(made, copied_by):
    reader = reader_over(made[0])
    reader.close()
    with pytest.raises(ValueError, match="is closed"):
        copied_by(reader)


def test_another_table_in_the_same_place_is_refused(made, tmp_path, copied_by):
    reader = reader_over(made[0])
    shutil.rmtree(tmp_path / "table")
    make_table(tmp_path / "table", row_size=200, encoding="bfloat16")
    with pytest.raises(TableError, match="holds another table now"):
        copied_by(reader)


def test_a_table_that_is_gone_is_named(made, tmp_path, copied_by):
    reader = reader_over(made[0])
    shutil.rmtree(tmp_path / "table")
    with pytest.raises(TableError, match="no such folder"):
        copied_by(reader)
