"""The builder: the right bytes, whenever it is stopped and whatever the disk did meanwhile."""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from random_tables import flip_bit
from torch import nn

from lookup_experts.errors import DiskFullError, TableError
from lookup_experts.generation.folding import plan_folding
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.table import build
from lookup_experts.table.build import (
    JOURNAL,
    Ranks,
    build_table,
    check_sample,
    copy_table,
)
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.opening import open_table
from lookup_experts.table.verifying import verify_table

VOCAB = 90


def drawn_experts(
    vocab_size: int = VOCAB, layers: int = 2, hidden_size: int = 16, seed: int = 0, kind="gelu"
):
    """An embedding and the experts of some layers."""
    torch.manual_seed(seed)
    embedding = nn.Embedding(vocab_size, 12)
    experts = [LayerExperts(3, 12, 10, hidden_size, kind) for _ in range(layers)]
    for layer in experts:
        for weight in layer.parameters():
            nn.init.normal_(weight, 0.0, 0.5)
    return embedding, experts


class Build:
    """A build of small chunks and shards that can be run again and again."""

    def __init__(self, folder: Path, encoding: str = "float32", seed: int = 0, **experts) -> None:
        self.folder = folder
        embedding, layers = drawn_experts(seed=seed, **experts)
        small = functools.partial(build.plan_shards, max_shard_bytes=20_000)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(build, "plan_shards", small)
            self.plan = plan_folding(
                embedding,
                layers,
                embedding.num_embeddings,
                get_encoding(encoding),
                chunk_budget_bytes=8_000,
            )
        self.rows_of = evaluate_experts(embedding, layers)

    def run(self, progress=None, rows_of=None):
        return build_table(self.folder, self.plan, rows_of or self.rows_of, progress)

    def run_until(self, num_ids: int) -> None:
        """Stop at the first chunk from `num_ids` on."""

        def rows_of(ids):
            if ids[0] >= num_ids:
                raise KeyboardInterrupt
            return self.rows_of(ids)

        with pytest.raises(KeyboardInterrupt):
            self.run(rows_of=rows_of)

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def shard(self, number: int) -> Path:
        return self.folder / self.plan.manifest.shards[number].file


