"""The table on disk: layout, writing and resuming, distrustful opening, verifying."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tables import edit_json, flip_bit, make_table, random_records
from safetensors import safe_open
from safetensors.torch import load_file
from version_1 import stride_of

from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.table import shard as shard_module
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.format import DATA_START, MANIFEST_NAME
from lookup_experts.table.layout import RecordLayout, ShardInfo, TableShape, plan_shards
from lookup_experts.table.manifest import TableManifest, read_manifest, write_manifest
from lookup_experts.table.opening import open_table
from lookup_experts.table.shard_writer import ShardWriter
from lookup_experts.table.verifying import verify_table

shapes = st.builds(
    TableShape, st.integers(1, 500), st.integers(1, 30), st.integers(1, 20), st.integers(1, 2000)
)
layouts = st.builds(RecordLayout, shapes, st.sampled_from(list(ENCODINGS.values())))


# ------------------------------------------------------------------------------------- layout


@given(layouts)
def test_records_lie_densely(layout):
    assert 0 <= layout.stride - layout.record_bytes < 16
    assert all(layout.record_offset(row) % 16 == 0 for row in range(5))
    assert layout.is_whole_blocks == (layout.stride % 4096 == 0)


@given(shapes, st.sampled_from(list(ENCODINGS.values())))
def test_no_record_of_version_1_straddles_a_block_it_could_fit_into(shape, encoding):
    layout = RecordLayout(shape, encoding, version=1)
    assert layout.stride == stride_of(layout.record_bytes)
    assert all(layout.record_offset(row) % min(layout.stride, 4096) == 0 for row in range(5))


@given(layouts)
def test_layers_follow_each_other(layout):
    layers = [layout.layer_slice(layer) for layer in range(layout.shape.num_layers)]
    assert layers[0].start == 0 and layers[-1].stop == layout.record_bytes
    assert all(a.stop == b.start for a, b in pairwise(layers))


@given(layouts, st.integers(1, 2**22))
def test_shards_cover_every_id_once(layout, max_shard_bytes):
    shards = plan_shards(layout, max_shard_bytes)
    ids = [i for shard in shards for i in range(shard.first_id, shard.first_id + shard.num_ids)]
    assert ids == list(range(layout.shape.vocab_size))
    assert all(shard.bytes <= max_shard_bytes or shard.num_ids == 1 for shard in shards)
    assert all(shard.bytes == layout.shard_bytes(shard.num_ids) for shard in shards)


def test_the_size_of_160m_4e():
    layout = RecordLayout(TableShape(50304, 12, 4, 768), get_encoding("bfloat16"))
    assert layout.record_bytes == layout.stride == 72 * 1024
    assert [shard.file for shard in plan_shards(layout)] == ["table-00001-of-00001.safetensors"]


def test_shapes_that_make_no_table():
    with pytest.raises(UserError, match="num_experts"):
        TableShape(10, 2, 0, 8)
    with pytest.raises(UserError, match="larger than"):
        RecordLayout(TableShape(10, 1000, 1000, 4096), get_encoding("float32"))


# ------------------------------------------------------------------------------------- writing


def test_a_shard_is_a_safetensors_file(tmp_path):
    table, records = make_table(tmp_path, ids_per_shard=15)
    assert len(table.shards) == 3
    for shard in table.shards:
        own = records[shard.first_id : shard.first_id + shard.num_ids]
        loaded = load_file(table.path(shard))
        assert torch.equal(loaded["records"], torch.from_numpy(own))
        checksums = loaded["crc32"].to(torch.int64).tolist()
        assert checksums == [zlib.crc32(record) for record in own]
        with safe_open(table.path(shard), "pt") as file:
            assert file.metadata()["first_id"] == str(shard.first_id)
        assert table.path(shard).read_bytes()[DATA_START:][: own.nbytes] == own.tobytes()


def small_layout(vocab_size: int = 30) -> tuple[RecordLayout, ShardInfo]:
    layout = RecordLayout(TableShape(vocab_size, 2, 2, 8), get_encoding("float16"))
    return layout, plan_shards(layout)[0]


def test_rows_come_in_any_order_and_go_on_after_closing(tmp_path):
    layout, shard = small_layout()
    records = random_records(layout)
    with ShardWriter(tmp_path / "part", layout, shard, "f") as writer:
        assert not writer.resumed and writer.verified_rows(30) == 0
        writer.write(10, records[10:20])
        writer.write(0, records[:10])
        assert writer.verified_rows(30) == 20 and writer.verified_rows(7) == 7
    with ShardWriter(tmp_path / "part", layout, shard, "f") as writer:
        assert writer.resumed and writer.verified_rows(99) == 20
        writer.write(20, records[20:])
        assert writer.verified_rows(30) == 30
        writer.finish()


def test_a_row_that_was_half_written_is_not_counted(tmp_path):
    layout, shard = small_layout()
    with ShardWriter(tmp_path / "part", layout, shard, "f") as writer:
        writer.write(0, random_records(layout))
    flip_bit(tmp_path / "part", layout.record_offset(17) + 3)
    with ShardWriter(tmp_path / "part", layout, shard, "f") as writer:
        assert writer.verified_rows(30) == 17


def test_a_killed_writer_leaves_what_it_wrote(tmp_path):
    script = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_format import ShardWriter, random_records, small_layout
layout, shard = small_layout()
writer = ShardWriter(Path(sys.argv[1]), layout, shard, "f")
writer.write(0, random_records(layout)[:12])
os.kill(os.getpid(), 9)
"""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", script, str(tmp_path / "part"), str(here)]
    killed = subprocess.run(command, env=environment, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    with ShardWriter(tmp_path / "part", *small_layout(), "f") as writer:
        assert writer.resumed and writer.verified_rows(30) == 12


def test_a_writer_refuses_the_file_of_another_build(tmp_path):
    layout, shard = small_layout()
    ShardWriter(tmp_path / "part", layout, shard, "one build").close()
    with pytest.raises(TableError, match=r"fingerprint is 'one build'.*delete it"):
        ShardWriter(tmp_path / "part", layout, shard, "another")


def test_one_writer_at_a_time(tmp_path):
    layout, shard = small_layout()
    with (
        ShardWriter(tmp_path / "part", layout, shard, "f"),
        pytest.raises(TableError, match="another process is writing"),
    ):
        ShardWriter(tmp_path / "part", layout, shard, "f")


def test_a_file_without_its_header_is_begun_anew(tmp_path):
    layout, shard = small_layout()
    (tmp_path / "part").write_bytes(bytes(100))
    with ShardWriter(tmp_path / "part", layout, shard, "f") as writer:
        assert not writer.resumed
    assert (tmp_path / "part").stat().st_size == shard.bytes


def test_a_full_disk_is_noticed_at_the_start(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(DiskFullError, match="no space for 6136 bytes"):
        ShardWriter(tmp_path / "part", *small_layout(), "f")
    assert not (tmp_path / "part").exists()


def test_a_wrong_write_is_a_mistake_of_the_caller(tmp_path):
    layout, shard = small_layout()
    with ShardWriter(tmp_path / "part", layout, shard, "f") as writer:
        with pytest.raises(ValueError, match="Expected uint8"):
            writer.write(0, np.zeros((2, 5), np.uint8))
        with pytest.raises(ValueError, match="Rows 29"):
            writer.write(29, np.zeros((2, layout.stride), np.uint8))


# ------------------------------------------------------------------------------------ manifest


@settings(max_examples=50, deadline=None)
@given(layouts, st.integers(5000, 2**22), st.none() | st.text(min_size=1, max_size=256))
def test_a_manifest_comes_back_as_it_was(layout, max_shard_bytes, text):
    shards = tuple(plan_shards(layout, max_shard_bytes))
    manifest = TableManifest(layout, shards, "a fingerprint", text, None, "tool 1")
    assert TableManifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_is_replaced_at_once(tmp_path, monkeypatch):
    table, _ = make_table(tmp_path)
    before = (tmp_path / MANIFEST_NAME).read_text()

    def fail(_):
        raise OSError("power lost")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="power lost"):
        write_manifest(tmp_path, table.manifest)
    assert (tmp_path / MANIFEST_NAME).read_text() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MANIFEST_NAME, table.shards[0].file}  # no temporary file is left


