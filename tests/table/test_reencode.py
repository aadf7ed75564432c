"""Tables from tables: the right bytes from any encoding, however often the work is stopped."""

import functools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from random_tables import flip_bit, make_table
from torch import nn

from lookup_experts.errors import TableError, UserError
from lookup_experts.generation.folding import plan_folding
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.table import build
from lookup_experts.table.build import (
    build_table,
    decode_records,
    link_or_copy,
    plan_reencoding,
)
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.store_choice import open_store
from lookup_experts.table.verifying import verify_table

VOCAB = 90


def fold(folder: Path, encoding: str, dtype: torch.dtype = torch.float32) -> Table:
    """Random experts in a new table; the same ones each time."""
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCAB, 12).to(dtype)
    layers = [LayerExperts(3, 12, 10, 16).to(dtype) for _ in range(2)]
    for layer in layers:
        for weight in layer.parameters():
            nn.init.normal_(weight, 0.0, 0.5)
    plan = plan_folding(embedding, layers, VOCAB, get_encoding(encoding), tokenizer_hash="words")
    return build_table(folder, plan, evaluate_experts(embedding, layers))


def reencode(
    source: Table, folder: Path, encoding: str, *, block_size=None, budget=8_000, progress=None
) -> Table:
    """In small chunks and small shards."""
    small = functools.partial(build.plan_shards, max_shard_bytes=8_000)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "plan_shards", small)
        plan = plan_reencoding(
            source, get_encoding(encoding, block_size), chunk_budget_bytes=budget
        )
    with open_store(source, "direct", verify_checksums=True, notify=lambda message: None) as store:
        return build_table(folder, plan, decode_records(store), progress)


def records_of(table: Table) -> np.ndarray:
    """All records, uint8 [V, stride]."""
    with open_store(table, "memory", notify=lambda message: None) as store:
        return store.whole().copy()


def rows_of(table: Table) -> torch.Tensor:
    """All rows, float32 [L, V, N, d]."""
    with open_store(table, "memory", notify=lambda message: None) as store, torch.no_grad():
        return torch.stack(list(decode_records(store)(torch.arange(VOCAB))))


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Table:
    return fold(tmp_path_factory.mktemp("exact") / "table", "float32")


def test_decoded_records_are_the_rows_of_each_layer(tmp_path):
    table, records = make_table(tmp_path, encoding="nf3", vocab_size=VOCAB, num_layers=3)
    layout, shape = table.layout, table.layout.shape
    ids = torch.tensor([7, 0, 89, 30])
    with open_store(table, "direct", notify=lambda message: None) as store:
        found = list(decode_records(store)(ids))
    assert len(found) == 3
    for layer, rows in enumerate(found):
        codes = torch.from_numpy(records[ids.numpy()])[:, layout.layer_slice(layer)]
        expected = layout.encoding.decode(codes, shape.num_experts, shape.row_size, torch.float32)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "int8", "nf4", "nf3"])
def test_from_float32_it_is_what_folding_gives(encoding, exact, tmp_path):
    """Up to the rounding of the experts, which are evaluated in chunks of another size."""
    made = reencode(exact, tmp_path / "made", encoding)
    folded = fold(tmp_path / "folded", encoding)
    assert made.layout == folded.layout
    assert len(made.shards) > len(folded.shards)
    assert verify_table(made).intact
    difference = (rows_of(made) - rows_of(folded)).norm() / rows_of(folded).norm()
    assert difference < 1e-3
    assert (records_of(made) == records_of(folded)).mean() > 0.999


@pytest.mark.parametrize("encoding", ["float32", "int8", "nf4"])
def test_from_the_type_of_the_experts_nothing_is_lost(encoding, tmp_path):
    source = fold(tmp_path / "source", "bfloat16", torch.bfloat16)
    made = reencode(source, tmp_path / "made", encoding)
    folded = fold(tmp_path / "folded", encoding, torch.bfloat16)
    assert np.array_equal(records_of(made), records_of(folded))


def test_from_few_bits_the_loss_stays(exact, tmp_path):
    coarse = reencode(exact, tmp_path / "coarse", "nf3")
    back = reencode(coarse, tmp_path / "back", "float32")
    assert torch.equal(rows_of(back), rows_of(coarse))
    assert not torch.allclose(rows_of(back), rows_of(exact), rtol=0.01)


def test_it_stays_the_table_of_the_same_experts(exact, tmp_path):
    made = reencode(exact, tmp_path / "made", "nf4", block_size=8)
    for hash_ in ("fingerprint", "embedding_hash", "tokenizer_hash"):
        assert getattr(made.manifest, hash_) == getattr(exact.manifest, hash_)
        assert getattr(made.manifest, hash_) is not None
    assert made.layout.encoding == get_encoding("nf4", 8)
    assert made.layout.shape == exact.layout.shape
    assert open_table(made.folder) == made


@pytest.mark.parametrize("budget", [1, 3_000, 200 * 2**20])
def test_chunks_of_any_size_give_the_same_bytes(budget, exact, tmp_path):
    small = reencode(exact, tmp_path / "small", "int8")
    made = reencode(exact, tmp_path / "made", "int8", budget=budget)
    assert np.array_equal(records_of(made), records_of(small))


