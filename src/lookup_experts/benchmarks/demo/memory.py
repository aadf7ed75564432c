"""Resident memory of a model that generates, measured in a process of its own.

    python -m lookup_experts.benchmarks.demo.memory FOLDER STORE

prints it as JSON. What the process holds before the model is loaded, with everything imported and
a model of no size run once, is measured too: the difference is the model's. Weights are mapped
from their file, so rows of the embedding that no token has asked for aren't resident.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 4
NEW_TOKENS = 16


def measure_memory(folder: Path, store: str) -> dict[str, int]:
    """Start a fresh process that loads a model and generates a few tokens.

    Args:
        folder: the model's.
        store: where the records of a table are read from.

    Returns:
        `process_bytes`: all that is resident, Python and PyTorch included; `model_bytes`: what
        loading and running the model added.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), store],
        stdout=subprocess.PIPE,
        check=True,
        start_new_session=True,  # Ctrl-C is for this process, which then ends that one
    )
    resident = json.loads(done.stdout)
    return {
        "process_bytes": resident["after"],
        "model_bytes": resident["after"] - resident["before"],
    }


def main(folder: str, store: str) -> None:
    """What the process does."""
    from lookup_experts.console import json_result, quiet_transformers
    from lookup_experts.folders.load import load

    quiet_transformers()
    _generate(_smallest_model(), WARM_UP_TOKENS)
    before = resident_bytes()
    model = load(folder, store=store, notify=lambda message: None)
    _generate(model, NEW_TOKENS)
    json_result({"before": before, "after": resident_bytes()})


def _smallest_model() -> Any:
    """Running it imports and starts everything that running any model does."""
    from lookup_experts.folders.attach import attach
    from lookup_experts.model.gateless_llama import GatelessLlamaConfig, GatelessLlamaForCausalLM

    config = GatelessLlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    return attach(GatelessLlamaForCausalLM(config).eval(), num_experts=1)


def _generate(model: Any, num_tokens: int) -> None:
    from lookup_experts.generation.text import Sampling, generate_ids

    generate_ids(model, [1, 2, 3], Sampling(max_new_tokens=num_tokens))


def resident_bytes() -> int:
    """Bytes of memory that this process holds, without what the allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Rss")


if __name__ == "__main__":
    main(*sys.argv[1:])
