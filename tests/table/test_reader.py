"""The reader as a model meets it: right rows, honest counts, and errors that don't linger."""

import copy
import gc
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from reading import RowsInTraining
from tiny_models import attached_model, greedy, logits_of, token_ids

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.table.opening import open_table
from lookup_experts.table.reader import TableReader
from lookup_experts.table.store_choice import STORES

IDS = token_ids(2, 9)
READING = ("mmap", "direct")


@pytest.fixture(scope="module")
def training_form(training_folder):
    return le.load(training_folder)


@pytest.fixture
def own_folder(table_folder, tmp_path):
    """A copy of the inference folder, to spoil."""
    return shutil.copytree(table_folder, tmp_path / "own")


def opened(folder, store: str = "direct", **options):
    return le.load(folder, store=store, **options)


def shard_of(folder: Path) -> Path:
    return folder / "table" / "table-00001-of-00001.safetensors"


BATCHES = {
    "one": token_ids(1, 1),
    "duplicates": torch.tensor([[5, 5, 5, 7], [7, 5, 96, 96]]),
    "first and last": torch.tensor([[0, 96]]),
    "the whole vocabulary": torch.randperm(97).view(1, 97),
    "long": token_ids(4, 100),
    "padded": torch.cat([torch.zeros(2, 40, dtype=torch.int64), token_ids(2, 3)], dim=1),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("store", STORES)
def test_rows_are_those_of_the_experts(store, batch, grad, training_form, table_folder):
    ids = BATCHES[batch]
    with torch.set_grad_enabled(grad):
        expected = RowsInTraining(training_form, ids)
        rows = opened(table_folder, store).expert_source.rows(ids)
        assert rows.index.shape == ids.shape
        for layer in range(3):
            torch.testing.assert_close(
                rows.layer(layer)[rows.index], expected.layer(layer)[expected.index]
            )


def test_layers_can_be_asked_for_again_and_in_any_order(training_form, table_folder):
    """Gradient checkpointing and layer-wise tools do."""
    for store in STORES:
        for ids in (token_ids(1, 5), token_ids(4, 100)):
            with torch.no_grad():
                rows = opened(table_folder, store).expert_source.rows(ids)
                expected = RowsInTraining(training_form, ids)
                for layer in (2, 0, 0, 1, 2):
                    torch.testing.assert_close(
                        rows.layer(layer)[rows.index], expected.layer(layer)[expected.index]
                    )


def test_rows_stay_what_they_are_while_other_batches_are_read(training_form, table_folder):
    """Buffers are used again only when nobody holds their rows."""
    source = opened(table_folder).expert_source
    with torch.no_grad():
        held = [(ids, source.rows(ids)) for ids in (token_ids(1, 4, seed=s) for s in range(8))]
        for ids, rows in held:
            expected = RowsInTraining(training_form, ids)
            for layer in range(3):
                torch.testing.assert_close(
                    rows.layer(layer)[rows.index], expected.layer(layer)[expected.index]
                )


@pytest.mark.parametrize("store", STORES)
def test_the_counts_add_up(store, table_folder):
    model = opened(table_folder, store)
    source = model.expert_source
    batches = [torch.tensor([[3, 3, 4]]), torch.tensor([[5], [6]]), torch.tensor([[3, 4]])]
    for ids in batches:
        logits_of(model, ids)
    stats = source.stats()
    assert (stats.batches, stats.ids_asked) == (3, 7)
    assert (stats.store, stats.backend) == (store, source.stats().backend)
    if store != "memory":
        assert stats.ids_unique == 6
        assert stats.bytes_read >= 1536
        assert stats.read_seconds > 0
    assert stats.wait_seconds >= 0
    source.reset_stats()
    fresh = source.stats()
    assert (fresh.batches, fresh.ids_asked, fresh.bytes_read, fresh.read_seconds) == (0, 0, 0, 0)
    logits_of(model, batches[0])
    assert source.stats().ids_asked == 3


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("wrong", [-1, 97, 1 << 40])
def test_ids_outside_of_the_table_are_refused(store, wrong, table_folder):
    source = opened(table_folder, store).expert_source
    for ids in (torch.tensor([[1, wrong]]), torch.full((1, 300), wrong)):
        with torch.no_grad(), pytest.raises(TableError, match=f"Token id {wrong} is"):
            source.rows(ids)
    with torch.no_grad():
        assert source.rows(IDS).layer(0).isfinite().all()


def test_a_model_survives_ids_outside_of_its_vocabulary(table_folder):
    model = opened(table_folder)
    expected = logits_of(model, IDS)
    with pytest.raises((UserError, IndexError)):
        logits_of(model, torch.tensor([[97]]))
    assert torch.equal(logits_of(model, IDS), expected)


# ------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("store", READING)
def test_a_table_truncated_while_open_is_an_error_and_no_more(store, own_folder):
    """No wrong numbers, no hang; and the model works again when the file is whole again."""
    model = opened(own_folder, store)
    prompt = token_ids(1, 5)
    expected = greedy(model, prompt, 4)
    whole = shard_of(own_folder).read_bytes()
    os.truncate(shard_of(own_folder), 8192)
    other = torch.tensor([[40, 50, 60, 70, 80]])  # ids that no cache has
    for _ in range(3):
        with pytest.raises(TableError, match="truncated while open"):
            greedy(model, other, 4)
    with shard_of(own_folder).open("r+b") as file:  # the same file, not another of its name
        file.write(whole)
    assert torch.equal(greedy(model, prompt, 4), expected)
    assert greedy(model, other, 4).shape == (1, 4)


def test_checksums_find_a_flipped_byte_while_generating(own_folder):
    from random_tables import flip_bit

    flip_bit(shard_of(own_folder), open_table(own_folder / "table").layout.record_offset(33) + 5)
    ids = torch.tensor([[33, 1]])
    assert logits_of(opened(own_folder), ids).shape == (1, 2, 97)  # unnoticed without
    for store in READING:
        model = opened(own_folder, store, verify_checksums=True)
        with pytest.raises(TableError, match="record of id 33 is damaged"):
            logits_of(model, ids)
        assert logits_of(model, torch.tensor([[1, 2]])).isfinite().all()
    with pytest.raises(TableError, match="record of id 33 is damaged"):
        opened(own_folder, "memory", verify_checksums=True)


def test_errors_of_reading_surface_where_the_model_waits(table_folder, monkeypatch):
    model = opened(table_folder, "mmap")
    expected = logits_of(model, IDS)

    def fail(*_):
        raise TableError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(model.expert_source._store, "_fetch", fail)
        for ids in (token_ids(1, 3, seed=7), token_ids(4, 100)):
            with pytest.raises(TableError, match="the disk is gone"):
                logits_of(model, ids)
            with pytest.raises(TableError, match="the disk is gone"):
                model(input_ids=ids)
    assert torch.equal(logits_of(model, IDS), expected)


def test_a_closed_reader_says_so(table_folder):
    model = opened(table_folder)
    model.expert_source.close()
    with pytest.raises((ValueError, RuntimeError), match=r"closed|shutdown"):
        logits_of(model, token_ids(1, 3))


# ------------------------------------------------------------------------ buffers and gradients


def test_records_are_not_overwritten_before_the_backward(training_form, table_folder):
    folded = opened(table_folder)
    gradients = []
    for model in (training_form, folded):
        model.zero_grad()
        losses = []
        for seed in range(4):
            ids = token_ids(1, 4 + seed, seed=seed)
            losses.append(model(input_ids=ids, labels=ids).loss)
            logits_of(model, token_ids(2, 12, seed=seed + 50))
        sum(losses).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[1].items():
        if "embed_tokens" not in name:  # in training form experts send theirs there as well
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("store", STORES)
def test_a_copy_of_a_model_reads_the_same_table(store, table_folder):
    model = opened(table_folder, store)
    expected = logits_of(model, IDS)
    copied = copy.deepcopy(model)
    assert copied.expert_source is not model.expert_source
    model.expert_source.reset_stats()
    assert torch.equal(logits_of(copied, IDS), expected)
    assert model.expert_source.stats().batches == 0
    model.expert_source.close()
    assert torch.equal(logits_of(copied, IDS), expected)
    with pytest.raises(ValueError, match="is closed"):
        logits_of(model, IDS)


# ------------------------------------------------------------------------- many steps, threads


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("store", STORES)
def test_two_thousand_batches_leave_nothing_behind(store, table_folder):
    source = opened(table_folder, store).expert_source

    def step(seed: int) -> None:
        with torch.no_grad():
            rows = source.rows(token_ids(1, 1 + seed % 9, seed=seed))
            rows.layer(0)
            if seed % 7:
                rows.layer(2)

    for seed in range(200):
        step(seed)
    gc.collect()
    before = descriptors(), threading.active_count(), resident_bytes()
    for seed in range(2000):
        step(seed)
    assert descriptors() == before[0]
    assert threading.active_count() <= before[1]
    assert resident_bytes() - before[2] < 4_000_000


def test_models_that_are_let_go_close_their_files(table_folder):
    for store in STORES:
        opened(table_folder, store).expert_source.close()
    gc.collect()
    before = descriptors(), threading.active_count()
    for store in STORES * 3:
        model = opened(table_folder, store)
        logits_of(model, IDS)
        model.expert_source.close()
        del model
    gc.collect()
    assert (descriptors(), threading.active_count()) == before


@pytest.mark.parametrize("store", STORES)
def test_two_threads_generate_at_once(store, table_folder):
    """Two models over one folder, and two threads over one reader."""
    prompts = [token_ids(1, 6, seed=seed) for seed in range(4)]
    models = [opened(table_folder, store) for _ in range(2)]
    expected = [greedy(models[0], prompt, 12) for prompt in prompts]
    source = models[0].expert_source
    wanted = {seed: source.rows(token_ids(1, 7, seed=seed)).layer(1).clone() for seed in range(6)}
    problems = []

    def generate(model) -> None:
        for prompt, tokens in zip(prompts, expected, strict=True):
            if not torch.equal(greedy(model, prompt, 12), tokens):
                problems.append("other tokens")

    def read() -> None:
        with torch.no_grad():
            for seed in list(range(6)) * 5:
                rows = source.rows(token_ids(1, 7, seed=seed))
                ids = token_ids(1, 7, seed=seed)
                found = rows.layer(1)[rows.index]
                unique, index = torch.unique(ids, return_inverse=True)
                del unique
                if not torch.allclose(found, wanted[seed][index], atol=1e-6):
                    problems.append("other rows")

    threads = [threading.Thread(target=generate, args=(model,)) for model in models]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []


# --------------------------------------------------------------------------- other types


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("store", STORES)
def test_rows_come_in_the_type_of_the_model(encoding, store, tmp_path):
    model = attached_model("llama")
    le.reparameterize(model, tmp_path / "out", encoding=encoding)
    for dtype in ("float32", "bfloat16"):
        folded = opened(tmp_path / "out", store, dtype=dtype)
        for ids in (IDS, token_ids(4, 100)):
            with torch.no_grad():
                rows = folded.expert_source.rows(ids)
                assert rows.layer(0).dtype == getattr(torch, dtype)
            assert logits_of(folded, ids).dtype == getattr(torch, dtype)


def test_all_stores_give_the_same_rows(tmp_path):
    le.reparameterize(attached_model("llama"), tmp_path / "out", encoding="nf3")
    logits = [logits_of(opened(tmp_path / "out", store), IDS) for store in STORES]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)


def test_the_source_of_a_loaded_model_is_a_table(table_folder):
    assert isinstance(opened(table_folder).expert_source, TableReader)


def test_models_that_are_dropped_unclosed_leave_no_descriptors(table_folder):
    counts = []
    for _ in range(6):
        model = opened(table_folder)
        logits_of(model, IDS[:, :1])
        del model
        gc.collect()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[1] == counts[-1], counts