def every_field(content: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value that isn't a list or an object."""
    if isinstance(content, dict):
        return [leaf for key in content for leaf in every_field(content[key], (*path, key))]
    if isinstance(content, list):
        return [leaf for i, item in enumerate(content) for leaf in every_field(item, (*path, i))]
    return [path]


def set_field(content, path: tuple, value) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def test_every_edited_field_is_noticed(tmp_path):
    make_table(tmp_path, encoding="nf4", ids_per_shard=15)
    path = tmp_path / MANIFEST_NAME
    original = json.loads(path.read_text())
    fields = every_field(original)
    assert len(fields) > 20
    for field in fields:
        for value in ([], -1, 1e300, 10**30, "x" * 300, True):
            content = json.loads(json.dumps(original))
            set_field(content, field, value)
            path.write_text(json.dumps(content))
            with pytest.raises(TableError, match=r"table\.json"):
                open_table(tmp_path)


NUMBERS = [("shape", "vocab_size"), ("shape", "num_layers"), ("shape", "row_size"), ("stride",)]


@pytest.mark.parametrize("field", [*NUMBERS, ("version",), ("shards", 1, "num_ids")])
def test_a_number_that_does_not_add_up_is_noticed(tmp_path, field):
    make_table(tmp_path, ids_per_shard=15)

    def one_more(content):
        value = content
        for key in field:
            value = value[key]
        set_field(content, field, value + 1)

    edit_json(tmp_path / MANIFEST_NAME, one_more)
    with pytest.raises(TableError, match=r"table\.json: field"):
        open_table(tmp_path)


@pytest.mark.parametrize("key", ["format", "version", "shape", "shards", "tokenizer_hash"])
def test_a_missing_key_is_named(tmp_path, key):
    make_table(tmp_path)
    edit_json(tmp_path / MANIFEST_NAME, lambda content: content.pop(key))
    with pytest.raises(TableError, match=f"field {key} is missing"):
        open_table(tmp_path)


def test_an_unknown_key_is_named(tmp_path):
    make_table(tmp_path)
    edit_json(tmp_path / MANIFEST_NAME, lambda content: content["shape"].update(depth=1))
    with pytest.raises(TableError, match=r"field shape\.depth is not a field of this version"):
        open_table(tmp_path)


def test_a_path_out_of_the_folder_is_refused(tmp_path):
    make_table(tmp_path)
    edit_json(
        tmp_path / MANIFEST_NAME,
        lambda content: content["shards"][0].update(file="../secret"),
    )
    with pytest.raises(TableError, match=r"field shards\[0\]\.file is '\.\./secret'"):
        open_table(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b'{"a":1,"a":1}', b"[" * 100_000, b" " * (2**24 + 1)]
)
def test_a_file_that_is_no_manifest(tmp_path, content):
    make_table(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(TableError, match=r"table\.json"):
        read_manifest(tmp_path)


# ------------------------------------------------------------------------------------- opening


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(TableError, match="no such folder"):
        open_table(tmp_path / "nowhere")
    with pytest.raises(TableError, match=r"no table\.json here, so not a finished table"):
        open_table(tmp_path)
    make_table(tmp_path / "table")
    with pytest.raises(TableError, match="The table is in"):
        open_table(tmp_path)
    with pytest.raises(TableError, match="a file, expected the folder"):
        open_table(tmp_path / "table" / MANIFEST_NAME)


@pytest.mark.parametrize("num_bytes", [0, 7, 4096, 5000, 6135, 7000])
def test_a_shard_of_another_size(tmp_path, num_bytes):
    table, _ = make_table(tmp_path)
    os.truncate(table.path(table.shards[0]), num_bytes)
    with pytest.raises(TableError, match=rf"00001\.safetensors.*expected 6816.*found {num_bytes}"):
        open_table(tmp_path)


def test_a_missing_shard(tmp_path):
    table, _ = make_table(tmp_path)
    table.path(table.shards[0]).unlink()
    with pytest.raises(TableError, match=r"missing, though table\.json lists it"):
        open_table(tmp_path)


def test_a_foreign_file(tmp_path):
    table, _ = make_table(tmp_path)
    table.path(table.shards[0]).write_bytes(np.random.default_rng(0).bytes(6816))
    with pytest.raises(TableError, match="not a shard of a table"):
        open_table(tmp_path)


def test_the_shard_of_another_table(tmp_path):
    table, _ = make_table(tmp_path / "a")
    path = table.path(table.shards[0])
    path.write_bytes(path.read_bytes().replace(b"a fingerprint", b"B fingerprint"))
    with pytest.raises(TableError, match="fingerprint is 'B fingerprint'"):
        open_table(tmp_path / "a")


def test_exchanged_shards(tmp_path):
    table, _ = make_table(tmp_path, ids_per_shard=20)
    first, second = (table.path(shard) for shard in table.shards)
    first.rename(tmp_path / "between")
    second.rename(first)
    (tmp_path / "between").rename(second)
    with pytest.raises(TableError, match=r"first_id is '20', expected '0'"):
        open_table(tmp_path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_no_change_of_a_header_crashes(tmp_path_factory, position, byte):
    table, _ = make_table(tmp_path_factory.mktemp("table"), vocab_size=2)
    path = table.path(table.shards[0])
    content = bytearray(path.read_bytes())
    content[position] = byte
    path.write_bytes(content)
    try:
        open_table(table.folder)
    except TableError as error:
        assert path.name in str(error)


# ----------------------------------------------------------------------------------- verifying


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_intact_table(tmp_path, encoding):
    table, _ = make_table(tmp_path, encoding=encoding, ids_per_shard=9)
    seen = []
    report = verify_table(table, progress=lambda done, total: seen.append((done, total)))
    assert report.intact and report.num_ids == 40 and not report.bad
    assert seen[-1] == (40, 40) and report.num_bytes == table.layout.table_bytes


def test_flipped_bits_are_found_anywhere_in_a_record(tmp_path):
    table, _ = make_table(tmp_path, encoding="int8", row_size=9, ids_per_shard=20)
    layout = table.layout
    assert layout.stride > layout.record_bytes
    for row, byte in ((0, 0), (7, layout.record_bytes - 1), (19, layout.stride - 1)):
        flip_bit(table.path(table.shards[1]), layout.record_offset(row) + byte)
    report = verify_table(table)
    assert [bad.id for bad in report.bad] == [20, 27, 39] and report.num_bad == 3
    assert report.bad[0].file == table.shards[1].file
    assert "checksum" in report.bad[2].problem


def test_a_flipped_checksum_is_found(tmp_path):
    table, _ = make_table(tmp_path)
    flip_bit(table.path(table.shards[0]), table.layout.record_offset(40) + 4 * 11)
    assert [bad.id for bad in verify_table(table).bad] == [11]


@pytest.mark.parametrize("encoding", ["bfloat16", "nf3"])
def test_numbers_that_are_not_finite_are_found_under_a_right_checksum(tmp_path, encoding):
    table, records = make_table(tmp_path, encoding=encoding)
    dtype = torch.bfloat16 if encoding == "bfloat16" else torch.float16
    nan = torch.tensor([float("nan")], dtype=dtype).view(torch.uint8).numpy()
    records[5, table.layout.record_bytes - 2 : table.layout.record_bytes] = nan
    shard = table.shards[0]
    with ShardWriter(table.path(shard), table.layout, shard, "a fingerprint") as writer:
        writer.write(5, records[5:6])
    report = verify_table(table)
    assert [(bad.id, bad.problem) for bad in report.bad] == [(5, "a number or scale is not valid")]


def test_many_bad_records_are_counted_and_some_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "_CHUNK_BYTES", 256)
    table, _ = make_table(tmp_path, vocab_size=50)
    for row in range(3, 50):
        flip_bit(table.path(table.shards[0]), table.layout.record_offset(row))
    report = verify_table(table)
    assert report.num_bad == 47 and [bad.id for bad in report.bad] == list(range(3, 23))


def test_a_shard_truncated_before_verifying(tmp_path):
    table, _ = make_table(tmp_path)
    os.truncate(table.path(table.shards[0]), DATA_START + 100)
    with pytest.raises(
        TableError, match="truncated, expected 2560 bytes at offset 4096, found 100"
    ):
        verify_table(table)


def test_verifying_holds_little_memory(tmp_path, monkeypatch):
    table, _ = make_table(tmp_path, vocab_size=2000, row_size=1024)
    assert table.layout.table_bytes > 15e6
    monkeypatch.setattr(shard_module, "_CHUNK_BYTES", 2**16)
    tracemalloc.start()
    try:
        assert verify_table(table).intact
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
