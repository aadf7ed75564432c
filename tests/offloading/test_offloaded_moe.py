"""A mixture of experts whose experts are elsewhere: the same numbers as with all of them here."""

import copy
import errno
import os

import numpy as np
import pytest
import torch
from lanes import LateLane
from reading import WAYS, open_by, ways_here
from tiny_models import greedy, greedy_reference, logits_of, moe_model, token_ids

from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.model.moe import mix_selected, mix_selected_reference, select_experts
from lookup_experts.offloading import loading
from lookup_experts.offloading.cache import ExpertCache
from lookup_experts.offloading.expert_table import expert_layout, matrices_of, write_experts
from lookup_experts.offloading.experts import mix_visited, offload_experts
from lookup_experts.table.opening import open_table
from lookup_experts.table.store_choice import open_store

pytestmark = pytest.mark.timeout(60)

LAYERS, EXPERTS = 2, 6
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_experts": EXPERTS}


@pytest.fixture(scope="module")
def resident():
    return moe_model(**SIZES)


@pytest.fixture(scope="module")
def table(tmp_path_factory, resident):
    return write_experts(resident, tmp_path_factory.mktemp("experts") / "table")


def offloaded(resident, table, store="direct", slots=5):
    model = copy.deepcopy(resident)
    cache = offload_experts(model, table, store, slots * table.layout.stride, lambda message: None)
    return model, cache


def test_a_record_is_an_expert(resident, table):
    assert open_table(table.folder).layout == expert_layout(resident.config, torch.float32)
    record = np.zeros((1, table.layout.stride), np.uint8)
    with open_store(table, "memory", verify_checksums=True, notify=print) as store:
        store.read(np.array([EXPERTS + 3]), record)
    up, down = matrices_of(torch.from_numpy(record[0]), table.layout)
    experts = resident.moe_layers[1].experts
    assert up.equal(experts.up_proj[3]) and down.equal(experts.down_proj[3])


@pytest.mark.parametrize("slots", [1, 2, 5, 9, 12, 100])
@pytest.mark.parametrize("store", ["memory", "direct"])
def test_logits_are_the_same_to_the_last_bit(resident, table, store, slots):
    model, cache = offloaded(resident, table, store, slots)
    for seed, shape in enumerate([(1, 1), (1, 1), (3, 1), (2, 9), (1, 30), (3, 1), (1, 1)]):
        ids = token_ids(*shape, seed=seed)
        assert logits_of(model, ids).equal(logits_of(resident, ids))
    assert cache.num_bytes <= slots * table.layout.stride
    assert cache.statistics.bytes_loaded == cache.statistics.experts_loaded * table.layout.stride
    if slots >= LAYERS * EXPERTS:  # all stay: nothing comes twice
        assert cache.statistics.experts_loaded <= LAYERS * EXPERTS
    cache.close()


def test_in_bfloat16(tmp_path, resident):
    resident = copy.deepcopy(resident).bfloat16()
    model, cache = offloaded(resident, write_experts(resident, tmp_path / "table"))
    for shape in [(1, 1), (4, 5)]:
        assert logits_of(model, token_ids(*shape)).equal(logits_of(resident, token_ids(*shape)))
    cache.close()


def test_it_generates(resident, table):
    model, cache = offloaded(resident, table)
    expected = greedy_reference(resident, token_ids(2, 5), 6)
    assert greedy(model, token_ids(2, 5), 6).equal(expected)
    cache.close()


@pytest.mark.parametrize("positions", [1, 2, 13])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_arrival_changes_nothing(positions, backwards):
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 16, generator=generator)
    selected, weights = select_experts(torch.randn(positions, 5, generator=generator), 2)
    up, down = torch.randn(5, 24, 16, generator=generator), torch.randn(5, 16, 24)

    def visit(needed, compute):
        for expert in sorted(needed, reverse=backwards):
            compute(expert, up[expert], down[expert])

    mixed = mix_visited(hidden, selected, weights, 5, visit)
    assert mixed.equal(mix_selected(hidden, selected, weights, up, down))
    reference = mix_selected_reference(hidden, selected, weights, up, down)
    torch.testing.assert_close(mixed, reference)


class Recorder:
    """Visits a cache and notes in which order experts came, and that they are the right ones."""

    def __init__(self, cache, resident):
        self.cache, self.layers = cache, resident.moe_layers

    def __call__(self, layer, *needed):
        order = []

        def compute(expert, up, down):
            assert up.equal(self.layers[layer].experts.up_proj[expert])
            assert down.equal(self.layers[layer].experts.down_proj[expert])
            order.append(expert)

        before = self.cache.statistics.experts_loaded
        self.cache.visit(layer, needed, compute)
        assert sorted(order) == sorted(needed)
        return order, self.cache.statistics.experts_loaded - before


@pytest.fixture
def visit(resident, table):
    """A cache of six slots: one in transit, five for two layers."""
    cache = ExpertCache(open_store(table, "direct", notify=print), LAYERS, 6 * table.layout.stride)
    assert (cache.in_transit, cache.kept_per_layer) == (1, [3, 2])
    yield Recorder(cache, resident)
    cache.close()


def test_the_last_used_experts_of_every_layer_stay(visit):
    assert visit(0, 0, 1, 2) == ([0, 1, 2], 3)
    assert visit(1, 4, 5) == ([4, 5], 2)
    assert visit(0, 2, 0) == ([2, 0], 0)
    assert visit(0, 3) == ([3], 1)  # 1 was used least recently
    assert visit(0, 0, 2) == ([0, 2], 0)
    assert visit(1, 4, 5) == ([4, 5], 0)  # the other layer kept its own


