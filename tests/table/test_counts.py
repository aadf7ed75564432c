"""Token counts: kept with a table, carried along, and what a row cache begins with."""

import json
import shutil
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from lanes import LateLane
from random_tables import flip_bit, make_table
from reading import open_on
from safetensors.numpy import save_file
from tiny_models import logits_of, tiny_model
from tiny_runs import make_data
from typer.testing import CliRunner

import lookup_experts as le
from lookup_experts import cli
from lookup_experts.errors import TableError, UserError
from lookup_experts.evaluation.counting import count_tokens
from lookup_experts.generation import folding
from lookup_experts.generation.inspection import inspect_folder, verify_folder
from lookup_experts.generation.reencoding import reencode
from lookup_experts.table.counts import COUNTS_NAME, keep_counts, most_frequent, read_counts
from lookup_experts.table.lanes import HostLane
from lookup_experts.table.opening import open_table
from lookup_experts.training.data import TokenShards

VOCAB = 97
TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks on.\n"


def silent(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def counted(training_folder, tmp_path):
    """(an inference folder with counts, the counts): id 5 is the most frequent, then 7, 6."""
    counts = np.zeros(VOCAB, np.int64)
    counts[[5, 6, 7]] = 30, 10, 20
    le.reparameterize(training_folder, tmp_path / "folded", token_counts=counts)
    return tmp_path / "folded", counts


def test_the_most_frequent_come_first_and_those_never_seen_not_at_all():
    counts = np.array([0, 3, 9, 3, 0, 1])
    assert most_frequent(counts, 10).tolist() == [2, 1, 3, 5]
    assert most_frequent(counts, 2).tolist() == [2, 1]
    assert most_frequent(counts, 0).tolist() == []


def test_counts_come_back_and_go_along(counted, tmp_path):
    folder, counts = counted
    assert (read_counts(open_table(folder / "table")) == counts).all()
    assert inspect_folder(folder)["table"]["tokens_counted"] == 60
    assert not verify_folder(folder).problems
    reencode(folder, tmp_path / "again", encoding="nf4")
    reencode(folder / "table", tmp_path / "bare", encoding="nf4")
    le.load(folder).save_pretrained(tmp_path / "saved")
    for table in (tmp_path / "again" / "table", tmp_path / "bare", tmp_path / "saved" / "table"):
        assert (read_counts(open_table(table)) == counts).all()


def test_without_counts_there_are_none(table_folder, tmp_path):
    assert read_counts(open_table(table_folder / "table")) is None
    assert inspect_folder(table_folder)["table"]["tokens_counted"] is None
    assert le.load(table_folder, store="direct", cache="20kB").expert_source.fill_cache() == 0
    reencode(table_folder, tmp_path / "again", encoding="nf4")
    assert not (tmp_path / "again" / "table" / COUNTS_NAME).exists()


@pytest.mark.parametrize(
    "counts",
    [
        np.ones(VOCAB - 1, np.int64),
        np.ones(VOCAB, np.int32),
        np.ones((1, VOCAB), np.int64),
        -np.ones(VOCAB, np.int64),
        np.ones(0, np.int64),
    ],
)
def test_counts_of_another_vocabulary_are_refused_before_any_work(
    counts, training_folder, tmp_path
):
    with pytest.raises(TableError, match=f"for each of {VOCAB} token ids"):
        le.reparameterize(training_folder, tmp_path / "out", token_counts=counts)
    assert not list(tmp_path.iterdir())


def test_counts_that_lie_scattered_in_memory_are_kept_as_they_are(tmp_path):
    table, _ = make_table(tmp_path / "table", vocab_size=40)
    for counts in (np.arange(80)[::2], np.arange(40)[::-1], np.arange(120).reshape(40, 3)[:, 1]):
        keep_counts(table.folder, counts, 40)
        assert (read_counts(table) == counts).all()


def test_a_run_that_goes_on_without_counts_has_none(training_folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folding, "save_without_experts", stop)
    with pytest.raises(KeyboardInterrupt):
        le.reparameterize(training_folder, tmp_path / "out", token_counts=np.ones(VOCAB, np.int64))
    monkeypatch.undo()
    table = le.reparameterize(training_folder, tmp_path / "out")
    assert read_counts(table) is None and (table.folder / "table.json").exists()


def test_damaged_counts_are_named(counted, tmp_path):
    folder, _ = counted
    path = folder / "table" / COUNTS_NAME
    whole = path.read_bytes()
    spoilt = {
        "truncated": whole[:-8],
        "empty": b"",
        "no safetensors": b"\xff" * len(whole),
    }
    for content in spoilt.values():
        path.write_bytes(content)
        with pytest.raises(TableError, match=COUNTS_NAME):
            verify_folder(folder)
        with pytest.raises(TableError, match=COUNTS_NAME):
            le.load(folder, store="direct", cache="20kB").expert_source.fill_cache()
    save_file({"other": np.ones(VOCAB, np.int64)}, path)
    with pytest.raises(TableError, match="expected one tensor, counts"):
        inspect_folder(folder)


def test_a_failed_write_leaves_the_counts_that_were_there(counted, monkeypatch):
    folder, counts = counted
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        keep_counts(folder / "table", counts + 1, VOCAB)
    assert (read_counts(open_table(folder / "table")) == counts).all()
    assert len(list((folder / "table").iterdir())) == 3


# ------------------------------------------------------------------------------ filling a cache


@pytest.mark.parametrize("lane", [None, HostLane, LateLane])
@pytest.mark.parametrize("vocab_size", [300, 40])
def test_a_filled_cache_has_the_most_frequent(vocab_size, lane, tmp_path):
    shape = {"num_layers": 2, "num_experts": 2, "row_size": 512, "encoding": "float16"}
    table, _ = make_table(tmp_path / "table", vocab_size=vocab_size, **shape)
    counts = np.random.default_rng(0).permutation(vocab_size).astype(np.int64)
    keep_counts(table.folder, counts, vocab_size)
    capacity = 150
    hot = most_frequent(counts, capacity)
    opened = open_on(lane and lane(), table, cache_bytes=capacity * 4096)
    with opened as reader, torch.no_grad():
        assert reader.fill_cache() == len(hot) == min(capacity, vocab_size - 1)
        fresh = reader.stats()
        assert (fresh.batches, fresh.bytes_read, fresh.cache_hits) == (0, 0, 0)
        for token_id in hot.tolist():
            reader.rows(torch.tensor([[token_id]])).layer(0)
        assert reader.stats().bytes_read == 0


def test_the_least_frequent_of_a_filled_cache_goes_first(tmp_path):
    shape = {"num_layers": 2, "num_experts": 2, "row_size": 512, "encoding": "float16"}
    table, _ = make_table(tmp_path / "table", vocab_size=300, **shape)
    counts = np.random.default_rng(0).permutation(300).astype(np.int64)
    keep_counts(table.folder, counts, 300)
    hot = most_frequent(counts, 151).tolist()
    with open_on(None, table, cache_bytes=150 * 4096) as reader, torch.no_grad():
        reader.fill_cache()
        reader.rows(torch.tensor([[hot[150]]])).layer(0)  # the first that had no place
        for token_id, is_there in ((hot[149], False), (hot[0], True), (hot[100], True)):
            reader.rows(torch.tensor([[token_id]])).layer(0)
            assert (reader.missed == frozenset()) == is_there


def test_without_a_cache_nothing_is_read(counted):
    folder, _ = counted
    for options in ({"store": "direct"}, {"store": "memory", "cache": "20kB"}):
        source = le.load(folder, **options).expert_source
        before = source._store.bytes_read
        assert source.fill_cache() == 0
        assert source._store.bytes_read == before


def test_a_damaged_record_is_an_error_and_is_not_kept(counted):
    folder, _ = counted
    shard = folder / "table" / "table-00001-of-00001.safetensors"
    stride = open_table(folder / "table").layout.stride
    flip_bit(shard, 4096 + 5 * stride + 3)
    model = le.load(folder, store="direct", cache="20kB", verify_checksums=True)
    for _ in range(2):
        with pytest.raises(TableError, match="record of id 5 is damaged"):
            model.expert_source.fill_cache()
    sound = torch.tensor([[6, 7, 8]])
    expected = logits_of(le.load(folder, store="memory"), sound)
    torch.testing.assert_close(logits_of(model, sound), expected)


def test_a_server_begins_with_a_filled_cache(counted, tokenizer):
    pytest.importorskip("fastapi", reason="the serving tests need fastapi and uvicorn")
    from served_here import served_here

    folder, _ = counted
    model = le.load(folder, store="direct", cache="20kB")
    with served_here(model, tokenizer) as (url, _):
        body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 1}).encode()
        asked = Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        assert urlopen(asked, timeout=20).status == 200
    found = model.expert_source.stats()
    assert (found.cache_hits, found.bytes_read) == (3, 0)


