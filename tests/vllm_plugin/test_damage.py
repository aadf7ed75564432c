"""A damaged record ends what needs it with a sentence: nothing is told without it."""

import numpy as np
import pytest
from random_tables import flip_bit

import lookup_experts as le
from lookup_experts.errors import TableError
from lookup_experts.table.format import BLOCK
from lookup_experts.table.opening import open_table

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from vllm_here import engine, model_with_experts, vllm_greedy

DAMAGED = 70
CHECKED = {"store": "direct", "verify_checksums": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "folded"
    counts = np.where(np.arange(97) == DAMAGED, 5, 1)
    le.reparameterize(model_with_experts(), folder, encoding="float32", token_counts=counts)
    table = open_table(folder / "table")
    flip_bit(table.path(table.shards[0]), BLOCK + DAMAGED * table.layout.stride + 100)
    return folder


def test_a_row_cache_that_would_begin_with_it(folder):
    options = {"lookup_experts": CHECKED | {"cache": "20KB"}}
    with (
        pytest.raises(TableError, match=f"record of id {DAMAGED} is damaged"),
        engine(folder, additional_config=options),
    ):
        pass


def test_a_prompt_that_needs_it(folder):
    with engine(folder, additional_config={"lookup_experts": CHECKED}) as llm:
        assert len(vllm_greedy(llm, [[1, 2, 3]], new_tokens=1)[0][0]) == 1
        with pytest.raises(TableError, match=f"record of id {DAMAGED} is damaged"):
            vllm_greedy(llm, [[1, DAMAGED, 3]], new_tokens=1)
