"""What only a GPU can show: kernels, streams, page-locked memory, CUDA graphs."""

import copy
import gc
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from random_tables import make_table
from reading import Expected, open_by
from staged_rows import FORMS, OPERATION_OF, StageRows, by_the_book, stage_model
from tiny_models import attached_model, greedy, logits_of, tiny_model, token_ids

import lookup_experts as le
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.table import additions, mixing
from lookup_experts.table.additions import Way, as_captured
from lookup_experts.table.device_rows import STEP_POSITIONS
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.mixing import decode_and_mix, decode_and_mix_reference
from lookup_experts.table.reader import TableReader
from lookup_experts.table.store_choice import STORES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(300),
]

ONE_BLOCK = {"num_layers": 2, "num_experts": 2, "row_size": 512, "encoding": "float16"}
"""A record of 4096 bytes."""
STRIDE = 4096


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(table, its records) of 300 ids."""
    return make_table(tmp_path_factory.mktemp("wide"), vocab_size=300, **ONE_BLOCK)


@pytest.fixture
def open_on_gpu(wide):
    """A function that opens a reader on the GPU, and closes it in the end."""
    with ExitStack() as stack:

        def open_(way="threads", cache_records=0, table=None, dtype=torch.float16):
            table = table or wide[0]
            store = stack.enter_context(open_by(way, table))
            cache_bytes = cache_records * table.layout.stride
            reader = TableReader(table, store, dtype, "cuda", cache_bytes)
            stack.callback(reader.close)
            return reader

        yield open_


def assert_right(expected: Expected, rows, ids) -> None:
    """Layers bit for bit, mixes, and all of a block in one."""
    for layer in range(expected.num_layers):
        given, with_experts = expected.block(layer, ids)
        if hasattr(rows, "route_mix_add"):
            found = rows.route_mix_add(layer, *(each.cuda() for each in given))
            if found is not None:
                expected.assert_close(found.cpu(), with_experts)
        weights = expected.weights(ids, layer)
        mixed = rows.mix(layer, weights.cuda()).cpu()
        expected.assert_close(mixed, expected.mixed(layer, ids, weights))
        assert torch.equal(rows.layer(layer)[rows.index].cpu(), expected.layer(layer, ids))


# -------------------------------------------------------------------------------------- kernel


@pytest.mark.parametrize("hidden", [1, 96, 257, 768, 1000, 1024, 4096])
@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_the_kernel_gives_what_its_reference_gives(name, hidden):
    encoding = get_encoding(name)
    for experts, positions, dtype in ((1, 1, torch.float32), (4, 9, torch.bfloat16)):
        layer_bytes = encoding.layer_bytes(experts, hidden)
        records = torch.zeros(7, -(-3 * layer_bytes // 64) * 64, dtype=torch.uint8)
        for layer in range(3):
            rows = torch.randn(7, experts, hidden)
            records[:, layer * layer_bytes : (layer + 1) * layer_bytes] = encoding.encode(rows)
        places, weights = torch.randint(0, 7, (positions,)), torch.rand(positions, experts)
        settings = (encoding, hidden, 2 * layer_bytes, dtype)
        on_gpu = (records.cuda(), places.cuda(), weights.cuda())
        found = decode_and_mix(*on_gpu, *settings)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for expected in (
            decode_and_mix_reference(records, places, weights, *settings),
            decode_and_mix_reference(*on_gpu, *settings).cpu(),
        ):
            torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def block_arguments(form, encoding, hidden, row_size, experts, positions, dtype):
    """What the kernel of a form is called with: one layer of two; and its reference's name."""
    layer_bytes = encoding.layer_bytes(experts, row_size)
    records = torch.zeros(positions, -(-2 * layer_bytes // 64) * 64, dtype=torch.uint8)
    encoded = encoding.encode(torch.randn(positions, experts, row_size))
    records[:, layer_bytes : 2 * layer_bytes] = encoded
    places = None if positions % 2 else torch.arange(positions).flip(0)

    def matrix(rows, columns):
        return (torch.randn(rows, columns) / columns**0.5).to(dtype)

    states, output, residual = torch.randn(3, positions, 1, hidden).to(dtype)
    codes, out_proj = (encoding, layer_bytes), matrix(hidden, row_size)
    if form == "wide":
        router = matrix(experts, hidden)
        return (records, places, states, router, output, *codes, residual)
    if form == "narrow":
        return (records, places, states, matrix(experts, hidden), out_proj, *codes)
    norm = torch.randn(hidden).to(dtype)
    return (records, places, states, matrix(row_size, hidden), out_proj, norm, 1e-5, *codes)


# Sizes are constants to these kernels: each case is compiled anew, for a second or so.
BLOCKS = [
    *((name, 257, 3, 63, torch.bfloat16) for name in sorted(ENCODINGS)),
    *((name, 768, 4, 1, torch.bfloat16) for name in ("bfloat16", "nf4")),
    *((name, 4096, 4, 8, torch.float16) for name in ("float16", "nf3")),
    ("float32", 1, 1, 1, torch.float32),
    ("int8", 1024, 16, 64, torch.float32),
]
"""Encoding, d, N, positions, dtype."""


@pytest.mark.parametrize("form", OPERATION_OF)
@pytest.mark.parametrize("name,hidden,experts,positions,dtype", BLOCKS)
def test_a_blocks_kernels_give_what_their_references_give(
    form, name, hidden, experts, positions, dtype
):
    experts = 1 if form == "gated" else experts
    row_size = hidden if form == "wide" else -(-hidden // 4)
    given = block_arguments(form, get_encoding(name), hidden, row_size, experts, positions, dtype)
    on_gpu = [each.cuda() if isinstance(each, torch.Tensor) else each for each in given]
    expected = getattr(mixing, OPERATION_OF[form] + "_reference")(*given)
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    for _ in range(3):
        found = getattr(mixing, OPERATION_OF[form])(*on_gpu)
        torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_a_norm_waits_for_all_pieces_of_its_product():
    """Thousands of times, as quickly as they can be launched: never is one piece missing."""
    given = block_arguments("gated", get_encoding("nf4"), 2048, 256, 1, 64, torch.float32)
    on_gpu = [each.cuda() if isinstance(each, torch.Tensor) else each for each in given]
    first = mixing.gate_project(*on_gpu)
    torch.testing.assert_close(
        first.cpu(), mixing.gate_project_reference(*given), rtol=1e-4, atol=1e-4
    )
    for _ in range(20):
        several = [mixing.gate_project(*on_gpu) for _ in range(100)]
        assert all(torch.equal(found, first) for found in several)


def test_three_are_added():
    for size in (1, 768, 32 * 768 + 5):
        for dtype in (torch.bfloat16, torch.float32):
            given = torch.randn(3, size, device="cuda").to(dtype).unbind()
            found = mixing.add_three(*given)
            torch.testing.assert_close(found, mixing.add_three_reference(*given))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_gives_the_same_in_a_graph(form, beside, deferred, monkeypatch):
    """Captured once, replayed for ids and records that change."""
    for name in ("WIDE", "NARROW"):
        monkeypatch.setattr(additions, name, Way(beside, deferred))
    model = stage_model(form)
    batches = [token_ids(3, 2, seed=seed) for seed in range(4)]
    expected = [by_the_book(model, ids).cuda() for ids in batches]
    with torch.no_grad():
        stages = [model.expert_source.rows(ids, False, model.model) for ids in batches]
    layout, memory = stages[0].layout, stages[0].memory.cuda()
    memories = [stage.memory.cuda() for stage in stages]

    class Stage:
        """Rows at a fixed address."""

        def rows(self, token_ids, ready=False, base_model=None):
            return StageRows(layout, torch.float32, memory, token_ids)

    model.cuda().set_expert_source(Stage())
    # All that transformers would find out from numbers on the GPU is said.
    ids = batches[0].cuda()
    mask = torch.ones(2, 2, dtype=torch.bool, device="cuda").tril().expand(3, 1, 2, 2)
    positions = torch.arange(2, device="cuda").expand(3, 2)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.inference_mode(), as_captured():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                warm = model(input_ids=ids, **given).logits
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(warm, expected[0], rtol=1e-3, atol=1e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(input_ids=ids, **given).logits
        for turn in range(40):
            number = turn % 4
            ids.copy_(batches[number])
            memory.copy_(memories[number])
            graph.replay()
            torch.testing.assert_close(logits, expected[number], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("way", ["memory", "mmap", "threads", "io_uring"])
def test_rows_under_pressure(wide, open_on_gpu, way):
    from reading import ways_here

    if way not in ways_here():
        pytest.skip("no io_uring here")
    table, records = wide
    expected, reader = Expected(table, records), open_on_gpu(way, 70)
    random = np.random.default_rng(0)
    with torch.no_grad():
        for step in range(60):
            length = int(random.choice([1, 3, 32, 64, 65, 200, 256, 300]))
            ids = torch.from_numpy(random.zipf(1.2, (1, length)) % 300)
            assert_right(expected, reader.rows(ids.cuda(), ready=step % 3 == 0), ids)


@pytest.mark.parametrize("way", ["memory", "threads"])
def test_no_stage_is_overwritten_while_the_gpu_still_reads_it(wide, open_on_gpu, way):
    """The model's stream is kept busy, so that it is far behind the host."""
    table, records = wide
    expected, reader = Expected(table, records), open_on_gpu(way)
    several = [
        torch.arange(first, first + STEP_POSITIONS).view(1, -1)
        for first in range(0, 256, STEP_POSITIONS)
    ]
    blocks = [expected.block(1, ids) for ids in several]
    on_gpu = [[each.cuda() for each in given] for given, _ in blocks]
    added = []
    with torch.no_grad():
        for ids, given in zip(several, on_gpu, strict=True):
            rows = reader.rows(ids.cuda())
            torch.cuda._sleep(100_000_000)
            added.append(rows.route_mix_add(1, *given))
            del rows
    for (_, with_experts), found in zip(blocks, added, strict=True):
        expected.assert_close(found.cpu(), with_experts)


def test_a_prompts_buffers_are_not_overwritten_while_the_gpu_still_reads_them(
    tmp_path, open_on_gpu, monkeypatch
):
    from lookup_experts.table import reader as reader_module

    monkeypatch.setattr(reader_module, "GROUP_BYTES", 1)
    table, records = make_table(tmp_path, vocab_size=100, **{**ONE_BLOCK, "num_layers": 12})
    expected, reader = Expected(table, records), open_on_gpu(table=table)
    ids = torch.arange(100).view(1, -1)
    weights = [expected.weights(ids, layer) for layer in range(12)]
    on_gpu = [each.cuda() for each in weights]
    mixed = []
    with torch.no_grad():
        rows = reader._on_device.rows(ids, ready=False)
        for layer in range(12):
            torch.cuda._sleep(30_000_000)
            mixed.append(rows.mix(layer, on_gpu[layer]))
    for layer in range(12):
        by_the_book = expected.mixed(layer, ids, weights[layer])
        expected.assert_close(mixed[layer].cpu(), by_the_book)


def test_streams_of_two_threads(wide, open_on_gpu):
    from concurrent.futures import ThreadPoolExecutor

    table, records = wide
    expected, reader = Expected(table, records), open_on_gpu(cache_records=100)

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(60):
                ids = torch.from_numpy(random.integers(0, 150, (1, int(random.integers(1, 60)))))
                assert_right(expected, reader.rows(ids.cuda()), ids)

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(read, seed) for seed in range(2)]:
            future.result(120)


# -------------------------------------------------------------------------------------- memory


def test_the_budget_is_of_the_gpus_memory_and_kept(open_on_gpu):
    before = torch.cuda.memory_allocated()
    reader = open_on_gpu(cache_records=250)  # half of them on the GPU
    assert torch.cuda.memory_allocated() - before <= 125 * STRIDE + 8192
    with torch.no_grad():
        for first in range(0, 300, 10):
            rows = reader.rows(torch.arange(first, first + 10).view(1, -1).cuda())
            rows.mix(0, torch.rand(10, 2, device="cuda", dtype=torch.float16))
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() - before <= (125 + 10) * STRIDE + 65536
    del rows
    reader.close()
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 65536


def test_ten_thousand_steps_leave_nothing_behind(wide, open_on_gpu):
    from reading import open_files, resident_bytes

    reader = open_on_gpu("io_uring", cache_records=100)
    random = np.random.default_rng(0)
    weights = torch.rand(2, 2, device="cuda", dtype=torch.float16)

    def steps(count: int) -> tuple[int, int, int]:
        with torch.inference_mode():
            for _ in range(count):
                ids = torch.from_numpy(random.zipf(1.3, (2, 1)) % 300).cuda()
                reader.rows(ids).mix(1, weights)
        torch.cuda.synchronize()
        gc.collect()
        return open_files(), torch.cuda.memory_allocated(), resident_bytes()

    before, after = steps(500), steps(10_000)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 4_000_000


# ---------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("way", ["memory", "threads", "io_uring"])
@pytest.mark.parametrize("length", [1, 8, 64])
def test_a_captured_step_finds_the_records_of_other_ids(wide, open_on_gpu, way, length):
    """Of ids that lie on the device alone, with most records missing at first."""
    from reading import ways_here

    if way not in ways_here():
        pytest.skip("no io_uring here")
    table, records = wide
    expected, reader = Expected(table, records), open_on_gpu(way, 80)
    ids = torch.zeros(1, length, dtype=torch.int64, device="cuda")
    weights = [expected.weights(ids.cpu(), layer).cuda() for layer in range(2)]

    def step():
        rows = reader.rows(ids)
        return [rows.mix(layer, weights[layer]) for layer in range(2)]

    with torch.inference_mode():
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mixed = step()
        random = np.random.default_rng(length)
        for _ in range(60):
            chosen = torch.from_numpy(random.zipf(1.2, (1, length)) % 300)
            ids.copy_(chosen)
            graph.replay()
            for layer in range(2):
                by_the_book = expected.mixed(layer, chosen, weights[layer].cpu())
                expected.assert_close(mixed[layer].cpu(), by_the_book)


def test_a_table_in_ram_is_registered_once_and_let_go(wide, open_on_gpu):
    runtime = torch.cuda.cudart()
    first = open_on_gpu("memory")
    address = first._whole.data_ptr()
    second = copy.deepcopy(first)
    assert second._whole.data_ptr() == address
    first.close()
    with torch.no_grad():
        ids = torch.tensor([[5, 299]])
        assert_right(Expected(*wide), second.rows(ids.cuda()), ids)
    second.close()
    del first, second
    gc.collect()
    assert int(runtime.cudaHostUnregister(address)) != 0  # it isn't any more


# -------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A function that gives the inference folder of one model in an encoding."""
    folder, model = tmp_path_factory.mktemp("folded"), attached_model("llama")

    def of(encoding: str):
        out = folder / encoding
        if not out.exists():
            le.reparameterize(model, out, encoding=encoding)
        return out

    return of


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
@pytest.mark.parametrize("store", STORES)
def test_logits_are_those_of_the_cpu(folded, store, encoding):
    folder = folded(encoding)
    plain = le.load(folder, store="memory", dtype="float32")
    for cache in (0, "64kB"):
        model = le.load(folder, store=store, cache=cache, device="cuda", dtype="float32")
        for ids in (token_ids(1, 1), token_ids(2, 40), token_ids(4, 100)):
            found = logits_of(model, ids.cuda()).cpu()
            torch.testing.assert_close(found, logits_of(plain, ids), rtol=2e-3, atol=2e-3)
        model.expert_source.close()


def test_a_model_that_is_moved_takes_its_table_along(folded):
    model, ids = le.load(folded("float32"), store="mmap", dtype="float32"), token_ids(2, 9)
    expected = logits_of(model, ids)
    for device in ("cuda", "cpu", "cuda:0"):
        found = logits_of(model.to(device), ids.to(device)).cpu()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert model.expert_source.device == torch.device("cuda:0")


def test_gradients_flow_through_a_table_on_the_gpu(folded):
    ids, gradients = token_ids(2, 9), []
    for device in ("cpu", "cuda"):
        model = le.load(folded("float32"), store="mmap", device=device, dtype="float32")
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        gradients.append({name: w.grad.cpu() for name, w in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=2e-3, atol=2e-4)


@contextmanager
def waiting_is_an_error():
    """Torch raises wherever one of its operations would wait for the GPU. Waiting for an event,
    as is done for the ids of a prompt, is none of these."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("length", [1, 32, 200])
def test_rows_wait_for_nothing_but_a_prompts_ids(open_on_gpu, length):
    reader = open_on_gpu()
    several = [torch.arange(first, first + length).view(1, -1).cuda() for first in range(4)]
    weights = torch.rand(length, 2, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        reader.rows(several[0]).mix(0, weights)
        reader.rows(several[0]).mix(1, weights)
        with waiting_is_an_error():
            for ids in several:
                rows = reader.rows(ids)
                rows.mix(0, weights)
                rows.mix(1, weights)


def test_a_models_step_waits_for_nothing_but_the_ids(folded):
    model = le.load(folded("nf4"), store="direct", cache=0, device="cuda", dtype="bfloat16")
    steps = [token_ids(1, 1, seed=seed).cuda() for seed in range(8)]
    with torch.inference_mode():
        for each in (tiny_model("llama").to("cuda", torch.bfloat16), model):
            prompt = each(token_ids(1, 8).cuda(), use_cache=True)
            cache = {cache_argument(each): cache_of(prompt)}
            for ids in steps[:4]:
                each(ids, use_cache=True, **cache)
            try:
                with waiting_is_an_error():
                    for ids in steps[4:]:
                        each(ids, use_cache=True, **cache)
            except RuntimeError as error:
                if each is model:
                    raise
                pytest.skip(f"the backbone waits by itself: {error}")


@pytest.mark.parametrize("encoding", ["bfloat16", "nf4"])
def test_static_cache_and_cuda_graphs_give_the_same_tokens(folded, encoding):
    """`generate` compiles a static cache's decoding with `reduce-overhead` by itself."""
    folder = folded(encoding)
    model = le.load(folder, store="direct", cache="64kB", device="cuda", dtype="float32")
    prompts = [token_ids(1, 12, seed=seed).cuda() for seed in range(3)]
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    torch._dynamo.reset()
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(greedy(model, prompt, 24, cache_implementation="static"), tokens)
    torch._dynamo.reset()
