"""`mole bench decode` for real, on a shape small enough for a test."""

import time

import pytest
import torch
from benches import bench
from result_rows import result_rows
from tiny_models import attached_model, gateless_model, token_ids

from lookup_experts.benchmarks import decode
from lookup_experts.benchmarks.beside_dense import weight_bytes
from lookup_experts.benchmarks.decode import DecodingByGraphs, added_time, medians_ms
from lookup_experts.benchmarks.models import Case, dense_model
from lookup_experts.model import fast_linears
from lookup_experts.model.cache_names import cache_argument, cache_of


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(decode, "SEQUENCE_STEPS", 12)
    monkeypatch.setattr(decode, "CACHE_WARM_UP_TOKENS", 640)


@pytest.mark.parametrize("encoding", ["bfloat16", "nf4"])
def test_decode(tmp_path, ids, encoding):
    plot = tmp_path / "plot.png"
    arguments = ("--ids", ids, "--batch", "1,3", "--pairs", 6, "--encoding", encoding)
    report = bench(tmp_path, "decode", *arguments, "--cache", "1MB", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    dense, mole, _, larger = report["results"]
    assert (dense["system"], mole["system"]) == ("dense", "mole")
    assert mole["encoding"] == encoding and mole["cache_bytes"] == 1_000_000
    assert mole["pairs"] >= 6 and larger["batch"] == 3
    assert mole["ratio_to_dense"] > 0 and mole["spread"][0] <= mole["spread"][1]
    assert 0 < mole["hit_rate"] <= 1
    assert dense["share_of_memory_bandwidth"] > 0 and mole["share_of_disk_bandwidth"] > 0
    assert "entrance_ms" not in dense
    assert 0 < mole["entrance_ms"] + mole["blocks_ms"] < mole["ms_per_step"]
    rows = result_rows("decode", report["results"])
    assert [row["batch"] for row in rows] == ["1", "3"]
    assert rows[0]["× dense"] == f"{mole['ratio_to_dense']:.3f}"


def test_kinds_of_linear_layers_are_measured_in_turn(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(fast_linears, "SMALLEST", 2**12)
    arguments = ("--ids", ids, "--batch", 2, "--pairs", 4, "--weights", "auto,plain,int8")
    results = bench(tmp_path, "decode", *arguments)["results"]
    kinds = [(result["weights"], result["system"]) for result in results]
    assert kinds == [(w, s) for w in ("auto", "plain", "int8") for s in ("dense", "mole")]
    for result in results:
        assert result["tokens_per_second"] == pytest.approx(2000 / result["ms_per_step"])
        assert result["speedup_over_plain"] > 0
    assert results[2]["speedup_over_plain"] == results[3]["speedup_over_plain"] == 1
    rows = result_rows("decode", results)
    assert [row["linear layers"] for row in rows] == ["auto", "plain", "int8"]
    dense = [result["share_of_memory_bandwidth"] * result["ms_per_step"] for result in results[::2]]
    assert dense[0] == pytest.approx(dense[1]) and dense[2] < 0.8 * dense[1]


def test_without_a_cache_nothing_is_hit(tmp_path, ids):
    arguments = ("--ids", ids, "--batch", "2", "--pairs", 4, "--cache", 0)
    mole = bench(tmp_path, "decode", *arguments)["results"][1]
    assert mole["hit_rate"] == 0
    assert mole["bytes_per_step"] > 0


def test_a_step_reads_every_weight_but_the_embedding_of_absent_tokens():
    model = dense_model(Case("tiny"))
    embedding = model.get_input_embeddings().weight
    whole = sum(weight.numel() for weight in model.parameters()) * 2
    assert weight_bytes(model, 3) == whole - embedding.numel() * 2 + 3 * 64 * 2
    model.lm_head.weight = embedding
    assert weight_bytes(model, 3) == whole - embedding.numel() * 2


class SlowSource:
    """An expert source that takes its time at the entrance and in each block."""

    def __init__(self, source, entrance, block):
        self._source, self._entrance, self._block = source, entrance, block

    def rows(self, token_ids, ready=False, base_model=None):
        time.sleep(self._entrance)
        rows, block = self._source.rows(token_ids, ready, base_model), self._block

        class SlowRows:
            num_positions = rows.num_positions

            def mix(self, layer, weights, experts=None):
                time.sleep(block)
                return rows.mix(layer, weights, experts)

        return SlowRows()


def test_the_entrance_and_the_blocks_are_told_apart():
    model = attached_model(layers=[1]).eval()
    model.set_expert_source(SlowSource(model.expert_source, 0.05, 0.02))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.inference_mode():
        with added_time(model) as added:
            for _ in range(3):
                model(token_ids(1, 4))
        model(token_ids(1, 4))  # not timed any more
    entrance_ms, blocks_ms = medians_ms(*added, skip=1)
    assert 50 <= entrance_ms < 70 and 20 <= blocks_ms < 40
    assert [len(seconds) for seconds in added] == [3, 3]
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_pass_is_the_sum_of_its_blocks():
    entrance = [9.0, 0.001, 0.003]
    blocks = [9.0, 9.0, 0.001, 0.002, 0.003, 0.004]
    assert medians_ms(entrance, blocks, skip=1) == pytest.approx((2.0, 5.0))


def test_sequences_one_after_the_other_by_one_graph():
    model, graphs = gateless_model(num_hidden_layers=1), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    by_graphs = DecodingByGraphs(model, 20, {"backend": count})
    assert by_graphs.config is model.config
    with torch.inference_mode():
        for seed in range(3):
            ids = token_ids(2, 20, seed=seed)
            prompt = by_graphs(ids[:, :10], use_cache=True, logits_to_keep=1)
            cache = {cache_argument(model): cache_of(prompt)}
            for step in range(10, 20):
                column = ids[:, step, None]
                found = by_graphs(column, use_cache=True, **cache).logits[:, -1]
            expected = model(ids, use_cache=False).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()
