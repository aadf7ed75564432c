"""A folder that several models are saved into, one after the other: the last one wins."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, attached_model, logits_of, randomize_experts, tiny_model, token_ids
from transformers import AutoModelForCausalLM, GenerationConfig

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import PARTIAL
from lookup_experts.folders.replacing import replaced_model

IDS = token_ids(2, 9)


class Saved:
    """Models of every kind, and how each is saved."""

    def __init__(self, folder: Path) -> None:
        tiny_model("llama", 7).save_pretrained(folder / "backbone")
        experts = AutoModelForCausalLM.from_pretrained(folder / "backbone")
        le.attach(experts, 2, train_backbone=False, save="experts")
        randomize_experts(experts, seed=8)
        for name, seed in (("table", 3), ("other table", 5)):
            le.reparameterize(
                attached_model("llama", seed),
                folder / name,
                encoding="float32",
                token_counts=np.arange(VOCAB),
            )
        self.models = {
            "single": attached_model("llama", 1),
            "sharded": attached_model("llama", 2),
            "fewer shards": attached_model("llama", 4),
            "table": le.load(folder / "table"),
            "sharded table": le.load(folder / "other table"),
            "experts": experts.eval(),
            "sharded experts": experts,
        }
        self.options: dict[str, dict[str, Any]] = {
            "sharded": {"max_shard_size": "20KB"},
            "fewer shards": {"max_shard_size": "70KB"},
            "sharded table": {"max_shard_size": "20KB"},
            "sharded experts": {"max_shard_size": "10KB"},
        }

    def save(self, kind: str, folder: Path) -> None:
        self.models[kind].save_pretrained(folder, **self.options.get(kind, {}))

    def logits(self, kind: str) -> torch.Tensor:
        return logits_of(self.models[kind], IDS)


KINDS = [
    "single",
    "sharded",
    "fewer shards",
    "table",
    "sharded table",
    "experts",
    "sharded experts",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_the_last_one_wins_and_leaves_nothing_of_the_first(first, second, saved, tmp_path):
    saved.save(first, tmp_path / "model")
    saved.save(second, tmp_path / "model")
    saved.save(second, tmp_path / "alone")
    assert files_of(tmp_path / "model") == files_of(tmp_path / "alone")
    for load in (AutoModelForCausalLM.from_pretrained, le.load):
        assert torch.equal(logits_of(load(tmp_path / "model"), IDS), saved.logits(second))


def test_all_of_them_one_after_the_other(saved, tmp_path):
    for kind in [*KINDS, *reversed(KINDS)]:
        saved.save(kind, tmp_path)
        assert torch.equal(logits_of(le.load(tmp_path), IDS), saved.logits(kind)), kind


def test_weights_of_older_formats_go(saved, tmp_path):
    old = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "shard-00000-model-00001-of-00001.safetensors",  # transformers would load it before all
        "model-00001-of-00009.safetensors",
    ]
    for name in old:
        (tmp_path / name).write_bytes(b"an earlier model")
    saved.save("sharded", tmp_path)
    assert not files_of(tmp_path) & set(old)
    assert torch.equal(logits_of(le.load(tmp_path), IDS), saved.logits("sharded"))


def test_files_of_others_stay(saved, tmp_path):
    theirs = {
        "README.md",
        "tokenizer.json",
        "training_args.bin",
        "optimizer.bin",
        "my_model.safetensors",
        "model.safetensors.notes",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "notes/model.safetensors",
        "table/chairs.txt",  # a folder of the user's own
    }
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for kind in ("single", "sharded", "experts"):
        saved.save(kind, tmp_path)
    assert {name: (tmp_path / name).read_text() for name in theirs} == {n: n for n in theirs}
    with pytest.raises(UserError, match="is where the table belongs, and is none"):
        saved.save("table", tmp_path)
    assert theirs <= files_of(tmp_path)
    assert torch.equal(logits_of(le.load(tmp_path), IDS), saved.logits("experts"))


def test_a_variant_has_its_own_files(saved, tmp_path):
    saved.save("single", tmp_path)
    for size in ("20KB", "50GB", "20KB"):
        saved.models["sharded"].save_pretrained(tmp_path, variant="other", max_shard_size=size)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="other")
        assert torch.equal(logits_of(loaded, IDS), saved.logits("sharded"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, IDS), saved.logits("single"))
    saved.models["single"].save_pretrained(tmp_path, variant="other")
    assert not [name for name in files_of(tmp_path) if "of-0" in name or "index" in name]


def test_a_model_is_saved_into_the_folder_that_it_was_loaded_from(saved, tmp_path):
    for kind in ("single", "sharded", "table", "experts"):
        saved.save(kind, tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path, max_shard_size="20KB")
        assert torch.equal(logits_of(loaded, IDS), saved.logits(kind))  # its files may be gone
        assert torch.equal(logits_of(le.load(tmp_path), IDS), saved.logits(kind))


def test_a_table_that_is_read_outlives_the_folder_it_is_replaced_in(saved, tmp_path):
    saved.save("table", tmp_path)
    reading = le.load(tmp_path, store="direct")
    saved.save("single", tmp_path)
    assert torch.equal(logits_of(reading, IDS), saved.logits("table"))
    assert not (tmp_path / "table").exists()


def test_a_table_that_is_a_link_is_replaced_and_not_followed(saved, tmp_path):
    saved.save("table", tmp_path / "first")
    saved.save("table", tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "table")
    (tmp_path / "second" / "table").symlink_to(tmp_path / "first" / "table")
    linked = le.load(tmp_path / "second")
    linked.save_pretrained(tmp_path / "second")  # it is the model's own
    assert (tmp_path / "second" / "table").is_symlink()
    assert torch.equal(logits_of(le.load(tmp_path / "second"), IDS), saved.logits("table"))
    saved.save("single", tmp_path / "second")
    assert not os.path.lexists(tmp_path / "second" / "table")
    assert torch.equal(logits_of(le.load(tmp_path / "first"), IDS), saved.logits("table"))


def test_links_into_a_store_of_files_are_replaced_and_not_written_through(saved, tmp_path):
    """As the hub's cache has them."""
    saved.save("single", tmp_path / "blobs")
    content = (tmp_path / "blobs" / "model.safetensors").read_bytes()
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    saved.save("fewer shards", tmp_path / "model")
    saved.save("single", tmp_path / "model")
    saved.models["sharded"].save_pretrained(tmp_path / "model")
    assert (tmp_path / "blobs" / "model.safetensors").read_bytes() == content
    assert torch.equal(logits_of(le.load(tmp_path / "model"), IDS), saved.logits("sharded"))


