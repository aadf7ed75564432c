"""Text that is tokenised while training: the same tokens, and positions that are found again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_hub
import numpy as np
import pytest
from tiny_texts import prose, write_rows

from lookup_experts.errors import UserError
from lookup_experts.training import streams
from lookup_experts.training.data import TokenShards
from lookup_experts.training.inputs import find_inputs
from lookup_experts.training.prepare import prepare
from lookup_experts.training.streams import RowStream, StreamedSequences
from lookup_experts.training.tokenizer import bos_token_ids, load_tokenizer

CONTEXT = 32


@pytest.fixture(scope="module", autouse=True)
def few_rows_at_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BATCH_ROWS", 3)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 documents, two of them empty."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [prose(50 + 30 * number, number) for number in range(20)]
    texts[4] = texts[11] = " "
    return write_rows(folder / "rows.jsonl", texts)


def open_stream(path: Path, tokenizer_folder: Path, lag: int = 4) -> StreamedSequences:
    rows = RowStream(find_inputs([str(path)]), "text")
    tokenizer = load_tokenizer(str(tokenizer_folder))
    return StreamedSequences(rows, tokenizer, CONTEXT, lag, bos=bos_token_ids(tokenizer))


def tokens_of(stream: StreamedSequences, numbers: Any) -> np.ndarray:
    return np.concatenate([stream[number]["input_ids"].numpy() for number in numbers])


@pytest.fixture(scope="module")
def expected(rows: Path, tokenizer_folder: Path, tmp_path_factory: Any) -> np.ndarray:
    """What `prepare` makes of the same rows."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare([rows], tokenizer=tokenizer_folder, out=out, validation=0, num_workers=1)
    shards = TokenShards(out)
    return shards.window(0, shards.num_tokens).astype(np.int64)


def test_a_stream_gives_the_tokens_that_prepare_writes_and_then_begins_again(
    rows: Path, tokenizer_folder: Path, expected: np.ndarray
) -> None:
    count = 2 * len(expected) // CONTEXT
    found = tokens_of(open_stream(rows, tokenizer_folder), range(count))
    assert np.array_equal(found, np.tile(expected, 2)[: count * CONTEXT])


def test_fewer_rows_than_are_read_at_once(
    rows: Path, tokenizer_folder: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BATCH_ROWS", 1000)
    count = 2 * len(expected) // CONTEXT
    found = tokens_of(open_stream(rows, tokenizer_folder), range(count))
    assert np.array_equal(found, np.tile(expected, 2)[: count * CONTEXT])


def test_parquet_gives_the_same(
    rows: Path, tokenizer_folder: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    found = tokens_of(open_stream(tmp_path / "rows.parquet", tokenizer_folder), range(5))
    assert np.array_equal(found, expected[: 5 * CONTEXT])


def test_a_process_that_takes_every_second_sees_what_the_others_leave_out(
    rows: Path, tokenizer_folder: Path, expected: np.ndarray
) -> None:
    for rank in range(2):
        numbers = range(rank, 14, 2)
        found = tokens_of(open_stream(rows, tokenizer_folder), numbers).reshape(-1, CONTEXT)
        assert np.array_equal(found, expected[: 14 * CONTEXT].reshape(-1, CONTEXT)[rank::2])


def test_any_position_is_found_again_exactly(rows: Path, tokenizer_folder: Path) -> None:
    """As plain JSON, in another stream, in the second pass too, though more was asked for."""
    last = 60
    whole = tokens_of(open_stream(rows, tokenizer_folder), range(last)).reshape(-1, CONTEXT)
    running = open_stream(rows, tokenizer_folder)
    for number in range(50):
        running[number]
        if number % 7 == 3:
            at = number - 2  # training is behind what has been fetched
            position = json.loads(json.dumps(running.position(at)))
            resumed = open_stream(rows, tokenizer_folder)
            resumed.restore(position)
            found = tokens_of(resumed, range(at, last)).reshape(-1, CONTEXT)
            assert np.array_equal(found, whole[at:])
            # And from a stream that was resumed itself, before it has read anything.
            again = open_stream(rows, tokenizer_folder)
            again.restore(position)
            assert again.position(at) == position
    assert len(running._snapshots) < 10  # those of long ago are forgotten


def test_files_that_can_not_be_streamed_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(UserError, match=r"a.txt can't be streamed.*mole prepare"):
        open_stream(tmp_path / "a.txt", tokenizer_folder)
    with pytest.raises(UserError, match="not found"):
        open_stream(tmp_path / "b.jsonl", tokenizer_folder)


def test_rows_without_text_are_told(tokenizer_folder: Path, tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", ["", "  "])
    with pytest.raises(UserError, match="has no text"):
        open_stream(empty, tokenizer_folder)[0]
    other = tmp_path / "other.jsonl"
    other.write_text('{"txt": "a"}\n')
    with pytest.raises(UserError, match=r"other.jsonl, row 1: no field 'text'; there are 'txt'"):
        open_stream(other, tokenizer_folder)[0]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"broken.jsonl can't be read further"):
        open_stream(broken, tokenizer_folder)[0]


_STREAM_FROM_HUB = """
import json, sys
from lookup_experts.training.inputs import find_inputs
from lookup_experts.training.streams import RowStream
report = []
def texts(rows, count):
    return [text for text, _ in rows.texts(count)]
for name in sys.argv[1:]:
    rows = RowStream(find_inputs([name]), "text")
    first, state, rest = texts(rows, 1), rows.state(), texts(rows, 5)
    again = RowStream(find_inputs([name]), "text")
    again.restore(json.loads(json.dumps(state)))
    report.append([first, rest, texts(again, 5)])
print(json.dumps(report))
"""


def test_a_data_set_on_the_hub_is_streamed_and_found_again(tmp_path: Path) -> None:
    """In a process of its own, since the hub's address is read when its library is imported."""
    with fake_hub.serve_hub() as environment:
        done = subprocess.run(
            [sys.executable, "-c", _STREAM_FROM_HUB, fake_hub.NAME, f"{fake_hub.NAME}:other"],
            capture_output=True,
            text=True,
            timeout=100,
            env={**environment, "HF_HOME": str(tmp_path)},
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    for (first, rest, again), rows in zip(
        json.loads(done.stdout), (fake_hub.ROWS, fake_hub.OTHER_ROWS), strict=True
    ):
        assert first + rest == rows
        assert again == rest
