"""Linear layers of loaded models: which kinds, what they give, what may be done with them."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import gateless_model, greedy_reference, logits_of, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.model.fast_linears import (
    CONVERTED_FROM,
    EIGHT_BITS_UP_TO,
    SMALLEST,
    ConvertingLinear,
    Int8Linear,
    PackedLinear,
    describe_linears,
    kind_for,
    make_fast,
    turn_into,
)

LARGE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}
"""Of models whose linear layers are large enough to be packed, keys and values aside."""
IDS = torch.arange(3, 33).view(2, 15)
without_avx512 = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

pytestmark = pytest.mark.skipif(
    kind_for(torch.empty(SMALLEST)) is None, reason="this processor's products are torch's own"
)
needs_bfloat16 = pytest.mark.skipif(
    kind_for(torch.empty(SMALLEST, dtype=torch.bfloat16)) is not PackedLinear,
    reason="this processor has no products in bfloat16",
)


ignore_deprecation = pytest.mark.filterwarnings("ignore:.*is deprecated and will:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense Llama in float32. Don't change it."""
    path = tmp_path_factory.mktemp("large") / "dense"
    tiny_model("llama", **LARGE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory) -> Path:
    """The same with one weight for embedding and head. Don't change it."""
    path = tmp_path_factory.mktemp("large") / "tied"
    tiny_model("llama", **LARGE, tie_word_embeddings=True).save_pretrained(path)
    return path


def linears(model) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def large_linears(model) -> list[nn.Linear]:
    return [module for module in linears(model) if module.weight.numel() >= SMALLEST]


# ---------------------------------------------------------------------------------- what they give


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@pytest.mark.parametrize("length", [1, 7])
def test_packed_models_give_what_plain_ones_give(folder, dtype, length):
    packed, plain = (le.load(folder, dtype=dtype, weights=kind) for kind in ("auto", "plain"))
    assert {type(module) for module in large_linears(packed)} == {PackedLinear}
    assert {type(module) for module in linears(plain)} == {nn.Linear}
    found, expected = logits_of(packed, IDS[:, :length]), logits_of(plain, IDS[:, :length])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(found, expected, **tolerance)


def test_models_with_lookup_experts_are_packed_in_both_forms(tmp_path):
    model = le.attach(gateless_model(**LARGE), num_experts=2, expert_size=64, init="normal")
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "experts")
    le.reparameterize(tmp_path / "experts", tmp_path / "table", encoding="float32")
    for loaded in (le.load(tmp_path / "experts"), le.load(tmp_path / "table", store="direct")):
        assert any(isinstance(module, PackedLinear) for module in loaded.modules())
        torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=1e-4, atol=1e-4)
        assert greedy_reference(loaded, IDS[:1, :4], 6).shape == (1, 6)


