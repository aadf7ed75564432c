"""The reader for devices, on the CPU: the same code over lanes that are late, or take notes.

Every row that comes out is compared with the table's bytes. What needs a GPU is in
`test_cuda.py`.
"""

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import LateLane, NotingLane
from random_tables import make_table
from reading import ONE_BLOCK, Expected, batches, open_on, ways_here
from tiny_models import greedy, logits_of, token_ids

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.model.rows import mix_reference
from lookup_experts.model.wiring import forward_pass
from lookup_experts.table import additions, device_rows
from lookup_experts.table import reader as reader_module
from lookup_experts.table.cache_budget import parse_cache
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.lanes import HostLane, open_lane
from lookup_experts.table.mixing import (
    decode_and_mix,
    decode_and_mix_reference,
    prepare,
    route_mix_add,
)
from lookup_experts.table.reader import TableReader
from lookup_experts.table.rows import MemoryRows

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(table, its records) of 300 ids."""
    return make_table(tmp_path_factory.mktemp("wide"), vocab_size=300, **ONE_BLOCK)


# -------------------------------------------------------------------------------- right rows


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_of_any_table_and_batch(tmp_path_factory, data):
    vocab_size = data.draw(st.sampled_from([1, 64, 65, 130]), "vocab_size")
    shape = {
        "vocab_size": vocab_size,
        "num_layers": data.draw(st.integers(1, 5), "layers"),
        "num_experts": data.draw(st.integers(1, 4), "experts"),
        "row_size": data.draw(st.sampled_from([1, 7, 40, 96, 520]), "d"),
        "encoding": data.draw(st.sampled_from(sorted(ENCODINGS)), "encoding"),
        "version": data.draw(st.sampled_from([2, 2, 1]), "version"),
    }
    table, records = make_table(tmp_path_factory.mktemp("table"), **shape)
    dtypes = {torch.float32, table.layout.encoding.torch_dtype or torch.bfloat16}
    dtype = data.draw(st.sampled_from(sorted(dtypes, key=str)), "dtype")
    cache_bytes = data.draw(st.sampled_from([0, 3, 70, 1000]), "cache") * table.layout.stride
    group_bytes = data.draw(st.sampled_from([1, 2**24]), "group_bytes")
    way = data.draw(st.sampled_from(ways_here()), "way")
    expected = Expected(table, records, dtype)
    no_gradients = data.draw(st.sampled_from([torch.no_grad, torch.inference_mode]), "mode")
    with pytest.MonkeyPatch.context() as patch, no_gradients():
        patch.setattr(device_rows, "AT_ONCE_BYTES", data.draw(st.sampled_from([1, 2**19]), "once"))
        lane = LateLane(1e-3)
        with open_on(lane, table, way, dtype, cache_bytes, group_bytes) as reader:
            for _ in range(4):
                ids = data.draw(batches(vocab_size), "ids")
                ready = data.draw(st.booleans(), "ready")
                layers = list(range(expected.num_layers))
                order = data.draw(st.sampled_from([layers, layers + layers, layers[::-1]]))
                expected.assert_right(reader.rows(ids, ready=ready), ids, order)


def test_a_cache_under_pressure_never_gives_another_ids_rows(wide):
    table, records = wide
    expected = Expected(table, records)
    random = np.random.default_rng(0)
    with open_on(LateLane(5e-4), table, cache_bytes=70 * 4096) as reader, torch.no_grad():
        held = []
        for _ in range(60):
            ids = torch.from_numpy(random.zipf(1.2, (1, int(random.integers(1, 64)))) % 300)
            held = [*held[-2:], (ids, reader.rows(ids))]  # some are read late, some never
            chosen, rows = held[0]
            expected.assert_right(rows, chosen)
        statistics = reader.stats()
        assert 0 < statistics.cache_hits < statistics.ids_unique


def test_threads_share_a_cache(wide):
    table, records = wide
    expected = Expected(table, records)
    problems: list[BaseException] = []

    def read(seed: int, reader: TableReader) -> None:
        random = np.random.default_rng(seed)
        try:
            with torch.no_grad():
                for _ in range(25):
                    ids = torch.from_numpy(random.integers(0, 90, (1, int(random.integers(1, 60)))))
                    rows = reader.rows(ids)
                    if random.random() < 0.8:
                        expected.assert_right(rows, ids)
        except BaseException as error:
            problems.append(error)

    with open_on(LateLane(5e-4), table, cache_bytes=80 * 4096) as reader:
        threads = [threading.Thread(target=read, args=(seed, reader)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in threads)
    assert problems == []


def test_gradients_reach_the_weights(wide):
    table, records = wide
    expected = Expected(table, records)
    with open_on(LateLane(), table) as reader:
        for length in (5, 200):
            ids = torch.arange(length).view(1, -1)
            with torch.no_grad():
                rows = reader.rows(ids)
            weights = expected.weights(ids, 1).requires_grad_()
            rows.mix(1, weights).float().square().sum().backward()
            again = weights.detach().clone().requires_grad_()
            by_the_book = mix_reference(expected.layer(1, ids)[0], torch.arange(length), again)
            by_the_book.float().square().sum().backward()
            torch.testing.assert_close(weights.grad, again.grad, rtol=2e-2, atol=2e-2)


# -------------------------------------------------------------------------- what is brought when


def test_a_steps_ids_never_come_to_the_host(wide):
    lane = NotingLane()
    with open_on(lane, wide[0]) as reader, torch.no_grad():
        for length in (1, 64):
            reader.rows(torch.arange(length).view(1, -1)).mix(0, torch.rand(length, 2))
            assert lane.ids_fetched == 0
        reader.rows(torch.arange(65).view(1, -1)).mix(0, torch.rand(65, 2))
        assert lane.ids_fetched == 1


def test_steps_are_counted_where_they_are_found(wide):
    with open_on(HostLane(), wide[0], cache_bytes="409600:40960") as reader, torch.no_grad():
        for ids in ([3, 4, 3], [3, 4, 5]):
            reader.rows(torch.tensor([ids])).layer(0)
        found = reader.stats()
        assert (found.batches, found.ids_asked, found.cache_hits) == (2, 6, 2)
        assert found.bytes_read == 3 * 4096
        reader.rows(torch.arange(100).view(1, -1)).layer(0)
        assert reader.stats().ids_unique == 106
        reader.reset_stats()
        assert reader.stats().ids_asked == 0
        reader.rows(torch.tensor([[3]])).layer(0)
        reader.move_to("cpu")  # to another such device: what the first one met stays counted
        reader.rows(torch.tensor([[3, 7]])).layer(0)
        assert reader.stats().ids_asked == 3
        assert reader.missed is None  # which ones had to be read is known to the device alone


@pytest.mark.parametrize(
    ("cache", "taken"), [(0, 0), ("81920", 10), ("81920:8192", 2), ("2MB", 300)]
)
def test_the_cache_is_split_as_it_is_asked_for(wide, cache, taken):
    with open_on(HostLane(), wide[0], cache_bytes=cache) as reader:
        assert reader._on_device._records.num_hot == taken
        assert reader.cache_bytes == parse_cache(cache).total
    with open_on(HostLane(), wide[0], "memory", cache_bytes=cache) as reader:
        assert reader.cache_bytes == 0


def test_a_prompts_buffers_are_copied_into_after_what_still_reads_them(tmp_path):
    table, _ = make_table(tmp_path, vocab_size=100, **{**ONE_BLOCK, "num_layers": 12})
    lane = NotingLane()
    with open_on(lane, table, group_bytes=1) as reader, torch.no_grad():
        rows = reader.rows(torch.arange(100).view(1, -1))
        for layer in range(12):
            rows.mix(layer, torch.rand(100, 2))
        del rows
        reader._thread.submit(int).result()
    order = [note for note in lane.notes if note != "lead"]
    assert len(order) > 6 and order == ["follow", "copy"] * (len(order) // 2)


# ------------------------------------------------------------------------------------ faults


class Fault:
    """Makes the store fail as often as it is told to."""

    def __init__(self, store, monkeypatch, operation="_fetch") -> None:
        self.failures = 0
        really = getattr(store, operation)

        def fail_or_do_it(*arguments):
            if self.failures:
                self.failures -= 1
                raise TableError("the disk is gone")
            return really(*arguments)

        monkeypatch.setattr(store, operation, fail_or_do_it)


@pytest.mark.parametrize("ready", [False, True])
def test_a_prompts_fault_is_an_error_and_leaves_no_wrong_rows(wide, monkeypatch, ready):
    length = 200
    table, records = wide
    expected = Expected(table, records)
    ids, half = torch.arange(length).view(1, -1), torch.arange(0, length, 2).view(1, -1)
    with open_on(LateLane(), table, "mmap", cache_bytes=100 * 4096) as reader, torch.no_grad():
        fault = Fault(reader._store, monkeypatch)
        expected.assert_right(reader.rows(half), half)
        for _ in range(3):
            fault.failures = 2
            with pytest.raises(TableError, match="the disk is gone"):
                reader.rows(ids, ready=ready).mix(0, torch.rand(length, 2))
            fault.failures = 0
            expected.assert_right(reader.rows(half), half)
        expected.assert_right(reader.rows(ids, ready=ready), ids)


def test_a_steps_fault_gives_no_number_and_is_told_next(wide, monkeypatch):
    table, records = wide
    expected = Expected(table, records)
    ids, weights = torch.arange(5).view(1, -1), torch.rand(5, 2).half()
    with open_on(LateLane(), table, cache_bytes="409600:8192") as reader, torch.no_grad():
        store = reader._on_device._records._process.store
        fault = Fault(store, monkeypatch, "begin")
        for _ in range(3):
            fault.failures = 100
            assert reader.rows(ids).mix(0, weights).isnan().all()
            fault.failures = 0
            with pytest.raises(TableError, match="the disk is gone"):
                reader.rows(ids)
        expected.assert_right(reader.rows(ids), ids)


@pytest.mark.parametrize("ready", [False, True])
def test_a_thread_that_ends_while_it_reads(wide, monkeypatch, ready):
    def end(*_):
        raise SystemExit

    table, records = wide
    ids = torch.arange(200).view(1, -1)
    with open_on(LateLane(5e-4), table, cache_bytes=2**20) as reader, torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(reader._store, "_fetch", end)
            for _ in range(2):
                with pytest.raises(TableError, match="thread that reads the table has ended"):
                    reader.rows(ids, ready=ready).layer(0)
        for _ in range(2):
            Expected(table, records).assert_right(reader.rows(ids, ready=ready), ids)


def test_the_thread_of_prompts_is_gone(wide):
    table, _ = wide
    ids = torch.arange(200).view(1, -1)
    with open_on(HostLane(), table) as reader, torch.no_grad():
        reader._thread.shutdown()
        rows = reader.rows(ids)
        for layer in (0, 1, 0):
            with pytest.raises(TableError, match="thread that reads the table has ended"):
                rows.layer(layer)


@pytest.mark.parametrize("wrong", [-1, 300, 1 << 40])
def test_ids_outside_of_the_table(wide, wrong):
    with open_on(HostLane(), wide[0]) as reader, torch.no_grad():
        with pytest.raises(TableError, match=f"Token id {wrong} is"):
            reader.rows(torch.full((1, 300), wrong))
        mixed = reader.rows(torch.tensor([[1, wrong]])).mix(0, torch.rand(2, 2).half())
        assert mixed[0].isfinite().all() and mixed[1].isnan().all()
        with pytest.raises(TableError, match=f"Token id {wrong} is"):
            reader.rows(torch.tensor([[1]]))
        assert reader.rows(torch.tensor([[1]])).layer(0).isfinite().all()


def test_rows_dropped_unread_and_a_reader_closed_at_once(wide):
    for length in (5, 200):
        with open_on(LateLane(0.01), wide[0]) as reader, torch.no_grad():
            reader.rows(torch.arange(length).view(1, -1))
    with pytest.raises(ValueError, match="closed"):
        reader.rows(torch.tensor([[1]]))


def test_many_steps_leave_nothing_behind(wide):
    from reading import open_files, resident_bytes

    table, _ = wide
    random = np.random.default_rng(0)
    with open_on(HostLane(), table, cache_bytes=100 * 4096) as reader, torch.inference_mode():

        def steps(count: int) -> tuple[int, int, int]:
            for _ in range(count):
                ids = torch.from_numpy(random.zipf(1.3, (2, 1)) % 300)
                reader.rows(ids).mix(1, torch.rand(2, 2))
            gc.collect()
            return open_files(), threading.active_count(), resident_bytes()

        before, after = steps(100), steps(700)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 2_000_000


# -------------------------------------------------------------------------------- whole models


@pytest.fixture
def on_device(table_folder, monkeypatch):
    """The model of `table_folder`, its table read by way of a lane."""
    lane = LateLane(1e-4)
    monkeypatch.setattr(reader_module, "open_lane", lambda device: lane)
    return le.load(table_folder, store="direct", cache="64kB")


def test_a_model_generates_the_same(on_device, training_folder):
    plain = le.load(training_folder)
    for prompt in (token_ids(1, 12, seed=3), token_ids(2, 70)):
        torch.testing.assert_close(
            logits_of(on_device, prompt), logits_of(plain, prompt), rtol=1e-4, atol=1e-4
        )
    prompt = token_ids(1, 12, seed=3)
    assert torch.equal(greedy(on_device, prompt, 10), greedy(plain, prompt, 10))
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(on_device, prompt, 10, **static), greedy(plain, prompt, 10))


def test_compiled_decoding_breaks_its_graph_at_the_entrance_alone(on_device, training_folder):
    from transformers import CompileConfig

    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    plain, prompt = le.load(training_folder), token_ids(1, 12, seed=3)
    settings_ = CompileConfig(backend=count, mode=None, options=None)
    settings_._compile_all_devices = True
    torch._dynamo.reset()
    found = greedy(on_device, prompt, 10, cache_implementation="static", compile_config=settings_)
    assert torch.equal(found, greedy(plain, prompt, 10))
    assert len(graphs) <= 3
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("route_mix_add" in name for name in called) == 3  # one in each layer
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_the_operation_in_a_graph_is_the_same(name):
    encoding = get_encoding(name)
    records = encoding.encode(torch.randn(5, 3, 40))
    padded = torch.zeros(5, 512 if records.shape[1] <= 512 else 1024, dtype=torch.uint8)
    padded[:, : records.shape[1]] = records
    places, weights = torch.tensor([4, 0, 4]), torch.rand(3, 3)
    arguments = (encoding, 40, 0, torch.bfloat16)
    expected = decode_and_mix_reference(padded, places, weights, *arguments)
    rows = encoding.decode(records, 3, 40, torch.float32)
    torch.testing.assert_close(
        expected, mix_reference(rows, places, weights).bfloat16(), rtol=2e-2, atol=1e-2
    )
    assert torch.equal(decode_and_mix(padded, places, weights, *arguments), expected)
    torch._dynamo.reset()
    compiled = torch.compile(decode_and_mix, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(padded, places, weights, *arguments), expected)
    torch._dynamo.reset()


def route_mix_add_arguments(encoding, dtype, shape=(3, 1), experts=3, hidden=40):
    """Random ones, the record of each id in the second of two layers."""
    layer_bytes = encoding.layer_bytes(experts, hidden)
    records = torch.zeros(5, -(-2 * layer_bytes // 512) * 512, dtype=torch.uint8)
    encoded = encoding.encode(torch.randn(5, experts, hidden))
    records[:, layer_bytes : 2 * layer_bytes] = encoded
    places = torch.randint(0, 5, shape).view(-1)
    hidden_states, output = torch.randn(2, *shape, hidden).to(dtype).unbind()
    router = torch.randn(experts, hidden).to(dtype)
    return records, places, hidden_states, router, output, encoding, layer_bytes


@pytest.mark.parametrize("name", sorted(ENCODINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_in_one_is_the_router_the_sum_and_the_addition(name, dtype):
    encoding = get_encoding(name)
    arguments = route_mix_add_arguments(encoding, dtype)
    records, places, hidden_states, router, output, _, offset = arguments
    found = route_mix_add(*arguments)
    weights = (hidden_states @ router.T).softmax(dim=-1).view(3, 3)
    rows = encoding.decode(records[:, offset : 2 * offset].contiguous(), 3, 40, torch.float32)
    mixed = mix_reference(rows, places, weights.float()).view(output.shape)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), output.float() + mixed, rtol=tolerance, atol=tolerance
    )
    torch._dynamo.reset()
    compiled = torch.compile(route_mix_add, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), found)
    torch._dynamo.reset()
    scattered = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in arguments[2:5:2]]
    for states, out in (scattered, arguments[2:5:2]):
        called = (records, places, states, router, out, name, encoding.block_size or 0, offset)
        torch.library.opcheck(torch.ops.lookup_experts.route_mix_add.default, called)


@pytest.mark.parametrize("limits", [(32, 0), (0, 2**14), (32, 2**14)])
def test_a_block_takes_one_operation_if_nobody_looks(
    limits, on_device, training_folder, monkeypatch
):
    plain, calls, seen = le.load(training_folder), [], []
    fuses = all(limits)
    monkeypatch.setattr(additions, "MOST_EXPERTS", limits[0])
    monkeypatch.setattr(additions, "MOST_ROUTER_WEIGHTS", limits[1])
    monkeypatch.setattr(
        additions,
        "route_mix_add",
        lambda *arguments: calls.append(arguments) or route_mix_add(*arguments),
    )
    ids = token_ids(2, 3)
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        found = on_device(input_ids=ids).logits
        assert len(calls) == (3 if fuses else 0)  # one in each layer
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        context = on_device.lookup_entrance
        context.observe = lambda layer, weights: seen.append(weights)
        torch.testing.assert_close(on_device(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3 and len(calls) == (3 if fuses else 0)


class Wrapped(torch.Tensor):
    """A weight of a kind of its own, as quantised ones are: doubled in products."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return 2 * function(args[0], args[1].as_subclass(torch.Tensor))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("kind", ["hook", "module", "weight"])
