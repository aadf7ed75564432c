"""What vLLM can't do with a folder of ours it says in a sentence, before it starts anything."""

import shutil

import pytest
from embedding_models import saved_and_offloaded
from random_tables import edit_json
from tiny_models import attached_model, tiny_model

import lookup_experts as le

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
import vllm
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from lookup_experts.vllm_plugin import checks

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    attached_model().save_pretrained(root / "training")
    le.reparameterize(root / "training", root / "table")
    return root / "table"


@pytest.fixture
def own_folder(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "own")


def configure(folder, **options):
    """What `vllm serve` does first."""
    common = {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "float32"}
    return EngineArgs(model=str(folder), **{**common, **options}).create_engine_config()


def test_a_sound_folder_is_taken(folder):
    """As the model that its backbone is to vLLM."""
    config = configure(folder)
    assert type(config.model_config.hf_config).__name__ == "LlamaConfig"
    assert config.model_config.architectures == ["LookupExpertsLlamaForCausalLM"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enable_lora": True}, r"can't have adapters \(LoRA\)"),
        ({"enable_prompt_embeds": True}, "can't have prompts of embeddings"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, "can't have a quantised backbone"),
        ({"additional_config": {"lookup_experts": {"cash": "1GB"}}}, "Did you mean 'cache'"),
        ({"additional_config": {"lookup_experts": {"store": "tape"}}}, "Unknown store 'tape'"),
    ],
)
def test_a_way_of_running_is_refused(folder, options, said):
    with pytest.raises(ValueError, match=said):
        configure(folder, **options)


def test_experts_that_are_computed_stay_in_one_process(folder):
    with pytest.raises(ValueError, match=r"can't have its blocks in several .* \(pipeline"):
        configure(folder.parent / "training", pipeline_parallel_size=2)


def test_embeddings_in_tables_are_refused(tmp_path):
    _, offloaded = saved_and_offloaded("llama", tmp_path)
    with pytest.raises(ValueError, match="has embeddings in tables"):
        configure(offloaded)


def test_a_missing_table_is_refused(own_folder):
    shutil.rmtree(own_folder / "table")
    with pytest.raises(ValueError, match=r"/table: no such folder"):
        configure(own_folder)


def test_a_truncated_table_is_refused(own_folder):
    shard = next((own_folder / "table").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(ValueError, match="truncated"):
        configure(own_folder)


def test_a_table_of_another_model_is_refused(own_folder):
    def lie(config):
        config["lookup_experts"]["fingerprint"] = "0" * 64

    edit_json(own_folder / "config.json", lie)
    with pytest.raises(ValueError, match="the table of another model"):
        configure(own_folder)


def test_an_untested_backbone_is_refused(tmp_path):
    attached_model("granite").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="can't run a GraniteForCausalLM with lookup experts"):
        configure(tmp_path)


def test_an_untested_vllm_is_refused(folder, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(ValueError, match=r"tested with vLLM 0\.32, and this is vLLM 0\.33\.1"):
        configure(folder)


def test_the_transformers_backend_is_refused(folder):
    """It would leave the experts out."""
    with pytest.raises(ValueError, match="LookupExpertsLlamaForCausalLM"):
        configure(folder, model_impl="transformers")


def test_models_without_experts_are_none_of_our_business(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(checks, "refuse_or_adapt", None)
    assert configure(tmp_path, enable_prompt_embeds=True).model_config.architectures == [
        "LlamaForCausalLM"
    ]


@pytest.mark.parametrize("asked_for", [None, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_on_a_gpu_no_graph_holds_the_experts(monkeypatch, asked_for):
    """They are computed between graphs, as attention is."""
    monkeypatch.setattr(checks.current_platform, "is_cpu", lambda: False)
    compilation = CompilationConfig(cudagraph_mode=asked_for)
    checks._let_graphs_be_split(compilation)
    assert compilation.cudagraph_mode is CUDAGraphMode.PIECEWISE
    assert {"lookup_experts::mix_rows_of_step", "vllm::unified_attention_with_output"} <= set(
        compilation.splitting_ops
    )


def test_on_a_gpu_who_wants_no_graphs_gets_none(monkeypatch):
    monkeypatch.setattr(checks.current_platform, "is_cpu", lambda: False)
    compilation = CompilationConfig(
        cudagraph_mode=CUDAGraphMode.NONE, splitting_ops=["vllm::some_op"]
    )
    checks._let_graphs_be_split(compilation)
    assert compilation.cudagraph_mode is CUDAGraphMode.NONE
    assert compilation.splitting_ops == ["vllm::some_op", "lookup_experts::mix_rows_of_step"]
