"""Embeddings of released models in tables: the same logits, to the last bit."""

import copy
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from embedding_models import (
    FAMILIES,
    MODULES,
    embedding_model,
    load_offloaded,
    load_plain,
    randomize_zeros,
    saved_and_offloaded,
)
from run_command import run_command
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, logits_of, randomize_experts, tiny_config, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import lookup_experts as le
from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.folders import checkpoint
from lookup_experts.generation.inspection import inspect_folder, verify_folder
from lookup_experts.model.late_rows import LateRows
from lookup_experts.model.table_embedding import table_embeddings
from lookup_experts.table import build

FEW, MANY = token_ids(2, 11), token_ids(3, 90)
"""Through the row cache, and past it as a prompt is."""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A family's folder, that with tables, and the models of both."""
    folder = tmp_path_factory.mktemp(request.param)
    plain, out = saved_and_offloaded(request.param, folder)
    return SimpleNamespace(
        family=request.param,
        plain=plain,
        out=out,
        resident=load_plain(plain),
        offloaded=load_offloaded(out, store="direct", cache="20kB"),
    )


def _both(pair, ids, **inputs):
    with torch.inference_mode():
        return [logits_of(model, ids, **inputs) for model in (pair.resident, pair.offloaded)]


def _generated(pair, ids, **options):
    return [
        model.generate(ids, max_new_tokens=8, do_sample=False, **options)
        for model in (pair.resident, pair.offloaded)
    ]


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_logits_are_the_same_to_the_last_bit(pair, ids):
    assert pair.offloaded.dtype == torch.bfloat16
    assert torch.equal(*_both(pair, ids))
    assert set(table_embeddings(pair.offloaded)) == set(MODULES[pair.family])


def test_rows_matter(pair):
    """Else every other test here would show nothing."""
    with torch.no_grad():
        before = logits_of(pair.resident, FEW)
        weight = pair.resident.get_submodule(MODULES[pair.family][0]).weight
        kept = weight.clone()
        weight.mul_(-1)
        assert not torch.equal(before, logits_of(pair.resident, FEW))
        weight.copy_(kept)


@pytest.mark.parametrize("store", ["memory", "mmap", "direct"])
def test_every_store_gives_the_same(pair, store):
    model = load_offloaded(pair.out, store=store)
    with torch.inference_mode():
        assert torch.equal(logits_of(model, MANY), logits_of(pair.resident, MANY))


def test_generating_with_a_cache(pair):
    assert torch.equal(*_generated(pair, FEW))
    assert torch.equal(*_generated(pair, FEW, use_cache=False))


def test_left_padding(pair):
    ids = FEW.clone()
    ids[0, :4] = 0
    mask = (torch.arange(11) >= torch.tensor([[4], [0]])).long()
    assert torch.equal(*_both(pair, ids, attention_mask=mask))
    assert torch.equal(*_generated(pair, ids, attention_mask=mask))


def test_beam_search(pair):
    assert torch.equal(*_generated(pair, FEW, num_beams=3))


def test_assisted_decoding(pair):
    if pair.family == "qwen4_exp_text":
        pytest.skip("Qwen4Exp refuses assistants, since its cache can't be cropped.")
    found = [
        model.generate(FEW[:1], max_new_tokens=8, do_sample=False, assistant_model=pair.resident)
        for model in (pair.resident, pair.offloaded)
    ]
    assert torch.equal(*found)


def test_with_gradients(pair):
    """What is trained beside the tables gets the gradients that it would have got."""
    found = []
    for model in (pair.resident, pair.offloaded):
        model.zero_grad()
        loss = model(input_ids=FEW, labels=FEW, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), model.lm_head.weight.grad.clone()))
        model.zero_grad()
    for resident, offloaded in zip(*found, strict=True):
        assert torch.equal(resident, offloaded)


def test_auto_classes_and_saving(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair.out, store="direct").eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.inference_mode():
        assert torch.equal(logits_of(again, MANY), logits_of(pair.resident, MANY))
    assert not any("embed_tokens_per_layer" in name for name in again.state_dict())


def test_saving_over_the_folder_itself(pair, tmp_path):
    shutil.copytree(pair.out, tmp_path / "copy")
    load_offloaded(tmp_path / "copy").save_pretrained(tmp_path / "copy")
    with torch.inference_mode():
        assert torch.equal(
            logits_of(load_offloaded(tmp_path / "copy"), FEW), logits_of(pair.resident, FEW)
        )