@needs_bfloat16
@pytest.mark.parametrize("options", [{"num_experts": 2}, {"form": "meki", "row_size": 256}])
def test_what_reads_rows_is_packed_and_not_rounded(tmp_path, options):
    model = gateless_model(**LARGE).to(torch.bfloat16)
    le.attach(model, **options, expert_size=64, init="normal")
    le.reparameterize(model.eval(), tmp_path / "table", encoding="bfloat16")
    plain, packed, rounded = (
        le.load(tmp_path / "table", store="direct", weights=kind)
        for kind in ("plain", "auto", "int8")
    )
    for fast, tolerance in ((packed, 0.02), (rounded, 0.1)):
        added = [module for block in fast.lookup_blocks for module in block.modules()]
        kinds = {type(module) for module in added if isinstance(module, nn.Linear)}
        assert kinds == {PackedLinear}
        for length in (1, 15):  # a single row goes another way
            found, expected = (logits_of(each, IDS[:1, :length]).float() for each in (fast, plain))
            assert (found - expected).norm() / expected.norm() < tolerance
    found, expected = packed.state_dict(), plain.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, CONVERTED_FROM - 1, CONVERTED_FROM, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_converting_rounds_no_more_than_the_dtype_does(dtype, rows, bias):
    torch.manual_seed(0)
    # Several blocks, the last one smaller.
    plain = nn.Linear(768, 1500, bias=bias).to(dtype).eval()
    states = torch.randn(2, rows, 768).to(dtype)[:1]
    exact = nn.functional.linear(
        states.double(), plain.weight.double(), plain.bias.double() if bias else None
    )
    turn_into(ConvertingLinear, plain)
    found = plain(states)
    assert found.dtype == dtype
    assert found.shape == (1, rows, 1500)
    torch.testing.assert_close(
        found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_8_bits_stay_close_and_a_row_is_the_same_alone_and_among_many(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(256, 640).to(dtype).eval()
    layer.weight[5] = 0  # an output without a scale
    states = torch.randn(EIGHT_BITS_UP_TO + 9, 256).to(dtype)
    expected = layer(states).float()
    turn_into(Int8Linear, layer)
    many = layer(states).float()
    assert (many - expected).norm() / expected.norm() < 0.01
    one_by_one = torch.cat([layer(states[row, None]).float() for row in range(len(states))])
    torch.testing.assert_close(one_by_one, many, rtol=2e-2, atol=2e-2)
    few = layer(states[:EIGHT_BITS_UP_TO]).float()
    torch.testing.assert_close(few, many[:EIGHT_BITS_UP_TO], rtol=2e-2, atol=2e-2)
    assert layer(states[:0]).shape == (0, 640)
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_gradients_go_through_as_through_the_plain_weight(folder, weights):
    model = le.load(folder, weights=weights)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    reference = le.load(folder, weights="plain")
    same = embedded.detach().clone().requires_grad_()
    reference(inputs_embeds=same).logits.square().mean().backward()
    error = (embedded.grad - same.grad).norm() / same.grad.norm()
    assert error < (1e-5 if weights == "auto" else 0.1)


def test_a_compiled_graph_holds_them(folder):
    model = le.load(folder)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ which are replaced


def test_small_hooked_and_shared_layers_stay():
    model = tiny_model("llama", **LARGE)
    first, second = model.model.layers
    first.mlp.up_proj.register_forward_hook(lambda module, args, output: output)
    second.mlp.up_proj.weight = second.mlp.gate_proj.weight
    make_fast(model)
    for stays in (first.mlp.up_proj, second.mlp.up_proj, second.mlp.gate_proj):
        assert type(stays) is nn.Linear
    assert type(first.self_attn.k_proj) is nn.Linear  # small
    assert type(first.mlp.gate_proj) is PackedLinear


@ignore_deprecation
def test_what_an_adapter_wraps_stays():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", **LARGE)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))
    make_fast(adapted.get_base_model())
    assert type(model.model.layers[0].mlp.up_proj.base_layer) is nn.Linear
    assert type(model.model.layers[0].mlp.gate_proj) is PackedLinear


@ignore_deprecation
def test_an_adapter_on_a_packed_model_gives_what_it_gives_on_a_plain_one(folder, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(le.load(folder, weights="plain"), settings).save_pretrained(tmp_path)
    found, expected = (
        logits_of(peft.PeftModel.from_pretrained(le.load(folder, weights=kind), tmp_path), IDS)
        for kind in ("auto", "plain")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


MEMORY = """
from pathlib import Path
from torch import nn
from lookup_experts.model.fast_linears import PackedLinear, turn_into

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

turn_into(PackedLinear, nn.Linear(512, 512))  # what oneDNN itself takes
layer = nn.Linear(4096, 4096, bias=False)
before = anonymous_bytes()
turn_into(PackedLinear, layer)
print(anonymous_bytes() - before)
"""


def test_the_plain_weight_goes():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**24  # a second one takes 2**26


def test_experts_are_attached_to_a_packed_backbone_and_saved_alone(folder, tmp_path):
    model = le.attach(
        le.load(folder), 2, expert_size=64, init="normal", train_backbone=False, save="experts"
    )
    expected = logits_of(model.eval(), IDS)
    model.save_pretrained(tmp_path / "experts")
    torch.testing.assert_close(logits_of(le.load(tmp_path / "experts"), IDS), expected)
    with torch.no_grad():
        weight = model.train().model.layers[0].mlp.up_proj.weight
        weight.add_(1)
    with pytest.raises(UserError, match="no longer"):
        model.save_pretrained(tmp_path / "again")
    assert type(weight) is nn.Parameter


# ----------------------------------------------------------------------------- what is done to them


@pytest.mark.parametrize("name", ["folder", "tied_folder"])
def test_saving_writes_the_plain_weights(request, tmp_path, name):
    folder = request.getfixturevalue(name)
    model = le.load(folder)
    model.save_pretrained(tmp_path / "again")
    assert any(isinstance(module, PackedLinear) for module in model.modules())  # as it was
    found, expected = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "again", folder)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "again", folder)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["folder", "tied_folder"])
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_copies_and_pickles_give_the_same(request, name, weights):
    model = le.load(request.getfixturevalue(name), weights=weights)
    expected = logits_of(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert describe_linears(other) == describe_linears(model)
        assert torch.equal(logits_of(other, IDS), expected)


def test_training_sees_plain_weights_also_through_an_optimizer_made_before(folder):
    model = le.load(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.train()
    assert {type(module) for module in linears(model)} == {nn.Linear}
    assert model.model.layers[0].mlp.up_proj.weight is weight
    before = weight.detach().clone()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_another_dtype_and_loaded_values_arrive(folder):
    model, plain = le.load(folder), le.load(folder, weights="plain")
    model.double()
    assert {type(module) for module in linears(model)} == {nn.Linear}
    torch.testing.assert_close(logits_of(model, IDS).float(), logits_of(plain, IDS))
    model = le.load(folder)
    model.load_state_dict({key: 0.5 * value for key, value in plain.state_dict().items()})
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    plain.load_state_dict({key: 0.5 * value for key, value in plain.state_dict().items()})
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain, IDS), rtol=1e-4, atol=1e-5)


def test_a_head_that_is_the_embedding_too_follows_it(tied_folder):
    model, plain = (le.load(tied_folder, weights=kind) for kind in ("auto", "plain"))
    assert type(model.lm_head) is PackedLinear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for each in (model, plain):
        with torch.no_grad():
            each.get_input_embeddings().weight.mul_(0.5)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain, IDS), rtol=1e-4, atol=1e-5)
    for each in (model, plain):
        torch.manual_seed(0)
        each.resize_token_embeddings(600, mean_resizing=False)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain, IDS), rtol=1e-4, atol=1e-5)


