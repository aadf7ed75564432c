"""A real model through the whole path: fetched, upcycled, folded, served by vLLM from disk."""

import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lookup_experts import cli

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from vllm_here import our_greedy
from vllm_process import VllmServer

pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED_BYTES = 3e9
EXPERTS = ("--experts", 4, "--row-size", 64, "--layers", "every:10", "--set", "experts.size=128")
"""Few and small, so that they are trained and folded within a minute."""
FOUR_STEPS = {
    "context_length": 64,
    "tokens": 4 * 4 * 64,
    "sequences_per_step": 4,
    "sequences_per_micro_batch": 2,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "validate_sequences": 2,
}


def mole(*words: object) -> None:
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    assert done.exit_code == 0, (done.output, done.exception)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2"
    if shutil.disk_usage(folder.parent).free < NEEDED_BYTES:
        pytest.skip(f"SmolLM2 and what is made of it take {NEEDED_BYTES / 1e9:.0f} GB of disk")
    example = [sys.executable, REPOSITORY / "examples" / "smollm2.py", folder]
    done = subprocess.run(example, capture_output=True, text=True, check=False)
    if "can't be fetched" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert "134,515,008 parameters" in done.stdout
    return folder


@pytest.fixture(scope="module")
def folded(backbone) -> Path:
    data, trained, folded = (backbone.with_name(name) for name in ("data", "trained", "folded"))
    text = backbone.with_name("text.txt")
    text.write_text((REPOSITORY / "README.md").read_text())
    mole("prepare", text, "--tokenizer", backbone, "--out", data, "--validation", "0.1")
    settings = [
        word for key in FOUR_STEPS.items() for word in ("--set", "training.{}={}".format(*key))
    ]
    mole("upcycle", backbone, "--data", data, "--out", trained, *EXPERTS, *settings)
    mole("reparameterize", trained, folded, "--encoding", "float32")
    return folded


def test_the_openai_client_streams_what_our_own_generate_says(backbone, folded):
    prompt = AutoTokenizer.from_pretrained(folded).apply_chat_template(
        [{"role": "user", "content": "What is a lookup table?"}], add_generation_prompt=True
    )["input_ids"]
    ((expected, _),) = our_greedy(folded, [prompt], 24)
    assert expected != our_greedy(backbone, [prompt], 24)[0][0]
    options = ("--max-model-len", 512, "--max-num-seqs", 4, "--enforce-eager")
    with VllmServer(folded, {"store": "direct", "cache": "1MB"}, *options) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        chunks = client.chat.completions.create(
            model=server.name,
            messages=[{"role": "user", "content": "What is a lookup table?"}],
            max_tokens=24,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        found = [
            token
            for chunk in chunks
            for token in getattr(chunk.choices[0], "token_ids", None) or ()
        ]
    assert found == expected