def test_an_adapter_takes_nobodys_place(saved, tmp_path):
    """transformers saves it without the model."""
    saved.save("sharded", tmp_path)
    before = files_of(tmp_path)
    with replaced_model(tmp_path) as folder:
        (folder / "adapter_model.safetensors").write_text("new")
    assert files_of(tmp_path) == before | {"adapter_model.safetensors"}
    assert torch.equal(logits_of(le.load(tmp_path), IDS), saved.logits("sharded"))


def test_the_generation_configuration_is_that_of_the_last(saved, tmp_path):
    model = attached_model("llama")
    model.generation_config = GenerationConfig(max_new_tokens=3)
    model.save_pretrained(tmp_path)
    saved.save("single", tmp_path)
    assert le.load(tmp_path).generation_config.max_new_tokens is None


def test_a_file_is_no_folder(saved, tmp_path):
    (tmp_path / "model").write_text("mine")
    for kind in ("single", "experts", "table"):
        with pytest.raises(UserError, match="is a file; give a folder"):
            saved.save(kind, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_who_isnt_the_main_process_writes_nothing(saved, tmp_path):
    for kind in ("single", "experts", "table"):
        saved.models[kind].save_pretrained(tmp_path / kind, is_main_process=False)
        saved.models[kind].save_pretrained(tmp_path / kind, False)
        assert not (tmp_path / kind).exists() or not files_of(tmp_path / kind)


TOGETHER = """
import sys, torch.distributed as dist, lookup_experts as le
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
for kind in ("single", "table", "experts"):
    model = le.load(f"{folder}/{kind}")
    for size in ("50GB", "20KB"):
        dist.barrier()
        model.save_pretrained(f"{folder}/{kind} again", max_shard_size=size)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.timeout(400)  # processes that import all of it
def test_processes_that_save_together(saved, tmp_path):
    for kind in ("single", "table", "experts"):
        saved.save(kind, tmp_path / kind)
    processes = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, str(rank), tmp_path]) for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for kind in ("single", "table", "experts"):
        folder = tmp_path / f"{kind} again"
        assert torch.equal(logits_of(le.load(folder), IDS), saved.logits(kind))
        assert not (folder / PARTIAL).exists()


# ------------------------------------------------------------------------------------- interrupted


class Interrupted(BaseException):
    """Like a signal, at a moment of the test's choice."""


def _interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], bool]:
    """Let the given change of a file's or folder's name, or its removal, be the last that happens.

    Returns:
        Whether it has come to that.
    """
    done = itertools.count()
    over: list[int] = []

    def stopping(change: Any) -> Any:
        def change_or_stop(self: Any, *args: Any, **options: Any) -> Any:
            if over or next(done) >= step:
                over.append(step)
                raise Interrupted
            return change(self, *args, **options)

        return change_or_stop

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))
    return lambda: bool(over)