def test_those_that_are_here_come_first(visit):
    visit(0, 4, 5)
    assert visit(0, 0, 4, 2, 5) == ([4, 5, 0, 2], 2)


def test_a_batch_that_needs_all_does_not_push_out_what_stays(visit):
    everything = range(EXPERTS)
    assert visit(0, *everything)[1] == EXPERTS
    assert [visit(0, *everything)[1] for _ in range(3)] == [EXPERTS - 3] * 3


def test_a_budget_below_one_expert_is_refused(resident, table):
    before = resident.moe_layers[0].experts
    model = copy.deepcopy(resident)
    with pytest.raises(UserError, match="holds no expert; one takes"):
        offload_experts(model, table, "direct", 1000, print)
    assert type(model.moe_layers[0].experts) is type(before)


def test_another_models_experts_are_refused(table):
    with pytest.raises(TableError, match="experts of another model"):
        offload_experts(moe_model(1, **SIZES), table, "direct", 10**6, print)
    with pytest.raises(TableError, match="this model has 12 records of 2 x 48 x 32 numbers in bf"):
        offload_experts(moe_model(**SIZES).bfloat16(), table, "direct", 10**6, print)


def test_an_interrupted_writing_goes_on(tmp_path, resident, monkeypatch):
    folder = tmp_path / "table"

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_experts(resident, folder, interrupt)
    with pytest.raises(TableError, match="not a finished table"):
        open_table(folder)
    model, cache = offloaded(resident, write_experts(resident, folder))
    assert logits_of(model, token_ids(2, 7)).equal(logits_of(resident, token_ids(2, 7)))
    cache.close()
    with pytest.raises(UserError, match="holds a table already"):
        write_experts(resident, folder)


def test_a_full_disk_is_told(tmp_path, resident, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError):
        write_experts(resident, tmp_path / "table")


# ------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("way", [way for way in ways_here() if way not in ("memory", "mmap")])
def test_a_file_that_ends_early_is_an_error_that_passes(tmp_path, resident, way):
    table = write_experts(resident, tmp_path / "table")
    path = table.path(table.shards[0])
    whole = path.read_bytes()
    with open_by(way, table) as store:
        visit = Recorder(ExpertCache(store, LAYERS, 6 * table.layout.stride), resident)
        assert visit(0, 0, 1)[1] == 2
        with path.open("r+b") as file:
            file.truncate(table.layout.record_offset(3) + 100)
        with pytest.raises(TableError, match="truncated while open") as error:
            visit(0, 1, 2, 3, 4)
        assert str(path) in str(error.value)
        path.write_bytes(whole)
        assert visit(0, 0, 1, 2, 3, 4, 5)[0]
        assert visit(1, 5, 0)[0] == [5, 0]


def test_an_error_of_the_disk_is_named(resident, table, monkeypatch):
    cache = ExpertCache(open_store(table, "direct", notify=print), LAYERS, 6 * table.layout.stride)
    visit = Recorder(cache, resident)
    with monkeypatch.context() as patch:
        patch.setattr(type(cache.store), "complete", _fail)
        patch.setattr(type(cache.store), "_read", _fail)
        with pytest.raises(TableError, match="Input/output error"):
            visit(0, 1, 2)
    assert visit(0, 1, 2)[0] == [1, 2]
    cache.close()


def _fail(self, ids, reads, *_):
    raise self._unread(list(ids), reads, 0, 0, os.strerror(errno.EIO))


def test_an_error_while_computing_leaves_the_cache_whole(resident, table):
    cache = ExpertCache(open_store(table, "direct", notify=print), LAYERS, 6 * table.layout.stride)

    def fail(*_):
        raise RuntimeError("on purpose")

    for _ in range(5):
        with pytest.raises(RuntimeError, match="on purpose"):
            cache.visit(0, range(EXPERTS), fail)
    visit = Recorder(cache, resident)
    assert visit(0, *range(EXPERTS))[0] and visit(1, *range(EXPERTS))[0]
    cache.close()


# ----------------------------------------------------------------------------- other devices


@pytest.mark.parametrize("way", [way for way in WAYS if way in ways_here()])
def test_by_a_lane_that_is_late(resident, table, way, monkeypatch):
    """As on a GPU, whose copies come after the host has gone on."""
    lane = LateLane()
    monkeypatch.setattr(loading, "open_lane", lambda device: lane)
    model = copy.deepcopy(resident)
    with open_by(way, table) as store:
        cache = ExpertCache(store, LAYERS, 9 * table.layout.stride)
        kind = loading.PinnedCopies if way == "memory" else loading.StagedReads
        assert isinstance(cache._loader, kind)
        visit = Recorder(cache, model)
        random = np.random.default_rng(0)
        for step in range(60):
            visit(step % 2, *random.permutation(EXPERTS)[: random.integers(1, 7)].tolist())
        assert lane.copies == cache.statistics.experts_loaded
        cache.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("store", ["memory", "direct"])
def test_on_a_gpu(resident, table, store):
    expected = copy.deepcopy(resident).cuda()
    model = copy.deepcopy(resident).cuda()
    cache = offload_experts(model, table, store, 5 * table.layout.stride, print)
    for step in range(20):
        ids = token_ids(1 + step % 4, 1 + step % 7, seed=step).cuda()
        torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids))
    cache.close()
