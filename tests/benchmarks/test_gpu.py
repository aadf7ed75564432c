"""`mole bench gpu` where there is no GPU: its sections run on the CPU, at a tiny size."""

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.benchmarks import decode, gpu, machine
from lookup_experts.benchmarks.models import Case
from lookup_experts.errors import TableError, UserError


@pytest.fixture
def tiny_sections(monkeypatch):
    def made(name: str):
        section = gpu.SECTIONS[name]
        if not isinstance(section, partial):
            return section
        case, *others = section.args
        small = Case(
            "tiny", case.num_experts, case.encoding, torch.float32, case.form, vocab_size=5000
        )
        return partial(section.func, small, *others)

    monkeypatch.setattr(gpu, "SECTIONS", {name: made(name) for name in gpu.SECTIONS})
    monkeypatch.setattr(decode, "CACHE_WARM_UP_TOKENS", 64)
    monkeypatch.setattr(machine, "MATRIX_SIZE", 64)
    monkeypatch.setattr(machine, "MEMORY_SAMPLE_BYTES", 2**16)
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "PROMPTS", (70,))
    monkeypatch.setattr(gpu, "SERVED_STREAMS", (2,))
    monkeypatch.setattr(gpu, "SERVED_TOKENS", 5)


def run(folder, ids, *arguments: str) -> list[dict]:
    out = folder / "gpu.json"
    common = ["--device", "cpu", "--ids", ids, "--work", folder / "work", "--json", out]
    words = ["bench", "gpu", *arguments, "--pairs", 3, *common]
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())["results"]


@pytest.mark.timeout(300)
def test_every_section_runs(tmp_path, ids, tiny_sections):
    names = [name for name in gpu.SECTIONS if name not in ("tests", "serve")]
    results = run(tmp_path, ids, *names)
    assert not [result for result in results if "error" in result]
    assert list(dict.fromkeys(result["section"] for result in results)) == names
    decoded = [result for result in results if result["section"] == "decode"]
    assert [(each["system"], each["batch"]) for each in decoded] == [
        ("dense", 1), ("mole", 1), ("dense", 3), ("mole", 3),
    ]  # fmt: skip
    assert all(each["vocabulary"] == 5000 for each in decoded)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_servers_are_measured(tmp_path, ids, tiny_sections):
    results = run(tmp_path, ids, "serve")
    assert [each["system"] for each in results] == ["dense", "mole", "mole eager"]
    assert all(each["lost"] == 0 for each in results)


def test_a_section_that_fails_is_noted_and_the_next_begins(tmp_path, ids, monkeypatch):
    def fail(setting):
        yield {"what": "first"}
        raise TableError("the table\nis gone")

    def lose_the_device(setting):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    sections = {"broken": fail, "whole": lambda setting: iter([{"what": "second"}])}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert run(tmp_path, ids) == [
        {"section": "broken", "what": "first"},
        {"section": "broken", "error": "TableError: the table"},
        {"section": "whole", "what": "second"},
    ]
    sections = {"lost": lose_the_device, **sections}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert [result["section"] for result in run(tmp_path, ids)] == ["lost"]


def test_no_section_is_begun_after_the_time(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(gpu, "SECTIONS", {"one": lambda setting: iter([{"what": "it"}])})
    assert run(tmp_path, ids, "--seconds", "0") == []
    with pytest.raises(UserError, match="Unknown section 'two'"):
        CliRunner().invoke(
            cli.app, ["bench", "gpu", "two", "--device", "cpu"], catch_exceptions=False
        )