def test_8_bits_are_not_saved_trained_or_moved(folder, tmp_path):
    model = le.load(folder, weights="int8")
    assert "int8" in describe_linears(model)
    for change in (
        lambda: model.save_pretrained(tmp_path / "out"),
        model.state_dict,
        model.train,
        model.half,
        lambda: model.load_state_dict({}),
    ):
        with pytest.raises(UserError, match="weights='plain'"):
            change()


# ---------------------------------------------------------------------------------------- bad input


def test_bad_weights_are_refused_in_a_sentence(folder):
    with pytest.raises(UserError, match=r"weights.*'int4'.*auto"):
        le.load(folder, weights="int4")
    with pytest.raises(UserError, match="on the CPU"):
        le.load(folder, weights="int8", device="cuda")


def test_8_bits_of_a_quantised_model_are_refused(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(
        tmp_path
    )
    kinds = {type(block.mlp.up_proj).__name__ for block in le.load(tmp_path).model.layers}
    assert kinds == {"Linear4bit"}
    with pytest.raises(UserError, match="quantised already"):
        le.load(tmp_path, weights="int8")


WITHOUT_AVX512 = """
import sys, torch, lookup_experts as le
from lookup_experts.model.fast_linears import describe_linears

said = []
model = le.load(sys.argv[1], dtype=sys.argv[2], notify=said.append)
plain = le.load(sys.argv[1], dtype=sys.argv[2], weights="plain")
ids = torch.arange(3, 33).view(2, 15)
with torch.inference_mode():
    for length in (1, 15):
        found, expected = (each(ids[:, :length]).logits.float() for each in (model, plain))
        assert ((found - expected).norm() / expected.norm()) < 0.02, (found, expected)
print(describe_linears(model))
print(*said)
eight = le.load(sys.argv[1], dtype=sys.argv[2], weights="int8")
with torch.inference_mode():
    error = (eight(ids.repeat(2, 1)).logits.float()[:2] - expected).norm() / expected.norm()
assert error < 0.05, error
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_processor_without_avx512(folder, dtype):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AVX512, str(folder), dtype],
        env=without_avx512,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kinds, said = done.stdout.splitlines()[:2]
    if dtype == "float32":
        assert "packed (float32)" in kinds
        assert said == ""
    else:
        assert f"{dtype}, converted to float32 from {CONVERTED_FROM} rows on" in kinds
        assert f"doesn't multiply in {dtype}" in said
