"""What tests share: folders with tiny models and tokenizers, and the oracles beside the project."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import VOCAB, attached_model

import lookup_experts as le

REPOSITORY = Path(__file__).resolve().parents[1]

_TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a small table, and "
    "on the table there were records; every record had a number, and every number was read once."
)

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def official_oracles() -> Path:
    """Checkpoints in the authors' format with the logits that the authors' code gives."""
    folder = REPOSITORY.parent / "shared" / "oracles" / "official"
    if not folder.is_dir():
        pytest.skip("the oracles of the official code (../shared/oracles/official) are not here")
    return folder


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone.

    As a fixture it outlives what the test wraps: gloo's threads are joined by whoever lets go of
    the group last, and DistributedDataParallel would hold the interpreter that they wait for.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer of 97 entries: some bytes and merges, enough for English."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "<unk>"], show_progress=False
    )
    trained.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def training_folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny Llama with experts in training form, float32, and its tokenizer. Don't change it."""
    folder = tmp_path_factory.mktemp("training-form") / "model"
    attached_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def table_folder(tmp_path_factory, training_folder) -> Path:
    """The same in table form: exact, float32. Don't change it."""
    folder = tmp_path_factory.mktemp("table-form") / "model"
    le.reparameterize(training_folder, folder, encoding="float32")
    return folder


@pytest.fixture
def run_python():
    """Run a piece of Python in a fresh process: (exit code, stdout, stderr)."""

    def run(code: str, *arguments: object, timeout: float = 60) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")},
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run
