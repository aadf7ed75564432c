"""A tiny tokenizer for the tests of `training`."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny_texts import prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


@pytest.fixture(autouse=True, scope="session")
def offline():
    """No waiting for the hub. The environment variable is read when the hub's library is imported,
    which may have happened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 300 entries with an end-of-document token, as a folder."""
    folder = tmp_path_factory.mktemp("byte-bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(5000, seed=0)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tokenizer_folder) -> Tokenizer:
    """The same, as the library `tokenizers` has it."""
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
