"""Texts to evaluate on: from files of every kind to a bounded number of ids."""

import gzip
import json

import pytest

from lookup_experts.errors import UserError
from lookup_experts.evaluation.text import read_token_ids

WORDS = "the quick brown fox jumps over the lazy dog . "


@pytest.fixture
def with_eos(tokenizer):
    tokenizer.eos_token = "<s>"
    yield tokenizer
    tokenizer.eos_token = None


def test_a_text_becomes_its_token_ids(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    found = read_token_ids(tmp_path / "a.txt", tokenizer)
    assert found.tolist() == tokenizer(WORDS)["input_ids"]


def test_every_kind_of_file_gives_the_same(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(WORDS)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": WORDS}) + "\n")
    found = [
        read_token_ids(tmp_path / name, tokenizer).tolist()
        for name in ("a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz")
    ]
    assert all(ids == found[0] for ids in found)


def test_reading_stops_at_the_bound(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS * 1000)
    whole = tokenizer(WORDS * 1000)["input_ids"]
    assert read_token_ids(tmp_path / "a.txt", tokenizer, 100).tolist() == whole[:100]
    assert len(read_token_ids(tmp_path / "a.txt", tokenizer)) == min(len(whole), 2**15)
    with (tmp_path / "b.jsonl").open("w") as file:
        file.write(json.dumps({"text": WORDS}) + "\nnot JSON\n")
    assert len(read_token_ids(tmp_path / "b.jsonl", tokenizer, 5)) == 5


def test_documents_end_with_the_token_for_it(with_eos, tmp_path):
    rows = ["the fox", "", "the dog"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    fox, dog = (with_eos(row)["input_ids"] for row in (rows[0], rows[2]))
    end = with_eos.eos_token_id
    assert read_token_ids(tmp_path / "a.jsonl", with_eos).tolist() == [*fox, end, *dog, end]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "is no file"),
        ("a.bin", b"abc", "unknown file type"),
        ("a.txt", b"", "has 0 tokens"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.jsonl", b'{"content": "x"}\n', "no field 'text'"),
        ("a.jsonl", b"{\n", "not valid JSON"),
        ("a.txt.gz", b"abc", "damaged gzip"),
    ],
)
def test_what_can_not_be_read_is_an_error_in_one_line(name, content, words, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_token_ids(tmp_path / name, tokenizer)


def test_a_folder_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="is no file"):
        read_token_ids(tmp_path, tokenizer)
