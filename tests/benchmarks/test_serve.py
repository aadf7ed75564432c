"""`mole bench serve` for real: servers, streams over sockets, a shape small enough for a test."""

import json

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
            return await Client("tiny", f"http://{host}:{port}", [[1, 2]], 5).request()

    stream = asyncio.run(meet())
    assert not stream.complete and len(stream.token_times) == tokens
    assert stream.error is None if error is None else error in stream.error