@pytest.fixture
def begun(tmp_path) -> Build:
    return Build(tmp_path / "table")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted build."""
    whole = Build(tmp_path_factory.mktemp("whole") / "table")
    whole.run()
    return whole.contents()


def test_the_fixture_has_shards_and_chunks(begun):
    chunks = list(begun.plan.chunks())
    assert len(begun.plan.manifest.shards) >= 3
    assert len(chunks) > 2 * len(begun.plan.manifest.shards)
    assert [ids.start for _, ids in chunks[1:]] == [ids.stop for _, ids in chunks[:-1]]
    assert (chunks[0][1].start, chunks[-1][1].stop) == (0, VOCAB)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8", "nf4", "nf3"])
def test_records_are_the_encoded_outputs_of_the_experts(encoding, kind, tmp_path):
    built = Build(tmp_path / "table", encoding, kind=kind)
    table = built.run()
    assert verify_table(table).intact
    records = np.concatenate(
        [
            np.fromfile(
                table.path(shard), np.uint8, shard.num_ids * table.layout.stride, offset=4096
            )
            for shard in table.shards
        ]
    ).reshape(VOCAB, -1)
    embedding, layers = drawn_experts(kind=kind)
    shape = table.layout.shape
    for number, experts in enumerate(layers):
        codes = torch.from_numpy(records[:, table.layout.layer_slice(number)])
        found = table.layout.encoding.decode(
            codes, shape.num_experts, shape.row_size, torch.float32
        )
        with torch.no_grad():
            rows = experts.forward_reference(embedding.weight)
        tolerance = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 0.01, "nf4": 0.12, "nf3": 0.22}
        assert (found - rows).norm() / rows.norm() < tolerance[encoding]


def test_progress_goes_from_none_to_all(begun):
    seen = []
    begun.run(lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, VOCAB), (VOCAB, VOCAB))


def test_no_journal_is_left(begun):
    begun.run()
    assert not (begun.folder / JOURNAL).exists()
    assert sorted(path.name for path in begun.folder.iterdir()) == sorted(
        ["table.json", *(shard.file for shard in begun.plan.manifest.shards)]
    )


@pytest.mark.parametrize("stop", [0, 1, 25, 30, 31, 60, 80])
def test_a_build_stopped_anywhere_goes_on_to_the_same_bytes(begun, expected, stop):
    begun.run_until(stop)
    assert not (begun.folder / "table.json").exists()
    evaluated = []

    def rows_of(ids):
        evaluated.append(len(ids))
        return begun.rows_of(ids)

    begun.run(rows_of=rows_of)
    assert begun.contents() == expected
    finished = stop // begun.plan.chunk_ids * begun.plan.chunk_ids
    assert sum(evaluated) <= VOCAB - finished + 2 * begun.plan.chunk_ids + 64


def _build_slowly(begun: Build) -> None:
    def rows_of(ids):
        time.sleep(0.004)
        return begun.rows_of(ids)

    begun.run(rows_of=rows_of)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_build_goes_on_to_the_same_bytes(begun, expected, seed):
    """SIGKILL at random moments, several times in a row; a process of its own each time."""
    chosen, fork = random.Random(seed), multiprocessing.get_context("fork")
    kills = 0
    while not (begun.folder / "table.json").exists() and kills < 6:
        process = fork.Process(target=_build_slowly, args=(begun,))
        process.start()
        process.join(chosen.uniform(0.01, 0.12))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills
    if (begun.folder / JOURNAL).exists() or not (begun.folder / "table.json").exists():
        begun.run()
    assert begun.contents() == expected


def test_a_build_that_was_killed_before_its_journal_was_written_goes_on(begun, expected):
    begun.folder.mkdir(exist_ok=True)
    (begun.folder / f"{JOURNAL}.tmp").write_text('{"pl')
    begun.run()
    assert begun.contents() == expected


def test_a_manifest_that_a_killed_build_left_half_written_is_removed(begun, expected):
    begun.run_until(80)
    (begun.folder / ".unfinished-abcdefgh").write_text('{"for')
    begun.run()
    assert begun.contents() == expected


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("place", ["first", "last", "checksum"])
def test_a_damaged_record_is_written_again_when_the_build_goes_on(begun, expected, shard, place):
    begun.run_until(80)
    info = begun.plan.manifest.shards[shard]
    layout = begun.plan.manifest.layout
    offsets = {
        "first": layout.record_offset(0) + 7,
        "last": layout.record_offset(info.num_ids - 1) + 3,
        "checksum": layout.record_offset(info.num_ids) + 1,
    }
    flip_bit(begun.shard(shard), offsets[place])
    begun.run()
    assert begun.contents() == expected


def test_a_deleted_or_shortened_shard_is_noticed(begun, expected):
    begun.run_until(80)
    begun.shard(1).unlink()
    begun.run()
    assert begun.contents() == expected
    shutil.rmtree(begun.folder)
    begun.run_until(80)
    os.truncate(begun.shard(0), 5000)
    with pytest.raises(TableError, match="its size is wrong; delete it"):
        begun.run()


def test_a_finished_table_whose_journal_was_kept_is_checked_and_kept(begun, expected):
    begun.run()
    flip_bit(begun.shard(2), 5000)
    begun.run()
    assert begun.contents() == expected


def test_other_weights_or_encodings_do_not_continue_a_build(begun, tmp_path):
    begun.run_until(40)
    before = begun.contents()
    for other in (Build(begun.folder, seed=1), Build(begun.folder, "float16")):
        with pytest.raises(TableError, match=r"unfinished build of another table.*Delete it"):
            other.run()
        assert begun.contents() == before


def test_a_folder_with_other_things_is_refused(begun):
    begun.folder.mkdir()
    (begun.folder / "notes.txt").write_text("mine")
    with pytest.raises(TableError, match="is not empty"):
        begun.run()
    assert begun.contents() == {"notes.txt": b"mine"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"plan": 1}'])
def test_a_damaged_journal_is_an_error_in_one_line(begun, content):
    begun.run_until(40)
    (begun.folder / JOURNAL).write_text(content)
    with pytest.raises(TableError, match=r"Delete (it|/.*/table) to start anew"):
        begun.run()


def test_a_second_builder_is_refused(begun):
    begun.run_until(40)
    shard = begun.plan.manifest.shards[0]
    with build._shard_writer(begun.folder, begun.plan, shard):  # noqa: SIM117
        with pytest.raises(TableError, match="another process is writing it"):
            begun.run()


# ------------------------------------------------------------------------------- the sample


def test_the_sample_finds_rows_that_are_not_the_experts(begun):
    table = begun.run()
    check_sample(table, begun.rows_of)

    def wrong_in_layer_one(ids):
        for layer, rows in enumerate(begun.rows_of(ids)):
            yield rows * (1.05 if layer == 1 else 1)

    with pytest.raises(TableError, match=r"layer 1 reads back with a relative error of 0\.04"):
        check_sample(table, wrong_in_layer_one)


def test_the_sample_finds_damage_on_the_disk(begun):
    table = begun.run()
    with begun.shard(0).open("r+b") as file:  # id 0 is in any sample
        file.seek(4096)
        file.write(np.full(table.layout.stride, 0x3F, np.uint8).tobytes())
    with pytest.raises(TableError, match="relative error"):
        check_sample(table, begun.rows_of)


def test_a_build_that_reads_back_wrong_fails(begun, monkeypatch):
    real = build.encode_chunk

    def wrong(layout, rows_of, ids, records):
        real(layout, rows_of, ids, records)
        records[:, :4] = 0x3F

    monkeypatch.setattr(build, "encode_chunk", wrong)
    with pytest.raises(TableError, match="reads back"):
        begun.run()


def test_silent_experts_pass_the_sample(tmp_path):
    """Rows of zeros have no norm to divide by."""
    built = Build(tmp_path / "table")
    built.run(rows_of=lambda ids: (rows * 0 for rows in built.rows_of(ids)))


# ----------------------------------------------------------------------------------- the disk


def test_too_little_space_is_said_before_the_first_chunk(begun, monkeypatch):
    free = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda folder: free)

    def rows_of(ids):
        raise AssertionError("evaluated")

    with pytest.raises(DiskFullError, match=r"needs .* more in .*, where 1 kB"):
        begun.run(rows_of=rows_of)


def test_space_that_a_begun_build_has_taken_is_not_asked_for_again(begun, expected, monkeypatch):
    begun.run_until(85)
    free = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda folder: free)
    begun.run()
    assert begun.contents() == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_the_build_goes_on_elsewhere(small_disk, monkeypatch, expected):
    begun = Build(small_disk / "table")
    with pytest.raises(DiskFullError, match="Free some space"):
        begun.run()
    # The disk fills up while building: what the check was told is no longer so.
    free = shutil._ntuple_diskusage(10**9, 0, 10**9)
    with monkeypatch.context() as patched:
        patched.setattr(build.shutil, "disk_usage", lambda folder: free)
        with pytest.raises(DiskFullError, match="no space"):
            begun.run()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    begun.run()
    assert begun.contents() == expected


# -------------------------------------------------------------------------------- memory, copies

MEMORY = """
import sys, torch
from pathlib import Path
from torch import nn
from lookup_experts.model.forms.mole import LayerExperts
from lookup_experts.generation.folding import plan_folding
from lookup_experts.model.folded import evaluate_experts
from lookup_experts.table.build import build_table
from lookup_experts.table.encoding import get_encoding

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
embedding = nn.Embedding(20_000, 16)
layers = [LayerExperts(4, 16, 16, 256) for _ in range(3)]
for layer in layers:
    for weight in layer.parameters():
        nn.init.normal_(weight)
