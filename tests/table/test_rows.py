"""Rows are those of the bytes: any table, any batch, any way to read, in any order, and later."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_tables import make_table
from reading import Expected, open_reader_by, ways_here

from lookup_experts.table import reader as reader_module
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.format import BLOCK
from lookup_experts.table.layout import RecordLayout, TableShape
from lookup_experts.table.reader import SLOT_BATCH
from lookup_experts.table.rows import plan_groups

pytestmark = pytest.mark.timeout(100)

LENGTHS = (0, 1, 2, 63, 64, 65, 255, 256, 257, 300)
"""Around the most unique ids and the most positions that go through slots."""
LAYERS = 6
"""More groups of layers than buffers."""
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}
ONE_BLOCK = {"num_layers": 2, "num_experts": 2, "row_size": 512, "encoding": "float16"}
"""A record of 4096 bytes."""


@st.composite
def table_settings(draw):
    """Keywords of `make_table`; records smaller than a block, of one block, and larger."""
    vocab_size = draw(st.sampled_from([1, 2, 64, 65, 130]))
    if draw(st.booleans()):
        return {"vocab_size": vocab_size, **ONE_BLOCK}
    return {
        "vocab_size": vocab_size,
        "num_layers": draw(st.integers(1, 5)),
        "num_experts": draw(st.integers(1, 4)),
        "row_size": draw(st.integers(1, 40) | st.sampled_from([96, 256, 520])),
        "encoding": draw(st.sampled_from(sorted(ENCODINGS))),
        "ids_per_shard": draw(st.sampled_from([None, 50])),
        "version": draw(st.sampled_from([2, 2, 1])),
    }


@st.composite
def batches(draw, vocab_size: int):
    """Token ids [B, T]."""
    length = draw(st.sampled_from(LENGTHS))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["drawn", "one id", "whole vocabulary", "few ids"]))
    if kind == "whole vocabulary":
        return torch.from_numpy(random.permutation(vocab_size)).view(1, -1)
    most = {"drawn": vocab_size, "one id": 1, "few ids": min(vocab_size, 5)}[kind]
    ids = torch.from_numpy(random.integers(0, most, length))
    return ids.view(-1, 3) if length % 3 == 0 else ids.view(1, -1)


ORDERS = {
    "in order": lambda layers: layers,
    "twice": lambda layers: layers + layers,
    "backwards": lambda layers: layers[::-1],
    "last alone, then all": lambda layers: layers[-1:] + layers,
}


@pytest.fixture(scope="module")
def wide_vocabulary(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("wide"), vocab_size=300, **ONE_BLOCK)


@pytest.mark.parametrize(
    "shape",
    [
        # One layer in records with padding, whose stride is no whole number of rows.
        {"num_layers": 1, "num_experts": 4, "row_size": 96, "encoding": "float32"},
        {"num_layers": 1, "num_experts": 4, "row_size": 768, "encoding": "bfloat16"},
        # More codes in the last byte than numbers.
        {"num_layers": 2, "num_experts": 3, "row_size": 5, "encoding": "nf3"},
        {"num_layers": 2, "num_experts": 3, "row_size": 5, "encoding": "nf4"},
    ],
    ids=lambda shape: f"{shape['encoding']}-{shape['row_size']}",
)
def test_rows_of_awkward_shapes(shape, tmp_path):
    table, records = make_table(tmp_path, **shape)
    ids = torch.tensor([[1, 7, 1], [3, 39, 0]])
    with open_reader_by("mmap", table) as reader, torch.inference_mode():
        Expected(table, records).assert_right(reader.rows(ids), ids)


@pytest.mark.parametrize("encoding", ["float32", "nf4"])
@pytest.mark.parametrize("way", ways_here())
def test_a_batch_without_ids(way, encoding, tmp_path):
    table, records = make_table(tmp_path, encoding=encoding)
    ids = torch.zeros((2, 0), dtype=torch.int64)
    with open_reader_by(way, table) as reader:
        for mode in MODES.values():
            with mode():
                Expected(table, records).assert_right(reader.rows(ids), ids)


@settings(max_examples=20, deadline=None)
@given(st.data(), table_settings(), st.sampled_from(sorted(MODES)), st.sampled_from(sorted(ORDERS)))
def test_rows_of_any_table_and_batch(tmp_path_factory, data, shape, mode, order):
    table, records = make_table(tmp_path_factory.mktemp("table"), **shape)
    dtypes = {torch.float32, table.layout.encoding.torch_dtype or torch.bfloat16}
    dtype = data.draw(st.sampled_from(sorted(dtypes, key=str)), "dtype")
    stride = table.layout.stride
    cache_bytes = data.draw(st.sampled_from([0, 3 * stride, 10 * stride * shape["vocab_size"]]))
    group_bytes = data.draw(st.sampled_from([1, 100_000, 2**24]), "group_bytes")
    expected = Expected(table, records, dtype)
    layers = ORDERS[order](list(range(expected.num_layers)))
    several = [data.draw(batches(shape["vocab_size"]), "ids") for _ in range(3)]
    for way in ways_here():
        with (
            pytest.MonkeyPatch.context() as patch,
            open_reader_by(way, table, dtype, cache_bytes) as reader,
            MODES[mode](),
        ):
            patch.setattr(reader_module, "GROUP_BYTES", group_bytes)
            for ids in several:
                expected.assert_right(reader.rows(ids), ids, layers)


@pytest.mark.parametrize("way", ways_here())
@pytest.mark.parametrize("encoding", ["bfloat16", "float32", "nf4"])
def test_one_position_in_bfloat16(tmp_path, way, encoding):
    """By a product of its own, with and without gradients."""
    size = {"num_layers": 3, "num_experts": 4, "row_size": 512}
    table, records = make_table(tmp_path, encoding=encoding, **size)
    expected = Expected(table, records, torch.bfloat16)
    with open_reader_by(way, table, torch.bfloat16, cache_bytes=2**20) as reader:
        for id_ in (0, 7, 39):
            ids = torch.tensor([[id_]])
            with torch.no_grad():
                expected.assert_right(reader.rows(ids), ids)
            weights = torch.rand(1, 4).bfloat16().requires_grad_()
            reader.rows(ids).mix(1, weights).sum().backward()
            sums = expected.layer(1, ids).sum(dim=-1).flatten()
            torch.testing.assert_close(weights.grad.flatten(), sums, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("encoding", ["bfloat16", "nf4"])
def test_all_of_a_block_in_one_for_one_position_in_bfloat16(tmp_path, encoding):
    """Router, softmax, sum and addition; whatever else there is takes the operations apart."""
    shape = {"num_layers": 3, "num_experts": 4, "row_size": 768, "encoding": encoding}
    table, records = make_table(tmp_path, vocab_size=9, **shape)
    expected = Expected(table, records, torch.bfloat16)
    states, output = torch.randn(2, 1, 1, 768).bfloat16().unbind()
    router = torch.randn(4, 768).bfloat16() / 20
    ids = torch.tensor([[5]])
    with open_reader_by("threads", table, torch.bfloat16) as reader, torch.no_grad():
        rows = reader.rows(ids)
        for layer in range(3):
            weights = (states.float() @ router.float().T).softmax(dim=-1)
            mixed = expected.layer(layer, ids).float().view(4, 768).T @ weights.view(4)
            found = rows.route_mix_add(layer, states, router, output)
            assert found.shape == output.shape and found.dtype == torch.bfloat16
            by_the_book = (output.float().view(-1) + mixed).view(output.shape)
            torch.testing.assert_close(found.float(), by_the_book, rtol=2e-2, atol=2e-2)
        assert rows.route_mix_add(0, states.float(), router, output) is None
        assert rows.route_mix_add(0, states, router, output[..., :700]) is None
        two = reader.rows(torch.tensor([[5, 6]]))
        pair = states.expand(1, 2, 768)
        assert two.route_mix_add(0, pair, router, pair) is None
    with open_reader_by("threads", table, torch.float32) as reader, torch.no_grad():
        rows = reader.rows(ids)
        assert rows.route_mix_add(0, states.float(), router.float(), output.float()) is None


@pytest.mark.parametrize("way", ways_here())
@pytest.mark.parametrize("length", LENGTHS)
def test_a_batch_of_so_many_unique_ids(wide_vocabulary, way, length):
    table, records = wide_vocabulary
    expected = Expected(table, records)
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:length].view(1, -1)
    for cache_bytes in (0, 100 * 4096):
        with open_reader_by(way, table, cache_bytes=cache_bytes) as reader, torch.no_grad():
            for _ in range(2):
                expected.assert_right(reader.rows(ids), ids)


@pytest.mark.parametrize("way", ["memory", "mmap", "threads"])
@pytest.mark.parametrize("encoding", ["float16", "nf4"])
@pytest.mark.parametrize("taken_under", ["grad", "no_grad"])
@pytest.mark.parametrize("length", [5, 300])
def test_gradients_survive_the_batches_that_follow(
    tmp_path, monkeypatch, way, encoding, taken_under, length
):
    """Rows may be taken before gradients are switched on (a frozen embedding, a wrapper)."""
    monkeypatch.setattr(reader_module, "GROUP_BYTES", 1)
    shape = {**ONE_BLOCK, "encoding": encoding, "num_layers": LAYERS, "vocab_size": 130}
    table, records = make_table(tmp_path, **shape)
    expected = Expected(table, records)
    generator = torch.Generator().manual_seed(1)
    with open_reader_by(way, table) as reader:
        outputs = []
        for _ in range(3):
            ids = torch.randint(0, 130, (1, length), generator=generator)
            with MODES[taken_under]():
                rows = reader.rows(ids)
            weights = [expected.weights(ids, layer).requires_grad_() for layer in range(LAYERS)]
            mixed = [rows.mix(layer, weights[layer]) for layer in range(LAYERS)]
            outputs.append((ids, weights, mixed))
            del rows
            with torch.no_grad():
                for seed in range(3):  # uses all slots and buffers again
                    others = torch.randint(0, 130, (1, length), generator=generator)
                    expected.assert_right(reader.rows(others), others, [seed % 2])
        for ids, weights, mixed in outputs:
            sum(one.float().square().sum() for one in mixed).backward()
            for layer in range(LAYERS):
                again = weights[layer].detach().clone().requires_grad_()
                by_the_book = expected.mixed(layer, ids, again)
                by_the_book.float().square().sum().backward()
                expected.assert_close(weights[layer].grad, again.grad)


@pytest.mark.parametrize("way", ways_here())
def test_a_layer_stays_right_while_the_next_are_read(tmp_path, way, monkeypatch):
    monkeypatch.setattr(reader_module, "GROUP_BYTES", 1)
    shape = {**ONE_BLOCK, "num_layers": 8}
    table, records = make_table(tmp_path, **shape, vocab_size=100)
    expected = Expected(table, records)
    ids = torch.randperm(100).view(1, -1)
    with open_reader_by(way, table) as reader, torch.no_grad():
        rows = reader.rows(ids)
        layers = [rows.layer(layer) for layer in range(8)]
        for layer, found in enumerate(layers):
            assert torch.equal(found[rows.index], expected.layer(layer, ids))


@pytest.mark.parametrize("way", ways_here())
def test_a_reader_opened_in_inference_mode_serves_training(tmp_path, way):
    table, records = make_table(tmp_path, vocab_size=50, **ONE_BLOCK)
    expected = Expected(table, records)
    ids = torch.arange(50).view(1, -1)
    with torch.inference_mode():
        context = open_reader_by(way, table)
        reader = context.__enter__()
        expected.assert_right(reader.rows(ids), ids)
    weights = expected.weights(ids, 0).requires_grad_()
    reader.rows(ids).mix(0, weights).sum().backward()
    assert weights.grad is not None
    context.__exit__(None, None, None)


@pytest.mark.parametrize("kept", [True, False])
def test_buffers_of_a_prompt_are_given_back(tmp_path, monkeypatch, kept):
    """One pair is kept for the next prompt, unless it is larger than what may be kept."""
    monkeypatch.setattr(reader_module, "KEPT_BYTES", 2**20 if kept else 2**16)
    table, _ = make_table(tmp_path, vocab_size=100, **ONE_BLOCK)
    ids = torch.arange(100).view(1, -1)
    with open_reader_by("mmap", table) as reader, torch.no_grad():
        both = [reader.rows(ids), reader.rows(ids)]
        for rows in both:
            rows.mix(1, torch.rand(100, 2).half())
        buffers = [weakref.ref(buffer.base) for rows in both for buffer in rows._buffers]
        assert len({buffer().ctypes.data for buffer in buffers}) == 4
        del rows
        both.clear()
        reader._thread.submit(int).result()  # what was read ahead is over
        gc.collect()
        assert [buffer() is not None for buffer in buffers].count(True) == (2 if kept else 0)
        left = {id(buffer()) for buffer in buffers if buffer() is not None}
        again = reader.rows(ids)
        assert left == ({id(buffer.base) for buffer in again._buffers} if kept else set())


def test_prompts_one_after_the_other_and_at_once_share_no_rows(tmp_path):
    """Kept buffers hold what an earlier prompt read."""
    table, records = make_table(tmp_path, vocab_size=400, **ONE_BLOCK)
    expected = Expected(table, records)
    generator = torch.Generator().manual_seed(0)
    with open_reader_by("mmap", table) as reader, torch.no_grad():
        for _ in range(4):
            several = [torch.randperm(400, generator=generator)[:200].view(1, -1) for _ in range(2)]
            both = [reader.rows(ids) for ids in several]
            for rows, ids in zip(both, several, strict=True):
                expected.assert_right(rows, ids)


# ------------------------------------------------------------------------- groups of layers


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 900) | st.sampled_from([512, 1024]),
    st.integers(0, 5000),
    st.sampled_from([1, 50_000, 2**24]),
    st.sampled_from([1, 2]),
)
@example(24, 4, 1024, 2000, 2**24, 2)
@example(12, 4, 768, 2000, 2**24, 2)
def test_groups_cover_every_layer_once(layers, experts, row_size, num_ids, group_bytes, version):
    shape = TableShape(10, layers, experts, row_size)
    layout = RecordLayout(shape, get_encoding("float16"), version)
    groups = plan_groups(layout, num_ids, group_bytes)
    assert [layer for group in groups for layer in group.layers] == list(range(layers))
    for group in groups:
        first, last = (layout.layer_slice(layer) for layer in (group.layers[0], group.layers[-1]))
        assert 0 <= group.start <= first.start and last.stop <= group.stop <= layout.stride
        if layout.is_whole_blocks:
            assert group.start % BLOCK == group.stop % BLOCK == 0
        # No more than asked, or one layer, and the blocks at both ends.
        most = max(group_bytes, num_ids * layout.layer_bytes)
        assert num_ids * (group.stop - group.start - 2 * BLOCK) <= most


def test_the_first_group_is_one_layer():
    layout = RecordLayout(TableShape(10, 24, 4, 1024), get_encoding("float16"))
    assert len(plan_groups(layout, 100, 2**24)[0].layers) == 1
    assert SLOT_BATCH < 100


def test_small_records_come_whole_as_long_as_they_fit():
    layout = RecordLayout(TableShape(10, 12, 1, 96), get_encoding("nf4"))
    assert len(plan_groups(layout, 20_000, 2**24)) == 1
    assert len(plan_groups(layout, 100_000, 2**24)) > 2


# --------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("name", ["int8", "nf4", "nf3"])
def test_encoding_and_compiled_decoding_give_no_warning(name):
    encoding = get_encoding(name)
    rows = torch.randn(3, 4, 64).transpose(0, 1)  # as `LayerExperts` gives them
    torch._dynamo.reset()
    decode = torch.compile(
        lambda codes: encoding.decode(codes, 3, 64, torch.float32), backend="eager", fullgraph=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = encoding.encode(rows)
        with torch.inference_mode():
            compiled = decode(codes)
        assert torch.equal(compiled, encoding.decode(codes, 3, 64, torch.float32))
    torch._dynamo.reset()
