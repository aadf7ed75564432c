"""A step's rows: there from its beginning to its end, for its tokens alone. Needs no vLLM."""

import contextlib

import pytest
import torch
from random_tables import flip_bit, make_table

from lookup_experts.errors import TableError, UserError
from lookup_experts.table.format import DATA_START
from lookup_experts.table.opening import open_table
from lookup_experts.table.reader import SLOT_BATCH, TableReader
from lookup_experts.table.rows import MemoryRows
from lookup_experts.table.store_choice import open_store
from lookup_experts.vllm_plugin.step import Step

VOCAB, SIZE = 200, 16


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "table"


@pytest.fixture
def step(folder):
    table, _ = make_table(
        folder, vocab_size=VOCAB, num_experts=3, row_size=SIZE, encoding="float32"
    )
    store = open_store(table, "direct", verify_checksums=True, notify=lambda message: None)
    step = Step()
    step.num_blocks = 1
    step.source = TableReader(table, store, torch.float32, cache="10KB")
    with torch.no_grad():
        yield step
    step.source.close()


def ids_of(count):
    """As vLLM has them: of all requests in a row, and of 32 bits."""
    return torch.arange(count, dtype=torch.int32) % VOCAB


@pytest.mark.parametrize("count", [1, 3, SLOT_BATCH, 3 * SLOT_BATCH])
def test_rows_of_a_step_are_its_tokens(step, folder, count):
    ids, weights = ids_of(count), torch.full((count, 3), 0.5)
    with step.of(ids, None):
        found = step.rows_for(count).mix(1, weights)
    with open_store(open_table(folder), "memory", notify=print) as store:
        whole = TableReader(open_table(folder), store, torch.float32)
        expected = whole.rows(ids.long().unsqueeze(0)).mix(1, weights)
        whole.close()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_rows_are_given_back_at_the_end(step, fails):
    """Or the next step would find no slots in the row cache."""
    for _ in range(20):
        with contextlib.suppress(ZeroDivisionError), step.of(ids_of(SLOT_BATCH), None):
            assert isinstance(step.rows_for(SLOT_BATCH), MemoryRows)
            assert 1 / (not fails)


def test_hidden_states_of_another_step_are_refused(step):
    with step.of(ids_of(3), None), pytest.raises(RuntimeError, match="a step of 3 tokens"):
        step.rows_for(4)
    with pytest.raises(RuntimeError, match="no step"):
        step.rows_for(3)


def test_a_damaged_record_is_an_error_in_the_step_that_needs_it(step, folder):
    shard = next(folder.glob("*.safetensors"))
    flip_bit(shard, DATA_START + step.source.table.layout.stride * 7 + 5)
    with pytest.raises(TableError, match="record of id 7 is damaged"), step.of(ids_of(8), None):
        step.rows_for(8).layer(0)
    with step.of(ids_of(7), None):
        step.rows_for(7).layer(0)


def test_a_step_in_which_a_block_asks_for_nothing_is_an_error(step):
    with pytest.raises(RuntimeError, match=r"Of 1 blocks .* 0 asked"), step.of(ids_of(3), None):
        pass


def test_embeddings_alone_are_refused(step):
    with pytest.raises(UserError, match="needs token ids"), step.of(None, None):
        pass


def test_a_model_that_never_got_its_weights_says_so():
    with pytest.raises(UserError, match="never got their weights"), Step().of(ids_of(1), None):
        pass