def test_without_the_package_it_fails(pair):
    script = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(pair.out)], capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "lookup_experts" in ran.stderr


def test_layers_wait_for_their_own_part_alone(tmp_path):
    """A prompt's rows are read layer by layer, and the model gets there before they all are."""
    _, out = saved_and_offloaded("gemma4_text", tmp_path)
    model = load_offloaded(out, store="direct")
    with torch.inference_mode():
        rows = model.model.embed_tokens_per_layer(MANY)
    assert isinstance(rows, LateRows)
    assert rows.shape == (*MANY.shape, 16)
    with torch.no_grad(), torch.enable_grad():
        assert isinstance(model.model.embed_tokens_per_layer(MANY), torch.Tensor)


# ------------------------------------------------------------------- what models do with ids


def test_ids_beyond_gemma_3n_s_table_read_row_0(tmp_path):
    """As its text model does it with ids of images, whose embeddings are in another place."""
    model = embedding_model("gemma3n_text", vocab_size=VOCAB + 8)
    assert model.model.embed_tokens_per_layer.num_embeddings == VOCAB
    model.save_pretrained(tmp_path / "plain")
    le.offload(tmp_path / "plain", tmp_path / "out", notify=lambda message: None)
    ids = FEW.clone()
    ids[0, 2:5] = torch.tensor([VOCAB, VOCAB + 3, VOCAB + 7])
    resident, offloaded = load_plain(tmp_path / "plain"), load_offloaded(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(logits_of(offloaded, ids), logits_of(resident, ids))


@pytest.mark.parametrize("store", ["memory", "direct"])
def test_ids_outside_are_an_error(tmp_path, store):
    """Where transformers ends with an error too."""
    _, out = saved_and_offloaded("llama", tmp_path)
    model = load_offloaded(out, store=store)
    for wrong in (VOCAB, -1):
        with pytest.raises(TableError, match=f"id {wrong} is outside"), torch.inference_mode():
            model(torch.tensor([[3, wrong]]))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "qwen4_exp_text"])
def test_inputs_embeds(family, tmp_path):
    """Gemma 4 and Qwen4Exp find the ids by comparing with their input embeddings, which stay. In
    bfloat16 Gemma 4 finds them only where the root of its width is exact."""
    embedding_model(family, hidden_size=64).save_pretrained(tmp_path / "plain")
    le.offload(tmp_path / "plain", tmp_path / "out", notify=lambda message: None)
    resident = load_plain(tmp_path / "plain")
    offloaded = load_offloaded(tmp_path / "out", store="direct")
    with torch.inference_mode():
        embeds = resident.get_input_embeddings()(FEW)
        found = [
            model(inputs_embeds=embeds, use_cache=False).logits for model in (resident, offloaded)
        ]
        assert torch.equal(*found)
        generated = [
            model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
            for model in (resident, offloaded)
        ]
    assert torch.equal(*generated)


def test_per_layer_inputs_that_are_given(tmp_path):
    plain, out = saved_and_offloaded("gemma3n_text", tmp_path)
    found = []
    with torch.inference_mode():
        for model in (load_plain(plain), load_offloaded(out, store="direct")):
            rows = model.model.get_per_layer_inputs(FEW)
            embeds = model.get_input_embeddings()(FEW)
            found.append(model(inputs_embeds=embeds, per_layer_inputs=rows, use_cache=False).logits)
    assert torch.equal(*found)


def test_resized_before(tmp_path):
    model = embedding_model("gemma4_text")
    model.resize_token_embeddings(VOCAB + 7)
    model.save_pretrained(tmp_path / "plain")
    le.offload(tmp_path / "plain", tmp_path / "out", notify=lambda message: None)
    offloaded = load_offloaded(tmp_path / "out", store="direct")
    ids = FEW.clone()
    ids[0, 3] = VOCAB + 6
    with torch.inference_mode():
        assert torch.equal(
            logits_of(offloaded, ids), logits_of(load_plain(tmp_path / "plain"), ids)
        )
    with pytest.raises(UserError, match="can't be resized"):
        offloaded.resize_token_embeddings(VOCAB)
    assert offloaded.resize_token_embeddings() is offloaded.get_input_embeddings()