# ------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("stop", [0, 30, 60])
def test_an_interrupted_run_goes_on_to_the_same_bytes(stop, exact, tmp_path):
    def interrupt(done, total):
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reencode(exact, tmp_path / "made", "nf4", progress=interrupt)
    assert not (tmp_path / "made" / "table.json").exists()
    made = reencode(exact, tmp_path / "made", "nf4")
    expected = reencode(exact, tmp_path / "expected", "nf4")
    assert _files(made.folder) == _files(expected.folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _reencode_slowly(source: Table, folder: Path) -> None:
    reencode(source, folder, "nf4", progress=lambda done, total: time.sleep(0.003))


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_goes_on_to_the_same_bytes(seed, exact, tmp_path):
    chosen, fork = random.Random(seed), multiprocessing.get_context("fork")
    kills = 0
    while not (tmp_path / "made" / "table.json").exists() and kills < 5:
        process = fork.Process(target=_reencode_slowly, args=(exact, tmp_path / "made"))
        process.start()
        process.join(chosen.uniform(0.02, 0.12))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills
    made = reencode(exact, tmp_path / "made", "nf4")
    expected = reencode(exact, tmp_path / "expected", "nf4")
    assert _files(made.folder) == _files(expected.folder)


def test_tables_of_the_same_experts_are_not_mixed(exact, tmp_path):
    """Their fingerprints are equal: one half would be exact, the other coarse."""

    def interrupt(done, total):
        if done >= 40:
            raise KeyboardInterrupt

    coarse = reencode(exact, tmp_path / "coarse", "nf3")
    with pytest.raises(KeyboardInterrupt):
        reencode(exact, tmp_path / "made", "int8", progress=interrupt)
    for source in (coarse, reencode(coarse, tmp_path / "looks-exact", "float32")):
        with pytest.raises(TableError, match="unfinished build of another table"):
            reencode(source, tmp_path / "made", "int8", budget=8_000)
    with pytest.raises(TableError, match="unfinished build of another table"):
        fold(tmp_path / "made", "int8")


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("encoding", ["float32", "nf4"])
def test_a_damaged_record_is_not_carried_over(encoding, exact, tmp_path):
    source = reencode(exact, tmp_path / "source", encoding)
    flip_bit(source.path(source.shards[1]), 4096 + 5)
    with pytest.raises(TableError, match=r"record of id \d+ is damaged"):
        reencode(source, tmp_path / "made", "int8")
    assert not (tmp_path / "made" / "table.json").exists()


def test_a_shard_that_is_cut_while_it_is_read_is_an_error(exact, tmp_path):
    source = reencode(exact, tmp_path / "source", "float32")

    def cut(done, total):
        os.truncate(source.path(source.shards[-1]), 5000)

    with pytest.raises(TableError, match="truncated"):
        reencode(source, tmp_path / "made", "int8", progress=cut)


def test_numbers_that_the_encoding_cannot_hold_are_refused(tmp_path):
    plan = plan_reencoding(_huge_numbers(tmp_path / "source"), ENCODINGS["float16"])
    source = open_table(tmp_path / "source")
    with (
        open_store(source, "direct", notify=lambda message: None) as store,
        pytest.raises(UserError, match="too large for float16"),
    ):
        build_table(tmp_path / "made", plan, decode_records(store))


def _huge_numbers(folder: Path) -> Table:
    torch.manual_seed(0)
    embedding, layers = nn.Embedding(VOCAB, 4), [LayerExperts(2, 4, 4, 8)]
    for weight in layers[0].parameters():
        nn.init.normal_(weight, 0.0, 1e4)
    plan = plan_folding(embedding, layers, VOCAB, ENCODINGS["float32"])
    return build_table(folder, plan, evaluate_experts(embedding, layers))


def test_a_link_to_a_file_is_followed(tmp_path):
    """The hub's cache holds links to files elsewhere; a second name for such a link is broken."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "file").symlink_to("../blobs/abc")
    link_or_copy(tmp_path / "snapshot" / "file", tmp_path / "file")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "weights"


MEMORY = """
import sys
from pathlib import Path
import torch
from lookup_experts.table.build import build_table, decode_records, plan_reencoding
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.opening import open_table
from lookup_experts.table.store_choice import open_store

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def reencode(folder):
    table = open_table(folder)
    plan = plan_reencoding(table, get_encoding("nf4"), chunk_budget_bytes=10_000_000)
    with open_store(table, "direct", verify_checksums=True, notify=lambda message: None) as store:
        build_table(Path(f"{folder}-nf4"), plan, decode_records(store))
    return table.layout.table_bytes

torch.set_num_threads(1)
reencode(sys.argv[1])
before = peak()
print(reencode(sys.argv[2]), peak() - before)
"""


def test_memory_is_bounded_by_the_budget(run_python, tmp_path):
    sizes = {"num_layers": 4, "num_experts": 4, "row_size": 256, "encoding": "bfloat16"}
    make_table(tmp_path / "small", vocab_size=1000, **sizes)
    make_table(tmp_path / "large", vocab_size=6000, **sizes)
    exit_code, out, err = run_python(MEMORY, tmp_path / "small", tmp_path / "large")
    assert exit_code == 0, err
    table_bytes, grown = map(int, out.split())
    assert table_bytes > 45_000_000
    assert grown < 12_000_000, f"a table of {table_bytes} bytes took {grown} more"
