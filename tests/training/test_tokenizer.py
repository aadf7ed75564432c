"""Tokenizers: however they are named, with an end-of-document token, and a hash that lasts."""

import hashlib
import json

import pytest
from tokenizers import Tokenizer

from lookup_experts.errors import UserError
from lookup_experts.training.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)


def test_the_hash_is_of_the_saved_file_and_survives_loading(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    save_tokenizer(tokenizer, tmp_path / "saved")
    content = (tmp_path / "saved" / "tokenizer.json").read_bytes()
    assert tokenizer_hash(tokenizer) == hashlib.sha256(content).hexdigest()
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "saved"))) == tokenizer_hash(tokenizer)


def test_truncation_and_padding_are_switched_off(tokenizer_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_token="<|endoftext|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"), "<|endoftext|>")
    assert loaded.backend_tokenizer.truncation is None
    assert loaded.backend_tokenizer.padding is None


def test_the_hash_tells_tokenizers_apart(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    expected = tokenizer_hash(tokenizer)
    tokenizer.add_tokens(["another"])
    assert tokenizer_hash(tokenizer) != expected


def test_the_vocabulary_counts_added_tokens(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert vocabulary_size(tokenizer) == 300
    tokenizer.add_tokens(["another"])
    assert vocabulary_size(tokenizer) == 301


def test_a_tokenizer_file_needs_an_eos_token(tokenizer_folder):
    file = str(tokenizer_folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"names no end-of-document token.*--eos-token"):
        load_tokenizer(file)
    assert load_tokenizer(file, "<|endoftext|>").eos_token_id == 0
    with pytest.raises(UserError, match="'<eos>' is not in the vocabulary"):
        load_tokenizer(file, "<eos>")


@pytest.mark.parametrize("name", ["./nope", "/nope/tokenizer.json", "nope.json"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(UserError, match=f"Tokenizer {name} not found"):
        load_tokenizer(name)


def test_what_is_no_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": 1}))
    for name in (str(file), str(tmp_path), "nope"):
        with pytest.raises(UserError, match=f"Tokenizer {name} can't be loaded; expected"):
            load_tokenizer(name, "<|endoftext|>")
