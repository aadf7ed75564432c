"""`mole bench serve` for real: servers, streams over sockets, a shape small enough for a test."""

import json
import os
import sys

import numpy as np
import pytest
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import cli

pytest.importorskip("fastapi", reason="mole serve needs fastapi")

SIZES = ("--shape", "tiny", "--prompt", "8", "--tokens", "5")


def bench(tmp_path, *arguments: object) -> list[dict]:
    ids, out = tmp_path / "ids.npy", tmp_path / "serve.json"
    np.save(ids, np.random.default_rng(0).zipf(1.3, 100) % 5000)
    common = (*SIZES, "--work", tmp_path / "work", "--ids", ids, "--json", out)
    done = CliRunner().invoke(cli.app, ["bench", "serve", *map(str, (*common, *arguments))])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())["results"]


@pytest.mark.slow
def test_both_systems_and_a_soak(tmp_path):
    plot = tmp_path / "plot.png"
    results = bench(tmp_path, "--streams", "1,3", "--rounds", 1, "--plot", plot)
    assert [(result["system"], result["streams"]) for result in results] == [
        ("dense", 1),
        ("mole", 1),
        ("dense", 3),
        ("mole", 3),
    ]
    for result in results:
        assert result["lost"] == 0 and result["requests"] == result["streams"]
        assert result["tokens_per_second"] > 0
        assert 0 < result["inter_token_ms"]["p50"] <= result["inter_token_ms"]["p95"]
        assert result["ttft_ms"]["p50"] > 0
    assert plot.stat().st_size > 1000
    rows = result_rows("serve", results)
    assert [row["streams"] for row in rows] == ["1", "1", "3", "3"]
    assert rows[0]["× dense"] == "1.00" and rows[3]["lost"] == "0"
    assert "/" in rows[3]["between tokens, ms, median / 95 %"]
    (soak,) = bench(tmp_path, "--streams", "2", "--soak", 0.02)
    assert soak["lost"] == 0 and soak["requests"] >= 2
    assert 0 <= soak["resident_bytes_change"] < 0.5
    assert soak["resident_bytes_over_time"][-1][1] == soak["resident_bytes_at_end"]
    (row,) = result_rows("soak", [soak])
    assert (row["streams"], row["lost"]) == ("2", "0") and row["resident"].endswith(" MB")


@pytest.mark.slow
def test_beside_serving_without_graphs(tmp_path, ids):
    """As on a GPU; here all four run alike, since `--no-graphs` changes nothing on a CPU."""
    from pathlib import Path

    from lookup_experts.benchmarks.models import Case
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.benchmarks.serve import EAGER, bench_serve

    options = {"dense": ("--max-batch", 2), "mole": ("--max-batch", 2, "--store", "memory")}
    options |= {f"{name}{EAGER}": (*words, "--no-graphs") for name, words in options.items()}
    results = Results("serve", Path(tmp_path / "serve.json"))
    bench_serve(Case("tiny"), options, [2], 1, 8, 5, 0, ids, tmp_path, results)
    found = {result["system"]: result for result in results.found}
    assert list(found) == ["dense", "mole", "dense eager", "mole eager"]
    assert all(result["lost"] == 0 for result in results.found)
    assert found["dense"]["ratio_to_dense"] == found["dense eager"]["ratio_to_dense"] == 1
    assert found["mole"]["ratio_to_eager"] == pytest.approx(
        found["mole"]["tokens_per_second"] / found["mole eager"]["tokens_per_second"]
    )
    assert "ratio_to_eager" not in found["mole eager"]


@pytest.mark.slow
def test_beside_several_tables(tmp_path):
    """Both tables are asked for, of one server."""
    results = bench(tmp_path, "--streams", "2", "--rounds", 1, "--tables", 2, "--row-size", 16)
    found = {result["system"]: result for result in results}
    assert list(found) == ["dense", "mole", "tables"]
    assert all(result["lost"] == 0 for result in results)
    tables, mole = found["tables"], found["mole"]
    ratio = tables["tokens_per_second"] / mole["tokens_per_second"]
    assert tables["ratio_to_mole"] == pytest.approx(ratio)
    assert tables["beyond_dense_bytes"] > 0
    assert len({*tmp_path.glob("work/t*/*/table-*")}) == 2