@pytest.mark.parametrize("where", ["device", "ram"])
def test_a_router_of_another_kind_is_asked_as_it_is(where, kind, request, table_folder):
    """An adapter, a quantised weight or a hook on the router of a table's model."""
    if where == "device":
        model = request.getfixturevalue("on_device")
    else:
        model = le.load(table_folder, store="memory", dtype="bfloat16")
    ids, seen = token_ids(1, 1), []
    router = model.lookup_blocks[1].router
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        weight = router.weight
        if kind == "hook":
            handle = router.register_forward_hook(lambda *call: seen.append(1) or 2 * call[-1])
        elif kind == "module":
            router.__class__ = type("Doubled", (torch.nn.Linear,), {
                "forward": lambda self, inputs: 2 * torch.nn.Linear.forward(self, inputs)
            })  # fmt: skip
        else:
            router.weight = torch.nn.Parameter(weight.as_subclass(Wrapped), requires_grad=False)
            assert type(router.weight) is not torch.nn.Parameter
        changed = model(input_ids=ids).logits
        router.__class__ = torch.nn.Linear
        if kind == "hook":
            handle.remove()
            assert seen == [1]
        router.weight = torch.nn.Parameter(2 * weight)
        tolerance = 1e-4 if where == "device" else 2e-2
        assert not torch.equal(changed, plain)
        torch.testing.assert_close(
            changed, model(input_ids=ids).logits, rtol=tolerance, atol=tolerance
        )


