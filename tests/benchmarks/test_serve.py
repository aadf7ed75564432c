"""`mole bench serve` for real: two servers, OpenAI's client, a shape small enough for a test."""

import json

import numpy as np
import pytest
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import cli

pytest.importorskip("fastapi", reason="mole serve needs fastapi")
pytest.importorskip("openai", reason="mole bench serve loads the server with OpenAI's client")

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
