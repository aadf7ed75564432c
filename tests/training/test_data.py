"""Reading token shards: windows, examples for training, and refusal of what isn't whole."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_texts import prose, write_rows

from lookup_experts.errors import UserError
from lookup_experts.training import shards
from lookup_experts.training.data import TokenDataset, TokenShards
from lookup_experts.training.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder) -> Path:
    """30 documents in many shards of 100 tokens."""
    parent = tmp_path_factory.mktemp("data")
    text = write_rows(parent / "a.jsonl", [prose(200, seed) for seed in range(30)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 100)
        prepare([text], tokenizer=tokenizer_folder, out=parent / "out", validation=0.1)
    return parent / "out"


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.glob("*.*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


def all_tokens(folder: Path, split: str) -> np.ndarray:
    """The slow reference: the files one after the other."""
    files = sorted(folder.glob(f"{split}-*.bin"))
    return np.frombuffer(b"".join(path.read_bytes() for path in files), dtype="<u2")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_is_its_shards_one_after_the_other(folder, split):
    opened = TokenShards(folder, split)
    expected = all_tokens(folder, split)
    assert opened.num_tokens == len(expected) > 100
    assert np.array_equal(opened.window(0, len(expected)), expected)
    random = np.random.default_rng(0)
    for start in [0, 99, 100, 101, *random.integers(0, len(expected), 100)]:
        length = int(random.integers(1, len(expected) - start + 1))
        assert np.array_equal(opened.window(int(start), length), expected[start : start + length])


def test_facts_about_the_tokens(folder):
    opened = TokenShards(folder)
    assert (opened.vocab_size, opened.eos_token_id) == (300, 0)
    assert opened.tokenizer_hash == opened.manifest.tokenizer["hash"]
    assert (all_tokens(folder, "train") == 0).sum() == opened.manifest.num_documents("train")


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (0, 10**6), (10**6, 1), (5, -1)])
def test_windows_outside_are_refused(folder, start, length):
    with pytest.raises(IndexError):
        TokenShards(folder).window(start, length)


def test_pickling_takes_no_tokens_along(folder):
    opened = TokenShards(folder)
    pickled = pickle.dumps(opened)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).window(50, 300), opened.window(50, 300))


def test_examples_are_consecutive_windows(folder):
    opened = TokenShards(folder)
    dataset = TokenDataset(opened, context_length=64)
    assert len(dataset) == opened.num_tokens // 64
    examples = list(dataset)
    assert len(examples) == len(dataset)
    joined = torch.cat([example["input_ids"] for example in examples])
    assert joined.dtype == torch.int64
    assert np.array_equal(joined.numpy(), all_tokens(folder, "train")[: 64 * len(dataset)])
    assert all(torch.equal(example["input_ids"], example["labels"]) for example in examples)


def test_examples_through_loader_processes(folder):
    dataset = TokenDataset(TokenShards(folder), context_length=64)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)
    joined = torch.cat([batch["input_ids"].flatten() for batch in loader])
    assert np.array_equal(joined.numpy(), all_tokens(folder, "train")[: 64 * len(dataset)])


def test_a_text_shorter_than_the_context(folder):
    opened = TokenShards(folder, "validation")
    assert len(TokenDataset(opened, opened.num_tokens)) == 1
    needed = opened.num_tokens + 1
    with pytest.raises(UserError, match=rf"has {needed - 1:,} tokens, .* context of {needed:,}"):
        TokenDataset(opened, needed)
    with pytest.raises(UserError, match="at least 1 token"):
        TokenDataset(opened, 0)


def test_unknown_split_and_missing_folder(folder, tmp_path):
    with pytest.raises(UserError, match=r"Unknown split 'valid'\. Did you mean 'validation'"):
        TokenShards(folder, "valid")
    with pytest.raises(UserError, match="holds no token shards"):
        TokenShards(tmp_path / "nope")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; expected a folder"):
        TokenShards(tmp_path / "file")


def test_a_missing_or_cut_shard_is_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path / "copy")
    shard = copy / "train-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train-00001\.bin has 198 bytes, expected 200"):
        TokenShards(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin is missing"):
        TokenShards(copy, "validation")


def test_verify_finds_a_flipped_bit(folder, tmp_path):
    copy = copy_of(folder, tmp_path / "copy")
    TokenShards(copy).verify()
    content = bytearray((copy / "train-00002.bin").read_bytes())
    content[77] ^= 1
    (copy / "train-00002.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002\.bin is damaged"):
        TokenShards(copy).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "it is of format"),
        ({"surprise": 1}, "surprise"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"splits": {"train": []}}, "validation"),
        ({"splits": {"train": [{"file": "x"}], "validation": []}}, "can't be read"),
        (
            {
                "splits": {
                    "train": [
                        {"file": "../x", "num_tokens": 1, "num_documents": 1, "sha256": ""},
                    ],
                    "validation": [],
                }
            },
            "not numbered from 0",
        ),
    ],
)
def test_foreign_manifests_are_refused(folder, tmp_path, change, message):
    copy = copy_of(folder, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=message):
        TokenShards(copy)


def test_a_manifest_that_is_no_json(folder, tmp_path):
    copy = copy_of(folder, tmp_path / "copy")
    for content in ("{", "[]", ""):
        (copy / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="can't be read"):
            TokenShards(copy)