def test_one_position_in_ram_takes_one_operation_too(table_folder, monkeypatch):
    model, taken = le.load(table_folder, store="memory", dtype="bfloat16"), []
    fused = MemoryRows.route_mix_add

    def noted(rows, *arguments):
        found = fused(rows, *arguments)
        taken.append(found is not None)
        return found

    with torch.no_grad():
        apart = [model(input_ids=token_ids(1, length)).logits for length in (1, 2)]
        monkeypatch.setattr(MemoryRows, "route_mix_add", lambda *_: None)
        expected = [model(input_ids=token_ids(1, length)).logits for length in (1, 2)]
        monkeypatch.setattr(MemoryRows, "route_mix_add", noted)
        for length in (1, 2):
            model(input_ids=token_ids(1, length))
    assert taken == [True] * 3 + [False] * 3
    torch.testing.assert_close(apart, expected, rtol=5e-2, atol=5e-2)


def test_what_does_not_fit_together_takes_the_ways_that_say_so(on_device):
    """Of another length or dtype: not in one operation, which would read beyond the ends."""
    seen = []

    def try_them(ffn, args, output):
        rows, module = forward_pass().rows, ffn.lookup_experts
        router = module.router.weight
        states = torch.randn(1, 3, router.shape[1])
        assert rows.route_mix_add(0, states, router, states).shape == states.shape
        assert rows.route_mix_add(0, states[:, :2], router, states[:, :2]) is None
        assert rows.route_mix_add(0, states, router, states[:, :2]) is None
        assert rows.route_mix_add(0, states, router.bfloat16(), states) is None
        assert rows.route_mix_add(0, states, router[:1], states) is None
        assert rows.route_mix_add(0, states, router, states.to("meta")) is None
        seen.append(rows)

    handle = on_device.model.layers[0].mlp.register_forward_hook(try_them)
    with torch.no_grad():
        on_device(input_ids=token_ids(1, 3))
    handle.remove()
    assert len(seen) == 1


def test_without_triton_cuda_says_what_to_do(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lookup_experts.table.kernels", raising=False)
    with pytest.raises(UserError, match="pip install triton"):
        prepare(get_encoding("nf4"), 4, 768, torch.device("cuda"))
    prepare(get_encoding("nf4"), 4, 768, torch.device("cpu"))


def test_only_cuda_has_a_lane():
    assert open_lane(torch.device("cpu")) is open_lane(torch.device("meta")) is None
