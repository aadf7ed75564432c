"""`mole bench decode` for real, on a shape small enough for a test."""

import time

import pytest
import torch
from benches import bench
from result_rows import result_rows
from tiny_models import attached_model, gateless_model, token_ids
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import decode
from lookup_experts.benchmarks.beside_dense import Comparison, weight_bytes
from lookup_experts.benchmarks.decode import added_time, measure_decode, medians_ms
from lookup_experts.benchmarks.models import Case, dense_model
from lookup_experts.errors import UserError
from lookup_experts.generation.captured import Decoding
from lookup_experts.model import fast_linears


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


def test_captured_steps_are_measured_alike(tmp_path, ids, monkeypatch):
    """Here without capturing: the same steps run one operation after the other."""
    monkeypatch.setattr(decode, "CONTEXT", 5)
    comparison = Comparison(Case("tiny"), "memory", 0, ids, tmp_path)
    models, windows = comparison.prepare()
    decodings = {name: Decoding(model, 17) for name, model in models.items()}
    told = []
    results = measure_decode(models, windows, 3, 10, lambda *now: told.append(now), decodings)
    dense, mole = results
    assert (dense["system"], mole["system"]) == ("dense", "mole")
    assert dense["pairs"] == mole["pairs"] == 12 and told[-1] == (10, 10)
    assert dense["ms_per_step"] > 0 and mole["ratio_to_dense"] > 0
    assert mole["share_of_memory_bandwidth"] > 0


def test_captured_steps_take_the_text(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(decode, "CONTEXT", 5)
    model = gateless_model()
    tokens = token_ids(2, 17)
    decodings = {("auto", "dense"): Decoding(model, 17)}
    with torch.inference_mode():
        seconds, _, _ = decode._replay_sequences(decodings, {"auto": Unread()}, tokens)
    assert len(seconds["auto", "dense"]) == 12 - decode.WARM_UP_STEPS
    (last,) = decodings["auto", "dense"].tokens(1)
    assert torch.equal(last, model(tokens).logits[:, -1].argmax(-1))


class Unread:
    """A reader that nothing was asked of."""

    def reset_stats(self):
        pass

    def stats(self):
        return None


def test_graphs_need_a_gpu(tmp_path, ids):
    arguments = ["bench", "decode", "--shape", "tiny", "--ids", ids, "--graphs"]
    with pytest.raises(UserError, match="CUDA graphs need a GPU; give --device cuda"):
        CliRunner().invoke(
            cli.app, [*map(str, arguments), "--work", str(tmp_path)], catch_exceptions=False
        )