# ------------------------------------------------------------------------------------- counting


def test_a_text_is_counted_as_the_model_s_tokenizer_cuts_it(training_folder, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    counts = count_tokens(text, training_folder, silent)
    expected = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    assert counts.tolist() == np.bincount(expected, minlength=VOCAB).tolist()


def test_prepared_text_is_counted_in_pieces(tmp_path, monkeypatch):
    data = make_data(tmp_path / "text")
    shards = TokenShards(data)
    monkeypatch.setattr("lookup_experts.evaluation.counting.TOKENS_AT_ONCE", 100)
    model = tmp_path / "model"
    tiny_model("llama", vocab_size=300).save_pretrained(model)
    shutil.copytree(data / "tokenizer", model, dirs_exist_ok=True)
    counts = count_tokens(data, model, silent)
    ids = shards.window(0, shards.num_tokens)
    assert counts.tolist() == np.bincount(ids, minlength=300).tolist()


def test_what_can_not_be_counted(training_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no tokens to count"):
        count_tokens(tmp_path / "empty.txt", training_folder, silent)
    with pytest.raises(UserError, match="is no file"):
        count_tokens(tmp_path / "missing.txt", training_folder, silent)
    other = make_data(tmp_path / "text")
    with pytest.raises(UserError, match="with another tokenizer"):
        count_tokens(other, training_folder, silent)
    small = tmp_path / "small"  # a model whose tokenizer has more entries than its embedding
    tiny_model("llama", vocab_size=50).save_pretrained(small)
    shutil.copy2(training_folder / "tokenizer.json", small)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(UserError, match=r"Document 1 of .*text.txt, has the token .*below 50"):
        count_tokens(text, small, silent)


def test_the_command_keeps_counts(training_folder, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = str(tmp_path / "out")
    done = CliRunner().invoke(
        cli.app, ["reparameterize", str(training_folder), out, "--counts", str(text)]
    )
    assert done.exit_code == 0, done.output
    num_tokens = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    described = CliRunner().invoke(cli.app, ["inspect", out]).output
    assert f"counted         {num_tokens} tokens" in described