PAIRS = [
    ("single", "sharded"),
    ("sharded", "single"),
    ("table", "single"),
    ("single", "table"),
    ("table", "sharded table"),
    ("experts", "table"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_an_interrupted_save_leaves_the_old_the_new_or_nothing_that_loads(
    first, second, saved, tmp_path, monkeypatch
):
    outcomes = []
    for step in itertools.count():
        folder = tmp_path / str(step)
        saved.save(first, folder)
        with monkeypatch.context() as patch:
            stopped = _interrupt(patch, step)
            with suppress(Interrupted):
                saved.save(second, folder)
            was_stopped = stopped()
        outcomes.append(_what_loads(folder, saved, first, second))
        saved.save(second, folder)  # and it can be done again
        assert torch.equal(logits_of(le.load(folder), IDS), saved.logits(second))
        assert not (folder / PARTIAL).exists()
        if not was_stopped:
            break
    assert len(outcomes) > 3
    assert outcomes[0] == first
    assert outcomes[-1] == second
    order = [first, "nothing", second]
    assert outcomes == sorted(outcomes, key=order.index)


def _what_loads(folder: Path, saved: Saved, first: str, second: str) -> str:
    """Which of two models a folder holds, for our loading and for transformers'."""
    found = set()
    for load in (le.load, AutoModelForCausalLM.from_pretrained):
        try:
            logits = logits_of(load(folder), IDS)
        except (OSError, ValueError) as error:
            if load is le.load:
                assert "Saving a model into it was interrupted; save it again" in str(error)
            found.add("nothing")
            continue
        kind = second if torch.equal(logits, saved.logits(second)) else first
        assert torch.equal(logits, saved.logits(kind))
        found.add(kind)
    (kind,) = found
    return kind


def test_an_error_while_writing_leaves_the_old_model(saved, tmp_path, monkeypatch):
    saved.save("single", tmp_path)
    before = files_of(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    for kind, place in (
        ("sharded", "transformers.modeling_utils.safe_save_file"),
        ("experts", "huggingface_hub.save_torch_state_dict"),
        ("table", "lookup_experts.folders.replacing.copy_table"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="No space left"):
                saved.save(kind, tmp_path)
            with pytest.raises(OSError, match="No space left"):
                saved.save(kind, tmp_path / "new")
        assert files_of(tmp_path) == before
        assert not (tmp_path / "new").exists()
        assert torch.equal(logits_of(le.load(tmp_path), IDS), saved.logits("single"))


SAVE_AGAIN_AND_AGAIN = """
import sys, lookup_experts as le
models = [le.load(folder) for folder in sys.argv[2:]]
print("ready", flush=True)
while True:
    for model, size in zip(models, ("20KB", "50GB")):
        model.save_pretrained(sys.argv[1], max_shard_size=size)
"""


@pytest.mark.timeout(400)
def test_a_process_that_is_killed_while_it_saves(saved, tmp_path):
    for kind in ("single", "table"):
        saved.save(kind, tmp_path / kind)
    outcomes = set()
    for number in range(2):
        folder = tmp_path / "model"
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, folder, *map(tmp_path.joinpath, KILLED)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            process.wait(timeout=0.3 + number * 0.137)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        outcomes.add(_what_loads(folder, saved, *KILLED))
    assert outcomes <= {*KILLED, "nothing"}
    saved.save("experts", tmp_path / "model")
    assert torch.equal(logits_of(le.load(tmp_path / "model"), IDS), saved.logits("experts"))


KILLED = ("single", "table")
