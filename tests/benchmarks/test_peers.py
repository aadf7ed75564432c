"""`mole bench --peers`: programs on the path get our shape, and what they say is taken over."""

import json
import shutil
import sys

import pytest
import torch
from benches import bench
from gguf import GGUFReader
from result_rows import result_rows
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import decode, models, peers
from lookup_experts.benchmarks.models import SMOLLM2, Case, backbone_of
from lookup_experts.errors import UserError

LLAMA_BENCH = """
assert open(option("-m"), "rb").read(4) == b"GGUF"
prompt, steps = int(option("-p")), int(option("-n"))
assert (prompt == 0) != (steps == 0) and int(option("-t")) >= 1
print(json.dumps([{"avg_ts": 100.0 + prompt, "build_commit": "abc123"}]))
"""
VLLM = """
assert sys.argv[1] == "-c" and "vllm.benchmarks.latency" in sys.argv[2]
assert json.load(open(option("--model") + "/config.json"))["hidden_size"] == 64
batch, prompt, output = (int(option(f"--{n}")) for n in ("batch-size", "input-len", "output-len"))
seconds = 0.001 * batch * prompt + 0.01 * output
json.dump({"avg_latency": seconds}, open(option("--output-json"), "w"))
"""
BROKEN = "sys.exit('no such model')"


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Puts programs on the path, and no others of these names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, body: str) -> None:
        program = folder / name
        head = "import json, sys\noption = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        program.write_text(f"#!{sys.executable}\n{head}{body}")
        program.chmod(0o755)

    return put


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(decode, "SEQUENCE_STEPS", 12)
    monkeypatch.setattr(decode, "CACHE_WARM_UP_TOKENS", 640)


def test_peers_are_measured_at_each_size_that_they_have(tmp_path, ids, on_path):
    on_path("llama-bench", LLAMA_BENCH)
    on_path("vllm", BROKEN)
    on_path("python", VLLM)  # which lies beside it
    arguments = ("--ids", ids, "--batch", "1,2", "--pairs", 4, "--peers")
    results = bench(tmp_path, "decode", *arguments)["results"]
    systems = [(result["batch"], result["system"]) for result in results]
    assert systems == [
        (1, "dense"), (1, "mole"), (1, "llama.cpp"), (1, "vllm"),
        (2, "dense"), (2, "mole"), (2, "vllm"),
    ]  # fmt: skip
    assert results[2]["tokens_per_second"] == 100 and results[2]["version"] == "abc123"
    assert results[3]["tokens_per_second"] == pytest.approx(100)  # 0.01 s a step
    assert results[6]["tokens_per_second"] == pytest.approx(200)
    rows = result_rows("systems", results)
    assert [row["tokens/s"] for row in rows][2:4] == ["100.0", "100.0"]
    prompts = bench(tmp_path, "prefill", "--ids", ids, "--tokens", 300, "--pairs", 2, "--peers")
    found = {result["system"]: result["tokens_per_second"] for result in prompts["results"][2:]}
    assert found == {"llama.cpp": 400, "vllm": pytest.approx(300 / 0.31)}


def test_without_a_peer_or_with_one_that_fails_a_sentence_says_so(tmp_path, ids, on_path):
    common = ["--shape", "tiny", "--work", str(tmp_path), "--ids", str(ids), "--pairs", "2"]

    def fails(*more):
        done = CliRunner().invoke(cli.app, ["bench", "decode", *common, "--peers", *more])
        assert isinstance(done.exception, UserError)
        return str(done.exception)

    assert "llama-bench" in fails()
    assert "on the CPU" in fails("--device", "cuda")
    on_path("llama-bench", BROKEN)
    assert "failed with code 1: no such model" in fails("--batch", "1")


@pytest.mark.parametrize("shape", ["tiny", SMOLLM2])
def test_a_peer_gets_the_dense_model(tmp_path, monkeypatch, shape):
    if shape == SMOLLM2:
        sizes = backbone_of("tiny")[1].to_dict() | {"tie_word_embeddings": True}
        del sizes["model_type"]
        small = LlamaConfig(**sizes)
        monkeypatch.setattr(models, "backbone_of", lambda shape: (LlamaForCausalLM, small))
    case = Case(shape)
    model = peers.dense_model(case)
    found = GGUFReader(peers.write_gguf(case, tmp_path))
    sizes = {tensor.name: tensor.data.size for tensor in found.tensors}
    assert len(sizes) == len(list(model.parameters()))
    number = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert sum(size for name, size in sizes.items() if "norm" not in name) == 2 * number
    (up,) = (tensor for tensor in found.tensors if tensor.name == "blk.1.ffn_up.weight")
    values = torch.from_numpy(up.data.copy()).view(torch.bfloat16)
    assert torch.equal(values, model.model.layers[1].mlp.up_proj.weight)
    theirs = AutoConfig.from_pretrained(peers.write_configuration(case, tmp_path))
    assert theirs.intermediate_size == model.config.intermediate_size
    assert theirs.model_type == ("llama" if shape == SMOLLM2 else "nemotron")


def test_the_shape_of_a_real_model_has_its_numbers():
    model_class, config = backbone_of(SMOLLM2)
    with torch.device("meta"):
        model = model_class(config)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008


@pytest.mark.skipif(shutil.which("llama-bench") is None, reason="llama-bench isn't on the path")
def test_llama_bench_itself(tmp_path):
    (peer,) = (p for p in peers.find_peers(Case("tiny"), "cpu", tmp_path) if p.name == "llama.cpp")
    found = peer.decode(1, context=64, steps=64)
    assert found["tokens_per_second"] > 0 and found["version"]
    assert peer.decode(2, context=64, steps=64) is None
    assert peer.prefill(128)["tokens_per_second"] > 0
    assert json.dumps(found)
