"""Every kind of file is read as what it is; what can't be read is told with its place."""

import gzip
import json
import random
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lookup_experts.errors import UserError
from lookup_experts.training import documents
from lookup_experts.training.documents import read_documents
from lookup_experts.training.inputs import find_inputs


def read(path, text_field: str = "text") -> list[str]:
    """The documents of a file; the last position read is the end of the file."""
    (source,) = find_inputs([str(path)], path.parent / "out" / "folder")
    texts = [""]
    position = 0
    for chunk in read_documents(source, text_field):
        assert chunk.position >= position
        position = chunk.position
        texts[-1] += chunk.text
        if chunk.ends_document:
            texts.append("")
    assert texts.pop() == ""
    assert position <= source.num_bytes
    return texts


def rows(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".TXT"])
def test_a_plain_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("é line\r\n\n next".encode())
    assert read(path) == ["é line\r\n\n next"]


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read(path) == ["hello"]


def test_a_long_file_comes_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 1000)
    path = tmp_path / "a.txt.gz"
    text = "".join(chr(random.Random(0).randrange(32, 3000)) for _ in range(5500))
    path.write_bytes(gzip.compress(text.encode()))
    (source,) = find_inputs([str(path)], tmp_path / "out")
    assert len(list(read_documents(source, "text"))) == 7
    assert read(path) == [text]


def test_empty_files_are_empty_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(tmp_path / "a.txt") == [""]
    assert read(tmp_path / "a.jsonl") == []


def zst(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize(("pack", "ending"), [(bytes, ""), (gzip.compress, ".gz"), (zst, ".zst")])
def test_a_row_is_a_document(tmp_path, pack, ending):
    path = tmp_path / f"a.jsonl{ending}"
    content = rows({"text": "one\n"}, {"text": ""}, {"text": None}) + b"\n" + rows({"text": "é"})
    path.write_bytes(pack(content))
    assert read(path) == ["one\n", "", "", "é"]


def test_zst_in_several_frames_and_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 1000)
    path = tmp_path / "a.txt.zst"
    parts = ["é line\r\n\n" * 300, "und so weiter " * 5000]
    path.write_bytes(b"".join(zst(part.encode()) for part in parts))
    assert read(path) == ["".join(parts)]
    # By other programs, whose frames don't say how much is in them.
    (tmp_path / "raw.jsonl").write_bytes(rows({"text": "one"}, {"text": "two"}))
    if shutil.which("zstd"):
        packed = tmp_path / "b.jsonl.zst"
        with packed.open("wb") as file:
            subprocess.run(["zstd", "-c"], input=rows({"text": "1"}), stdout=file, check=True)
        assert read(packed) == ["1"]


def test_the_text_field_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows({"body": "x", "text": "y"}))
    assert read(path, "body") == ["x"]


def test_parquet_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_ROWS_AT_ONCE", 3)
    path = tmp_path / "a.parquet"
    texts = ["one", None, "", *(f"row {i}" for i in range(20))]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "id": list(range(23))}), path, row_group_size=5
    )
    assert read(path) == [text or "" for text in texts]
    with pytest.raises(UserError, match=r"a\.parquet: no field 'body'; there are 'text', 'id'"):
        read(path, "body")
    with pytest.raises(UserError, match=r"row 1: the field 'id' holds a int"):
        read(path, "id")


def test_a_large_row_group_of_parquet_is_not_held(tmp_path):
    """So that no more is held than of a .jsonl: peaks of fresh processes, by the kernel's word."""
    random_text = random.Random(0)
    texts = [random_text.randbytes(2048).hex() for _ in range(25_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(rows(*({"text": text} for text in texts)))
    script = """
import sys
from pathlib import Path
import pyarrow.parquet
from lookup_experts.training.documents import read_documents
from lookup_experts.training.inputs import find_inputs
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
(source,) = find_inputs([sys.argv[1]])
before = status("VmHWM")
assert sum(len(chunk.text) for chunk in read_documents(source, "text")) == 25_000 * 4096
print(before, status("VmHWM"))
"""
    peaks = {}
    for name in ("a.jsonl", "a.parquet"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=True,
        )
        before, peaks[name] = map(int, done.stdout.split())
    assert peaks["a.parquet"] < 2 * peaks["a.jsonl"]
    assert peaks["a.parquet"] - before < 60 * 2**20  # the column has 98 MiB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows({"text": "a"}) + b'{"text": "b\n', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"text": "\xff"}\n', r"line 1: not valid JSON"),
        (rows({"text": "a"}, ["text"]), r"line 2: a list; expected a JSON object"),
        (rows({"text": "a"}, {"body": "b"}), r"line 2: no field 'text'; there are 'body'"),
        (rows({}), r"line 1: no field 'text'; there are none.*--text-field"),
        (rows({"text": 3}), r"line 1: the field 'text' holds a int"),
        (b'{"text": "\\ud800"}\n', r"line 1: the text holds half of a surrogate pair"),
    ],
)
def test_bad_rows_are_told_with_their_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "é".encode("latin1") + b" text", "not UTF-8 text"),
        ("a.txt.gz", b"no gzip", "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(rows({"text": "x" * 99}), mtime=0)[:-12], "damaged gzip"),
        ("a.jsonl.zst", zst(rows({"text": "x" * 99}))[:-9], "damaged zst"),
        ("a.txt.zst", b"no zst at all", "damaged zst"),
        ("a.parquet", b"PAR1 and then nothing", "can't be read as parquet"),
    ],
)
def test_damaged_files_are_told(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read(path)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'lookup-experts\[train\]'"):
        read(path)