def build(folder, budget, vocab_size):
    plan = plan_folding(
        embedding, layers, vocab_size, get_encoding("bfloat16"), chunk_budget_bytes=budget
    )
    build_table(Path(folder), plan, evaluate_experts(embedding, layers))
    return plan.manifest.layout.table_bytes
build(sys.argv[1] + "/warm", 10_000_000, 2_000)
before = peak()
print(build(sys.argv[1] + "/wide", 10_000_000, 20_000), peak() - before)
"""


def test_memory_is_bounded_by_the_budget(run_python, tmp_path):
    exit_code, out, err = run_python(MEMORY, tmp_path)
    assert exit_code == 0, err
    table_bytes, grown = map(int, out.split())
    assert table_bytes > 120_000_000
    assert grown < 16_000_000, f"{table_bytes} bytes of table took {grown} more"


@pytest.mark.parametrize("budget", [1, 10_000, 200 * 2**20])
def test_chunks_follow_the_budget(budget):
    embedding, layers = drawn_experts(vocab_size=20_000)
    plan = plan_folding(
        embedding, layers, 20_000, get_encoding("float32"), chunk_budget_bytes=budget
    )
    assert 1 <= plan.chunk_ids <= build.MAX_CHUNK_IDS
    assert plan.chunk_ids == 1 or 2 * plan.chunk_ids * plan.manifest.layout.stride < budget


def test_one_token_makes_a_table(tmp_path):
    built = Build(tmp_path / "table", vocab_size=1)
    assert verify_table(built.run()).num_ids == 1


def test_a_copied_table_is_the_same_files_where_possible(begun, expected, tmp_path):
    begun.run()
    copy_table(begun.folder, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == expected
    shard = begun.plan.manifest.shards[0].file
    assert (tmp_path / "copy" / shard).samefile(begun.folder / shard)
    copy_table(begun.folder, begun.folder)
    copy_table(begun.folder, tmp_path / "copy")  # over an older one
    open_table(tmp_path / "copy")


def test_a_table_is_copied_where_it_can_not_be_linked(begun, expected, tmp_path, monkeypatch):
    begun.run()

    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    copy_table(begun.folder, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == expected


def test_the_journal_says_what_is_being_built(begun):
    begun.run_until(40)
    journal = json.loads((begun.folder / JOURNAL).read_text())
    assert journal == {"plan": begun.plan.to_json()}


def test_what_an_older_version_began_goes_on(begun, expected):
    """Its journal said how many ids were finished, too."""
    begun.run_until(40)
    journal = {"plan": begun.plan.to_json(), "finished_ids": 20}
    (begun.folder / JOURNAL).write_text(json.dumps(journal))
    begun.run()
    assert begun.contents() == expected


def test_who_helps_with_another_table_is_refused(begun, tmp_path):
    begun.run_until(40)
    other = Build(begun.folder, seed=1)
    with pytest.raises(TableError, match="unfinished build of another table"):
        build_table(other.folder, other.plan, other.rows_of, ranks=Ranks(1, 2))