_COMPILED = [
    pytest.param(family, marks=[pytest.mark.slow] if family == "qwen4_exp_text" else [])
    for family in FAMILIES
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", _COMPILED)
def test_compiled(family, tmp_path):
    """Beside the same model compiled: what a compiler makes of the rest may round otherwise."""
    plain, out = saved_and_offloaded(family, tmp_path)
    found = []
    for model in (load_plain(plain), load_offloaded(out, store="direct")):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with torch.inference_mode():
            found.append(compiled(FEW, use_cache=False).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype, tmp_path):
    """A bfloat16 table gives the model's own dtype the numbers that its weights would have."""
    plain, out = saved_and_offloaded("gemma4_text", tmp_path)
    resident = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).eval()
    with torch.inference_mode():
        offloaded = load_offloaded(out, dtype=dtype)
        assert torch.equal(logits_of(offloaded, MANY), logits_of(resident, MANY))
        moved = [
            logits_of(model.to(getattr(torch, dtype)), MANY)
            for model in (load_plain(plain), load_offloaded(out, store="direct"))
        ]
        assert torch.equal(*moved)


def test_float32_tables_are_exact(tmp_path):
    embedding_model("llama", torch.float32).save_pretrained(tmp_path / "plain")
    le.offload(tmp_path / "plain", tmp_path / "out", MODULES["llama"], encoding="float32")
    with torch.inference_mode():
        found = [
            logits_of(model, MANY)
            for model in (load_plain(tmp_path / "plain"), load_offloaded(tmp_path / "out"))
        ]
    assert torch.equal(*found)


def test_encodings_that_round_say_so(tmp_path):
    said = []
    embedding_model("llama").save_pretrained(tmp_path / "plain")
    le.offload(tmp_path / "plain", tmp_path / "out", MODULES["llama"], "int8", notify=said.append)
    assert said == ["The rows of model.embed_tokens are bfloat16, so int8 rounds them."]
    resident = load_plain(tmp_path / "plain")
    offloaded = load_offloaded(tmp_path / "out", store="direct")
    with torch.inference_mode():
        rows = [model.get_input_embeddings()(FEW).float() for model in (resident, offloaded)]
    assert not torch.equal(*rows)
    assert (rows[0] - rows[1]).norm() < 0.02 * rows[0].norm()


def test_a_model_in_memory(tmp_path):
    model = embedding_model("gemma4_text")
    tables = le.offload(model, tmp_path / "out", notify=lambda message: None)
    assert list(tables) == list(MODULES["gemma4_text"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model.save_pretrained(tmp_path / "plain")
    with torch.inference_mode():
        assert torch.equal(
            logits_of(load_offloaded(tmp_path / "out"), FEW),
            logits_of(load_plain(tmp_path / "plain"), FEW),
        )


# ---------------------------------------------------------------------------- beside experts


def _attached(folder: Path) -> Path:
    """A Gemma with lookup experts, in training form."""
    model = embedding_model("gemma4_text", torch.float32)
    le.attach(model, num_experts=2, expert_size=8, init="normal")
    randomize_experts(model)
    model.save_pretrained(folder)
    return folder


def test_two_tables_in_one_model(tmp_path):
    """Lookup experts folded into one, and Gemma's own rows in another; in either order."""
    attached = _attached(tmp_path / "attached")
    expected = load_offloaded(attached)
    le.reparameterize(attached, tmp_path / "folded", encoding="float32")
    le.offload(tmp_path / "folded", tmp_path / "both", encoding="float32", notify=lambda m: None)
    le.offload(attached, tmp_path / "first", encoding="float32", notify=lambda m: None)
    le.reparameterize(tmp_path / "first", tmp_path / "then", encoding="float32")
    for folder in ("both", "then"):
        model = load_offloaded(tmp_path / folder, store="direct", cache="30kB")
        readers = [model.expert_source, *model.embedding_readers.values()]
        assert sum(reader.cache_bytes for reader in readers) <= 30_000
        strides = [reader.table.layout.stride for reader in readers]
        slots = [reader.cache_bytes // reader.table.layout.stride for reader in readers]
        assert strides[0] > strides[1]
        assert abs(slots[0] - slots[1]) <= 1  # as many tokens of each
        with torch.inference_mode():
            for ids in (FEW, MANY):
                torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids))
        model.save_pretrained(tmp_path / f"{folder}-saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{folder}-saved").eval()
        with torch.inference_mode():
            torch.testing.assert_close(logits_of(again, FEW), logits_of(expected, FEW))
        assert verify_folder(tmp_path / folder).problems == ()
        described = inspect_folder(tmp_path / folder)
        assert described["form"] == "table"
        assert list(described["embeddings"]) == list(MODULES["gemma4_text"])


def test_attaching_beside_a_table(tmp_path):
    """Experts are trained on a model whose own rows lie on disk."""
    plain, out = saved_and_offloaded("gemma4_text", tmp_path)
    model = load_offloaded(out, store="direct")
    le.attach(model, num_experts=2, expert_size=8)
    with torch.inference_mode():
        assert torch.equal(logits_of(model, FEW), logits_of(load_plain(plain), FEW))
    loss = model.train()(input_ids=FEW, labels=FEW, use_cache=False).loss
    loss.backward()
    assert any(weight.grad is not None for weight in model.lookup_blocks[0].parameters())
    model.eval().save_pretrained(tmp_path / "trained")
    again = load_offloaded(tmp_path / "trained")
    with torch.inference_mode():
        assert torch.equal(logits_of(again, FEW), logits_of(model, FEW))
    pickled = pickle.loads(pickle.dumps(again))
    with torch.inference_mode():
        assert torch.equal(logits_of(pickled, FEW), logits_of(model, FEW))
        assert torch.equal(logits_of(copy.deepcopy(again), FEW), logits_of(model, FEW))


# ------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    embedding_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "Name the module: its embeddings are model.embed_tokens"),
        (["model.norm"], "model.norm is a LlamaRMSNorm; only embeddings"),
        (["model.embed"], r"no module 'model.embed'. Its embeddings: model.embed_tokens"),
    ],
)
def test_modules_that_are_none(llama, tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        le.offload(llama, tmp_path / "out", names)
    assert not any(tmp_path.iterdir())


def test_tied_weights_are_refused(tmp_path):
    embedding_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match=r"is that of lm_head too \(tied\).* would save nothing"):
        le.offload(tmp_path / "tied", tmp_path / "out", MODULES["llama"])