def test_several_tables_and_a_soak_do_not_go_together():
    done = CliRunner().invoke(cli.app, ["bench", "serve", "--tables", "2", "--soak", "1"])
    assert "--tables compares loads" in str(done.exception or done.output)


VLLM = """#!{python}
import json, os, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
assert option("--max-num-seqs") == "2"
options = ["--port", option("--port"), "--model-name", option("--served-model-name")]
if "mole" in option("--model"):
    reader = json.loads(option("--additional-config"))["lookup_experts"]
    assert reader == {{"store": "direct", "cache": "0"}}
run = "from lookup_experts.cli import main; main()"
os.execv("{python}", ["{python}", "-c", run, "serve", option("--model"), *options])
"""
LLAMA_BENCH = """#!{python}
import json, sys
assert sys.argv[sys.argv.index("-pg") + 1] == "8,5"
print(json.dumps([dict(avg_ts=130.0, build_commit="abc123")]))
"""


@pytest.mark.slow
def test_beside_vllm_transformers_and_llama_cpp(tmp_path, monkeypatch):
    """In vLLM's place stands `mole serve` itself, which vLLM is asked for as it would be."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (("python", VLLM), ("vllm", ""), ("llama-bench", LLAMA_BENCH)):
        (programs / name).write_text(body.format(python=sys.executable))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    options = ("--streams", "1,2", "--rounds", 1, "--cache", "0", "--peers")
    results = bench(tmp_path, *options)
    found = {(result["system"], result["streams"]): result for result in results}
    servers = ["dense", "mole", "dense in vLLM", "mole in vLLM"]
    assert list(found) == [
        ("transformers", 1), ("llama.cpp", 1), ("transformers", 2),
        *((name, streams) for streams in (1, 2) for name in servers),
    ]  # fmt: skip
    assert found["llama.cpp", 1]["tokens_per_second"] == 50
    assert all(found[name, 2]["lost"] == 0 for name in servers)
    for vllm in ("", " in vLLM"):
        dense, mole = found[f"dense{vllm}", 2], found[f"mole{vllm}", 2]
        ratio = mole["tokens_per_second"] / dense["tokens_per_second"]
        assert mole["ratio_to_dense"] == pytest.approx(ratio)
        beyond = mole["resident_bytes"] - dense["resident_bytes"]
        assert beyond == pytest.approx(mole["beyond_dense_bytes"], abs=20e6)
    rows = {row["tokens/s (× dense)"]: row for row in result_rows("serve-by-streams", results)}
    assert list(rows) == ["transformers", "llama.cpp", *servers]
    assert (rows["llama.cpp"]["1 stream"], rows["llama.cpp"]["2 streams"]) == ("50", "")
    assert "×" in rows["mole in vLLM"]["2 streams"] and rows["dense"]["beyond dense"] == ""
    assert rows["mole"]["beyond dense"].endswith(" MB")


def test_without_vllm_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(cli.app, ["bench", "serve", "--peers"])
    assert "needs vllm on the path" in str(done.exception)
    done = CliRunner().invoke(cli.app, ["bench", "serve", "--peers", "--soak", "1"])
    assert "--peers compares loads on the CPU" in str(done.exception)


class Answers:
    """A server that gives every connection the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    async def __call__(self, reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        writer.close()


OPENED = b"HTTP/1.1 200 OK\r\n\r\n"
TOKEN = b'18\r\ndata: {"choices":[{"finish_reason":null}]}\n\n\r\n'


@pytest.mark.parametrize(
    "answer, tokens, error",
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\nlater", 0, "429 Too Many Requests: later"),
        (OPENED + TOKEN + b'data: {"error":{"message":"no record"}}\n', 1, "no record"),
        (OPENED + TOKEN, 1, None),  # cut off: lost without an error
        (b"", 0, "IncompleteReadError"),
        (OPENED + b"data: {nonsense\n", 0, "JSONDecodeError"),
    ],
)
def test_what_a_client_can_meet(answer, tokens, error):
    import asyncio

    from lookup_experts.benchmarks.serve import Client

    async def meet():
        server = await asyncio.start_server(Answers(answer), "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            return await Client(["tiny"], f"http://{host}:{port}", [[1, 2]], 5).request()

    stream = asyncio.run(meet())
    assert not stream.complete and len(stream.token_times) == tokens
    assert stream.error is None if error is None else error in stream.error
