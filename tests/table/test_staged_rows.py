"""Rows whose records the device finds itself, on the CPU: over lanes that are late, or take notes.

What needs a GPU is in `test_cuda.py`.
"""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import LateLane, NotingLane
from random_tables import make_table
from reading import ONE_BLOCK, Expected, open_on

from lookup_experts.errors import TableError, UserError
from lookup_experts.model.rows import mix_reference
from lookup_experts.table import device_rows, page_locked
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape
from lookup_experts.table.page_locked import lock_pages

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(table, its records) of 300 ids."""
    return make_table(tmp_path_factory.mktemp("wide"), vocab_size=300, **ONE_BLOCK)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 900), st.integers(1, 3000), st.booleans()
)
def test_groups_cover_every_layer_once(num_layers, experts, row_size, num_rows, is_odd):
    layout = RecordLayout(
        TableShape(10, num_layers, experts, row_size), get_encoding("nf3" if is_odd else "int8")
    )
    groups = device_rows.stage_groups(layout, num_rows, 2**24)
    assert [layer for group in groups for layer in group.layers] == list(range(num_layers))
    for group in groups:
        first, last = layout.layer_slice(group.layers[0]), layout.layer_slice(group.layers[-1])
        assert group.start % 16 == group.stop % 16 == 0
        assert group.start <= first.start and last.stop <= group.stop <= layout.stride
        one_layer = num_rows * (layout.layer_bytes + 32)
        assert num_rows * (group.stop - group.start) <= max(2**24 + 32 * num_rows, one_layer)


def test_no_id_comes_to_the_host(wide):
    lane = NotingLane()
    with open_on(lane, wide[0], "memory") as reader, torch.no_grad():
        for length in (1, 64, 200):
            reader.rows(torch.arange(length).view(1, -1)).mix(0, torch.rand(length, 2))
    assert lane.ids_fetched == 0


def test_a_step_is_brought_before_its_first_block(wide, monkeypatch):
    lane = NotingLane()
    weights = torch.rand(3, 2)
    with open_on(lane, wide[0], "memory") as reader, torch.no_grad():
        rows = reader.rows(torch.arange(3).view(1, -1))
        assert lane.notes == ["beside"]
        for layer in (0, 1, 0):
            rows.mix(layer, weights)
        assert lane.notes == ["beside", "lead"]
        monkeypatch.setattr(device_rows, "AT_ONCE_BYTES", 1)
        del lane.notes[:]
        rows = reader.rows(torch.arange(3).view(1, -1))
        assert lane.notes == ["beside"] * 2  # the first layer, and the other
        for layer in (0, 0, 1, 0):
            rows.mix(layer, weights)
        assert lane.notes == ["beside"] * 2 + ["lead"] * 2


def test_a_prompts_two_buffers_are_filled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(device_rows, "AT_ONCE_BYTES", 1)
    table, records = make_table(tmp_path, vocab_size=100, **{**ONE_BLOCK, "num_layers": 6})
    lane, ids = NotingLane(), torch.arange(100).repeat(2).view(1, -1)
    weights = torch.rand(200, 2)
    with open_on(lane, table, "memory", group_bytes=1) as reader, torch.no_grad():
        rows = reader.rows(ids)
        for layer in range(6):
            rows.mix(layer, weights)
        assert lane.notes == [
            "beside", "beside", "lead",
            *["beside", "lead"] * 4,
            "lead",
        ]  # fmt: skip
        assert sum(stage.numel() for stage in rows._stages) == 2 * 200 * 2048
        Expected(table, records).assert_right(rows, ids)


@pytest.mark.parametrize("length", [2, 300])
@pytest.mark.parametrize("wrong", [-1, 300, 1 << 40])
def test_an_id_outside_of_the_table(wide, wrong, length):
    """The device can't raise: what it gives is no number, and the next call tells why."""
    table, records = wide
    ids = torch.full((1, length), wrong)
    ids[0, 0] = 7
    with open_on(LateLane(0.05), table, "memory") as reader, torch.no_grad():
        rows = reader.rows(ids)
        mixed = rows.mix(0, torch.rand(length, 2).half())
        assert mixed[0].isfinite().all() and mixed[1:].isnan().all()
        with pytest.raises(TableError, match=f"Token id {wrong} is not in the table"):
            reader.rows(ids)
        rows.leave()  # a prompt's last layers, which may come later than what was told
        right = torch.tensor([[299, 0]])
        Expected(table, records).assert_right(reader.rows(right), right)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_what_is_put_in_place_of_a_missing_record_is_no_number(encoding):
    found = get_encoding(encoding)
    codes = torch.full((1, found.layer_bytes(2, 96)), 0xFF, dtype=torch.uint8)
    assert found.decode(codes, 2, 96, torch.float32).isnan().all()


def test_threads_share_a_table(wide):
    table, records = wide
    expected = Expected(table, records)
    problems: list[BaseException] = []

    def read(seed: int, reader) -> None:
        random = np.random.default_rng(seed)
        try:
            with torch.no_grad():
                for _ in range(25):
                    length = int(random.choice([1, 40, 90]))
                    ids = torch.from_numpy(random.integers(0, 90, (1, length)))
                    rows = reader.rows(ids)
                    if random.random() < 0.8:
                        expected.assert_right(rows, ids)
        except BaseException as error:
            problems.append(error)

    with open_on(LateLane(5e-4), table, "memory") as reader:
        threads = [threading.Thread(target=read, args=(seed, reader)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in threads)
    assert problems == []


def test_gradients_reach_the_weights(wide):
    table, records = wide
    expected = Expected(table, records)
    with open_on(LateLane(), table, "memory") as reader:
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


# ------------------------------------------------------------------------------- page-locking


class Runtime:
    """What torch gives of CUDA's runtime."""

    def __init__(self, refuse_after: int) -> None:
        self.refuse_after = refuse_after
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if len(self.registered) >= self.refuse_after:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {2: "out of memory"}[code]


def test_memory_is_registered_once_and_in_chunks(monkeypatch):
    runtime = Runtime(refuse_after=10)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(page_locked, "CHUNK_BYTES", 4096)
    array = np.zeros(10_000, np.uint8)
    first, second = lock_pages(array), lock_pages(array)
    assert first is second
    assert sorted(runtime.registered.values()) == [1808, 4096, 4096]
    del first
    assert len(runtime.registered) == 3
    del second
    assert not runtime.registered
    assert lock_pages(array) is not None


def test_a_refusal_is_told_and_leaves_nothing_locked(monkeypatch):
    runtime = Runtime(refuse_after=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(page_locked, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(page_locked, "_forget_error", lambda: None)
    with pytest.raises(UserError, match=r"refuses to lock .* out of memory.*store 'direct'"):
        lock_pages(np.zeros(10_000, np.uint8))
    assert not runtime.registered
