"""What only a GPU can show of records on disk: mapped memory, waiting kernels, CUDA graphs."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from random_tables import make_table

from lookup_experts.errors import TableError
from lookup_experts.table.device_cache import CachedRecords
from lookup_experts.table.encoding import ENCODINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(300),
]

VOCAB = 700
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def table_of_700(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device-cache-cuda") / "table"
    return make_table(folder, vocab_size=VOCAB, row_size=512, ids_per_shard=200)


@pytest.fixture
def opened(table_of_700):
    """(records on the GPU, of which few are at hand; the table's records there)."""
    table, records = table_of_700
    cache = CachedRecords(table, CUDA, 20 * 4096, 100 * 4096)
    yield cache, torch.from_numpy(records).cuda()
    cache.close()


def random_ids(count, seed):
    generator = random.Random(seed)
    bound = generator.choice([60, VOCAB])
    return torch.tensor([generator.randrange(bound) for _ in range(count)])


def fetched(cache, ids):
    out = torch.zeros((len(ids), 4096), dtype=torch.uint8, device=CUDA)
    cache.gather(cache.locate(ids), 0, out)
    return out


def test_ram_slots_have_one_address(opened):
    cache, _ = opened
    assert cache._ram.data_ptr() == cache._process.slots.ctypes.data
    assert cache._ram.device.type == "cuda"


def test_steps(opened):
    """The host runs ahead of the device; nothing waits until the end."""
    cache, records = opened
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    for step in range(300):
        ids = random_ids((1, 8, 32, 64)[step % 4], step).cuda()
        wrong += (fetched(cache, ids) != records[ids]).any(dim=1).sum()
    assert int(wrong) == 0
    cache.check()
    counts = cache.counts()
    assert counts.hot_hits and counts.ram_hits and counts.records_read > 1000


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_every_encoding(tmp_path, encoding):
    table, records = make_table(tmp_path / "table", vocab_size=300, encoding=encoding, row_size=24)
    stride = table.layout.stride
    cache = CachedRecords(table, CUDA, 9 * stride, 0)
    for step in range(30):
        ids = random_ids(64, step) % 300
        out = torch.zeros((64, stride), dtype=torch.uint8, device=CUDA)
        cache.gather(cache.locate(ids.cuda()), 0, out)
        assert np.array_equal(out.cpu().numpy(), records[ids.numpy()])
    cache.check()
    cache.close()


def test_graphs_that_are_replayed_with_other_ids(opened):
    cache, records = opened
    graphs = []
    for count in (1, 8, 32):
        ids = torch.zeros(count, dtype=torch.int64, device=CUDA)
        out = torch.zeros((count, 4096), dtype=torch.uint8, device=CUDA)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.gather(cache.locate(ids), 0, out)
        graphs.append((graph, ids, out))
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    for step in range(300):
        graph, ids, out = graphs[step % 3]
        ids.copy_(random_ids(len(ids), step))
        graph.replay()
        wrong += (out != records[ids]).any(dim=1).sum()
        if step % 7 == 0:  # eagerly in between
            others = random_ids(8, step + 1000).cuda()
            wrong += (fetched(cache, others) != records[others]).any(dim=1).sum()
    assert int(wrong) == 0
    cache.check()


def test_several_streams(opened):
    cache, records = opened
    streams = [torch.cuda.Stream() for _ in range(3)]
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    given = [random_ids(64, step).cuda() for step in range(60)]
    found = []
    torch.cuda.synchronize()
    for step, ids in enumerate(given):
        with torch.cuda.stream(streams[step % 3]):
            found.append(fetched(cache, ids))
    torch.cuda.synchronize()
    for ids, rows in zip(given, found, strict=True):
        wrong += (rows != records[ids]).any(dim=1).sum()
    assert int(wrong) == 0


def test_the_host_does_not_wait(opened):
    """Not even while the device does: a worker that is stopped holds the step, and nobody else."""
    cache, records = opened
    ids = torch.arange(600, 632, device=CUDA)
    torch.ones(1000, device=CUDA).sum()  # loading a kernel would wait for those that run
    torch.cuda.synchronize()
    os.kill(cache._process.pid, signal.SIGSTOP)
    try:
        started_at = time.perf_counter()
        rows = fetched(cache, ids)
        cache.check()
        assert time.perf_counter() - started_at < 0.5
        other = torch.cuda.Stream()  # the rest of the GPU goes on
        with torch.cuda.stream(other):
            total = torch.ones(1000, device=CUDA).sum()
        other.synchronize()
        assert not torch.cuda.current_stream().query()
    finally:
        os.kill(cache._process.pid, signal.SIGCONT)
    assert torch.equal(rows, records[ids])
    assert float(total) == 1000


def test_ids_outside_of_the_table(opened):
    cache, records = opened
    rows = fetched(cache, torch.tensor([5, -1, VOCAB, 6], device=CUDA))
    assert torch.equal(rows[[0, 3]], records[[5, 6]])
    assert (rows[1:3] == 0xFF).all()
    with pytest.raises(TableError, match="is outside of the table's vocabulary"):
        cache.check()
    cache.check()


def test_a_worker_that_is_killed_ends_the_wait(opened):
    cache, _ = opened
    os.kill(cache._process.pid, signal.SIGSTOP)
    rows = fetched(cache, torch.arange(600, 632, device=CUDA))
    os.kill(cache._process.pid, signal.SIGKILL)
    started_at = time.perf_counter()
    torch.cuda.synchronize()
    assert time.perf_counter() - started_at < 2
    assert (rows == 0xFF).all()
    for _ in range(2):
        with pytest.raises(TableError, match="has ended"):
            cache.check()


def test_a_whole_table(table_of_700):
    table, records = table_of_700
    cache = CachedRecords(table, CUDA, 2**30, 0)
    ids = torch.arange(0, VOCAB, 11, device=CUDA)
    assert np.array_equal(fetched(cache, ids).cpu().numpy(), records[::11])
    assert cache.device_bytes < table.layout.table_bytes + 2**14
    cache.check()
    cache.close()
