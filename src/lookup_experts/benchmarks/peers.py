"""What people would run instead, on the same dense shape: llama.cpp and vLLM, where their own
programs for measuring are on the path, and transformers' `generate`.

Each of the first two gets a model of random weights whose matrices are those of ours: llama.cpp a
GGUF file of the architecture `arcee`, vLLM the configuration of a `nemotron`, which are Llamas
without a gate in the FFN; for a shape with one, both get a Llama.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lookup_experts.benchmarks.models import Case, dense_model
from lookup_experts.benchmarks.results import Result
from lookup_experts.benchmarks.timing import median
from lookup_experts.benchmarks.vllm_server import VLLM_ENVIRONMENT, vllm_python
from lookup_experts.errors import UserError

ROUNDS = 5
"""Of each measurement, by the peer itself."""
GENERATED_ROUNDS = 3
"""Of transformers' `generate`, after one that doesn't count."""
_VLLM_LATENCY = (
    "from vllm.benchmarks.latency import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
"""What `vllm bench latency` does; see `vllm_python`."""
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Peer(Protocol):
    """Another engine with a dense model."""

    name: str

    def decode(self, batch: int, context: int, steps: int) -> Result | None:
        """`tokens_per_second` of steps after a context; None: it has no such batches."""
        ...

    def prefill(self, tokens: int) -> Result:
        """`tokens_per_second` of a prompt."""
        ...


class Generating(Protocol):
    """What generates with a dense model, without a server."""

    name: str

    def generate(self, batch: int, prompt: int, tokens: int) -> Result | None:
        """`tokens_per_second` of new tokens after prompts, whose time counts; None: it has no such
        batches."""
        ...


def find_generating(case: Case, work: Path) -> list[Generating]:
    """transformers' `generate`, and llama.cpp where it is on the path."""
    llama_bench = shutil.which("llama-bench")
    found: list[Generating] = [Transformers(case)]
    if llama_bench:
        found.append(LlamaBench(llama_bench, write_gguf(case, work / "peers")))
    return found


def measured_generating(
    peers: Sequence[Generating], batches: Sequence[int], prompt: int, tokens: int
) -> list[Result]:
    """What each has at each batch; see `Generating`."""
    return [
        found | {"system": peer.name, "streams": batch}
        for batch in batches
        for peer in peers
        if (found := peer.generate(batch, prompt, tokens))
    ]


def find_peers(case: Case, device: str, work: Path) -> list[Peer]:
    """The peers on the path, each with its model in `work`.

    Raises:
        UserError: there are none, or the device isn't the CPU.
    """
    if torch.device(device).type != "cpu":
        raise UserError(f"--peers compares on the CPU; leave it or --device {device} out.")
    llama_bench = shutil.which("llama-bench")
    found: list[Peer] = []
    if llama_bench:
        found.append(LlamaBench(llama_bench, write_gguf(case, work / "peers")))
    if shutil.which("vllm"):
        found.append(VllmBench(write_configuration(case, work / "peers"), case.dtype_name))
    if not found:
        raise UserError(
            "--peers needs llama-bench (llama.cpp) or vllm on the path, and neither is there."
        )
    return found


def measured_peers(
    peers: Sequence[Peer], case: Case, batch: int | None = None, tokens: int | None = None
) -> list[Result]:
    """What each peer has at a batch of steps, or at a prompt's length; see `Peer`."""
    results = []
    for peer in peers:
        if tokens is not None:
            found: Result | None = peer.prefill(tokens) | {"what": "prefill", "tokens": tokens}
        else:
            assert batch is not None
            found = peer.decode(batch, context=64, steps=64)
            found = found and found | {"what": "decode", "batch": batch}
        if found:
            results.append(found | {"system": peer.name, "dtype": case.dtype_name})
    return results


# --------------------------------------------------------------------------------- transformers


class Transformers:
    """transformers' own `generate`, with linear layers as torch has them."""

    name = "transformers"

    def __init__(self, case: Case) -> None:
        self._model = dense_model(case)

    def generate(self, batch: int, prompt: int, tokens: int) -> Result:
        """See `Generating`."""
        ids = torch.randint(1, self._model.config.vocab_size, (batch, prompt))
        seconds = []
        for _ in range(1 + GENERATED_ROUNDS):
            started_at = time.perf_counter()
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            seconds.append(time.perf_counter() - started_at)
        return {"tokens_per_second": batch * tokens / median(seconds[1:])}


# ------------------------------------------------------------------------------------ llama.cpp