@pytest.mark.parametrize("family", ["gemma4_text", "qwen4_exp_text"])
def test_input_embeddings_that_ids_are_found_by(family, tmp_path):
    embedding_model(family, tie_word_embeddings=False).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"compares with every row of model.embed_tokens"):
        le.offload(tmp_path / "plain", tmp_path / "out", ["model.embed_tokens"])


def test_a_checkpoint_without_the_tensor(llama, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(llama, folder)
    state = load_file(folder / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor for the weight of model.embed_tokens"):
        le.offload(folder, tmp_path / "out", MODULES["llama"])


def test_a_checkpoint_of_another_size(llama, tmp_path):
    folder = tmp_path / "larger"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))
    with pytest.raises(UserError, match=r"is 97 x 32 in the checkpoint, and 98 x 32 by config"):
        le.offload(folder, tmp_path / "out", MODULES["llama"])


@pytest.mark.parametrize("kept", [20, 3_000])
def test_a_truncated_checkpoint(llama, tmp_path, kept):
    folder = tmp_path / "cut"
    shutil.copytree(llama, folder)
    whole = (llama / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(UserError, match=r"can't be read as safetensors|is incomplete"):
        le.offload(folder, tmp_path / "out", MODULES["llama"])


def test_a_table_of_another_model(tmp_path):
    _, out = saved_and_offloaded("gemma4_text", tmp_path)
    embedding_model("gemma4_text", initializer_range=0.2).save_pretrained(tmp_path / "other")
    le.offload(tmp_path / "other", tmp_path / "others", notify=lambda message: None)
    shutil.rmtree(out / "embeddings")
    shutil.copytree(tmp_path / "others" / "embeddings", out / "embeddings")
    with pytest.raises(TableError, match="is the table of another model"):
        load_offloaded(out)
    with pytest.raises(TableError, match="is the table of another model"):
        inspect_folder(out)
    assert "another model" in str(verify_folder(out).problems)
    shutil.rmtree(out / "embeddings")
    with pytest.raises(TableError, match="no such folder"):
        load_offloaded(out)


def test_a_damaged_record(tmp_path):
    _, out = saved_and_offloaded("gemma4_text", tmp_path)
    shard = next((out / "embeddings").rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[4096 + 5 * 32] ^= 1
    shard.write_bytes(content)
    assert "1 of 97 records are damaged" in str(verify_folder(out).problems)
    model = load_offloaded(out, store="direct", verify_checksums=True)
    with pytest.raises(TableError, match="record of id 5 is damaged"), torch.inference_mode():
        model(torch.tensor([[4, 5]]))


@pytest.mark.parametrize("settings", [[], {"model..x": {}}, {"model.embed_tokens": {"layers": 0}}])
def test_a_configuration_that_makes_no_sense(tmp_path, settings):
    _, out = saved_and_offloaded("llama", tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["offloaded_embeddings"] = settings
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="configuration"):
        load_offloaded(out)


# --------------------------------------------------------- interruption, memory, other files


def test_an_interrupted_run_goes_on(tmp_path):
    plain, expected = saved_and_offloaded("qwen4_exp_text", tmp_path)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 6:  # after the first table
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        le.offload(plain, tmp_path / "out", progress=stop, notify=lambda message: None)
    assert not (tmp_path / "out").exists()
    said = []
    le.offload(plain, tmp_path / "out", notify=said.append)
    assert any("Going on with the interrupted run" in message for message in said)
    for file in sorted(expected.rglob("*")):
        if file.is_file():
            other = tmp_path / "out" / file.relative_to(expected)
            assert file.read_bytes() == other.read_bytes(), file


def _offload_slowly(plain: Path, out: Path) -> None:
    le.offload(plain, out, progress=lambda done, total: time.sleep(0.005), notify=lambda m: None)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """SIGKILL at random moments, several times in a row; a process of its own each time."""
    monkeypatch.setattr(build, "MAX_CHUNK_IDS", 7)
    plain, expected = saved_and_offloaded("qwen4_exp_text", tmp_path)
    chosen, fork = random.Random(1), multiprocessing.get_context("fork")
    out, kills = tmp_path / "out", 0
    while not out.exists() and kills < 5:
        process = fork.Process(target=_offload_slowly, args=(plain, out))
        process.start()
        process.join(chosen.uniform(0.2, 0.6))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills
    if not out.exists():
        le.offload(plain, out, notify=lambda message: None)
    for file in sorted(expected.rglob("*")):
        if file.is_file():
            assert file.read_bytes() == (out / file.relative_to(expected)).read_bytes(), file


def test_a_disk_that_is_full_is_an_error_in_one_line(llama, tmp_path, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_copy_bytes", no_space)
        with pytest.raises(DiskFullError, match="no space left"):
            le.offload(llama, tmp_path / "out", MODULES["llama"])
    free = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patched:
        patched.setattr(build.shutil, "disk_usage", lambda folder: free)
        with pytest.raises(DiskFullError, match=r"needs .* more in"):
            le.offload(llama, tmp_path / "other", MODULES["llama"])
    le.offload(llama, tmp_path / "out", MODULES["llama"])
    assert not verify_folder(tmp_path / "out").problems


def test_somebodys_folder_is_left_alone(llama, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    with pytest.raises(UserError, match="in the way and no interrupted run"):
        le.offload(llama, tmp_path / "out", MODULES["llama"])
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        le.offload(llama, tmp_path / "there", MODULES["llama"])


def test_shards_without_the_embedding_are_linked(tmp_path):
    embedding_model("llama").save_pretrained(tmp_path / "plain", max_shard_size="8kB")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    le.offload(tmp_path / "plain", tmp_path / "out", MODULES["llama"])
    linked = {
        file.name
        for file in (tmp_path / "out").glob("*.safetensors")
        if file.samefile(tmp_path / "plain" / file.name)
    }
    all_files = {file.name for file in (tmp_path / "plain").glob("*.safetensors")}
    assert len(all_files) > 2
    assert len(all_files - linked) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.embed_tokens.weight" not in index["weight_map"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with torch.inference_mode():
        assert torch.equal(
            logits_of(load_offloaded(tmp_path / "out"), FEW),
            logits_of(load_plain(tmp_path / "plain"), FEW),
        )


_PEAK = """
import sys
from pathlib import Path
import lookup_experts as le
from lookup_experts.benchmarks.processes import high_water_mark, reset_high_water_mark
from lookup_experts.generation.offload import offload
before = reset_high_water_mark()
offload(sys.argv[1], sys.argv[2], ["model.embed_tokens"], notify=print)
print(high_water_mark() - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_embedding_is_never_whole_in_memory(tmp_path):
    """600 MB of rows, and one file with everything else in it."""
    config = tiny_config("llama", tie_word_embeddings=False, vocab_size=300_000, hidden_size=1024)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {
        name: torch.zeros(value.shape, dtype=value.dtype)
        for name, value in model.state_dict().items()
    }
    (tmp_path / "plain").mkdir()
    save_file(state, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    del state
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "plain")
    ran = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "plain"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout.split()[-1]) < 512 * 2**20


# ------------------------------------------------------------------------------ the commands


def test_the_commands_take_it(tmp_path, capsys):
    def run(*arguments: object) -> tuple[str, str]:
        code, out, err = run_command(capsys, *arguments)
        assert code == 0, err
        return out, err

    plain, folder = saved_and_offloaded("gemma3n_text", tmp_path)
    told, _ = run("offload", plain, tmp_path / "made", "--encoding", "int8", "--json")
    said = json.loads(told)
    assert said["embeddings"]["model.embed_tokens_per_layer"]["records"] == VOCAB
    prompt = ("--prompt-ids", "4 5 6", "-n", "6")
    expected, _ = run("generate", plain, *prompt)
    reading = ("--store", "direct", "--cache", "10kB", "--stats")
    generated, stats = run("generate", folder, *prompt, *reading)
    assert generated == expected
    assert "8 ids asked" in stats
    assert "model.embed_tokens_per_layer: 97 records" in run("inspect", folder)[0]
    assert "all 97 records are intact" in run("verify", folder)[0]
    assert "nf4" in run("reencode", folder, tmp_path / "smaller", "--encoding", "nf4")[0]
    assert inspect_folder(tmp_path / "smaller")["embeddings"]["model.embed_tokens_per_layer"]
    run("generate", tmp_path / "smaller", *prompt)
    code, _, err = run_command(capsys, "offload", plain, tmp_path / "x", "--module", "lm_head")
    assert code == 2
    assert len(err.splitlines()) == 1


IMAGE = 96
_VISION = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}


def _gemma_4_with_images():
    steps = torch.arange(4)
    places = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(1, 16, 2)
    vision = {
        "model_type": "gemma4_vision",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    config = AutoConfig.for_model(
        "gemma4",
        text_config=tiny_config("gemma4_text", **FAMILIES["gemma4_text"]).to_dict(),
        vision_config={**_VISION, **vision},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=95,
        audio_token_id=94,
        boi_token_id=93,
        eoi_token_id=92,
    )
    image = {
        "pixel_values": torch.randn(2, 16, 48).to(torch.bfloat16),
        "image_position_ids": places.expand(2, -1, -1),
    }
    return config, image


def _qwen4_exp_with_images():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = tiny_config("qwen4_exp_text", **FAMILIES["qwen4_exp_text"], rope_parameters=rope)
    vision = {
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 8,
        "num_position_embeddings": 16,
    }
    config = AutoConfig.for_model(
        "qwen4_exp",
        text_config=text.to_dict(),
        vision_config={**_VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
    )
    image = {
        "pixel_values": torch.randn(32, 3 * 2 * 8 * 8).to(torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }
    return config, image


@pytest.mark.parametrize("made", [_gemma_4_with_images, _qwen4_exp_with_images])
def test_images(made, tmp_path):
    """Where an image stands, Gemma 4 reads the row of the padding id, and Qwen4Exp hashes ids."""
    torch.manual_seed(0)
    config, image = made()
    model = AutoModelForImageTextToText.from_config(config)
    randomize_zeros(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    le.offload(tmp_path / "plain", tmp_path / "out", notify=lambda message: None)
    models = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").eval(),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", store="direct").eval(),
        load_offloaded(tmp_path / "out", store="direct"),
    ]
    assert all(name.startswith("model.language_model.") for name in table_embeddings(models[1]))
    ids = token_ids(2, 11, vocab_size=90)
    ids[:, 2:6] = IMAGE
    image["mm_token_type_ids"] = (ids == IMAGE).int()
    with torch.inference_mode():
        first, *others = [logits_of(model, ids, **image) for model in models]
        assert all(torch.equal(first, other) for other in others)
    first, *others = [
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **image)
        for model in models
    ]
    assert all(torch.equal(first, other) for other in others)


def test_a_model_that_needs_another_package(tmp_path):
    """Gemma 3n's part for images is timm's."""
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed.")
    text = tiny_config("gemma3n_text", **FAMILIES["gemma3n_text"]).to_dict()
    config = AutoConfig.for_model("gemma3n", text_config=text)
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="its model can't be made here"):
        le.offload(tmp_path / "plain", tmp_path / "out")
