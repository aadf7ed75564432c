"""`mole bench memory` for real, on a shape small enough for a test."""

import numpy as np
from benches import bench
from fresh_processes import peak_of_prompt

from lookup_experts.benchmarks import memory
from lookup_experts.benchmarks.processes import in_own_process


def test_rows_of_a_prompt_take_less_than_all_layers_at_once(tmp_path):
    shape = {"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 2}
    prompt = np.arange(3000) % 1500
    peak, reader = in_own_process(peak_of_prompt, tmp_path, shape, 1500, prompt)
    assert reader.store == "direct" and reader.backend
    all_at_once = 1500 * 24 * 4 * 512 * 2
    assert 1500 * 4 * 512 * 2 < peak < all_at_once


def test_memory_tells_how_the_table_was_read(tmp_path, ids, monkeypatch):
    """What was really opened, not what was asked for; in this process, which knows
    the test's shape."""

    def in_this_process(what, measure, *arguments):
        return measure(*arguments)

    monkeypatch.setattr(memory, "in_fresh_process", in_this_process)
    for store, name, backend in (("auto:0", "direct", None), ("auto:8GB", "memory", "ram")):
        dense, mole = bench(tmp_path, "memory", "--ids", ids, "--store", store)["results"]
        assert "store" not in dense and "backend" not in dense
        assert mole["store"] == name and mole["backend"] == (backend or mole["backend"])
    arguments = ("--ids", ids, "--store", "auto:0", "--prompt", 300)
    (prompt,) = bench(tmp_path, "memory", *arguments)["results"]
    assert prompt["store"] == "direct" and prompt["backend"] in ("io_uring", "preadv x8 threads")