class LlamaBench:
    """llama.cpp by its `llama-bench`, which decodes one sequence."""

    name = "llama.cpp"

    def __init__(self, command: str, model: Path) -> None:
        self._command, self._model = command, model

    def decode(self, batch: int, context: int, steps: int) -> Result | None:
        """See `Peer`."""
        return self._run("-p", 0, "-n", steps, "-d", context) if batch == 1 else None

    def prefill(self, tokens: int) -> Result:
        """See `Peer`."""
        return self._run("-p", tokens, "-n", 0, "-b", tokens, "-ub", tokens)

    def generate(self, batch: int, prompt: int, tokens: int) -> Result | None:
        """See `Generating`."""
        if batch != 1:
            return None
        both = self._run("-p", 0, "-n", 0, "-pg", f"{prompt},{tokens}")
        speed = both["tokens_per_second"] * tokens / (prompt + tokens)
        return both | {"tokens_per_second": speed}

    def _run(self, *words: object) -> Result:
        threads = len(os.sched_getaffinity(0))
        common = ("-m", self._model, "-t", threads, "-r", ROUNDS, "-o", "json")
        (found,) = json.loads(_output_of([self._command, *common, *words]))
        return {"tokens_per_second": found["avg_ts"], "version": found["build_commit"]}


def write_gguf(case: Case, folder: Path) -> Path:
    """The dense model as a GGUF file without a vocabulary; made if it isn't there."""
    path = folder / f"{case.shape}-{case.dtype_name}.gguf"
    if path.exists():
        return path
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ModuleNotFoundError as error:
        raise UserError("--peers writes a file for llama.cpp: pip install gguf.") from error
    folder.mkdir(parents=True, exist_ok=True)
    model = dense_model(case)
    config = model.config
    temporary = path.with_name(f"{path.name}.tmp")
    writer = GGUFWriter(temporary, "llama" if _has_gate(config) else "arcee")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, weight in model.named_parameters():
        values = weight.detach()
        if values.dim() == 2 and values.dtype == torch.bfloat16:
            codes = values.view(torch.uint8).numpy()
            writer.add_tensor(_gguf_name(name), codes, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(_gguf_name(name), values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)
    return path


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`"""
    place = name.removesuffix(".weight")
    if not place.startswith("model.layers."):
        return f"{_GGUF_NAMES[place]}.weight"
    number, _, module = place.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_GGUF_NAMES[module]}.weight"


# ----------------------------------------------------------------------------------------- vLLM


class VllmBench:
    """vLLM by its `vllm bench latency`, which times prompt and steps together."""

    name = "vllm"

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder, self._dtype = folder, dtype

    def decode(self, batch: int, context: int, steps: int) -> Result | None:
        """See `Peer`; the prompt's time and the first token's, measured apart, are taken off."""
        seconds = self._seconds(batch, context, steps + 1) - self._seconds(batch, context, 1)
        return {"tokens_per_second": batch * steps / seconds}

    def prefill(self, tokens: int) -> Result:
        """See `Peer`."""
        return {"tokens_per_second": tokens / self._seconds(1, tokens, 1)}

    def _seconds(self, batch: int, prompt: int, output: int) -> float:
        out = self._folder / "latency.json"
        sizes = {
            "--batch-size": batch,
            "--input-len": prompt,
            "--output-len": output,
            "--num-iters": ROUNDS,
            "--num-iters-warmup": 1,
            "--max-model-len": prompt + output,
            "--dtype": self._dtype,
            "--load-format": "dummy",
            "--output-json": out,
        }
        words = [word for option in sizes.items() for word in option]
        flags = ("--skip-tokenizer-init", "--disable-detokenize")
        command = [vllm_python(), "-c", _VLLM_LATENCY, "--model", self._folder, *words, *flags]
        _output_of(command, VLLM_ENVIRONMENT | os.environ)
        seconds: float = json.loads(out.read_text())["avg_latency"]
        return seconds


def write_configuration(case: Case, folder: Path) -> Path:
    """A folder with the `config.json` of the dense model, as vLLM's own classes know it."""
    from transformers import LlamaConfig, NemotronConfig

    ours = case.config
    sizes = {
        name: getattr(ours, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
    }
    if _has_gate(ours):
        config: Any = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    else:
        # Every number of a head is turned, as in ours.
        config = NemotronConfig(
            **sizes, partial_rotary_factor=1.0, architectures=["NemotronForCausalLM"]
        )
    path = folder / f"{case.shape}-vllm"
    config.save_pretrained(path)
    return path


def _has_gate(config: Any) -> bool:
    return config.model_type != "gateless_llama"


def _output_of(command: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """What a peer's program prints.

    Raises:
        UserError: it fails.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{' '.join(words)} failed with code {done.returncode}: {said}")
    return done.stdout
