"""What the demo measures of its models: where their parameters are, whether table and experts
agree, how fast each way decodes, and what it holds in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookup_experts.benchmarks.demo.report import DENSE, MOLE, SYSTEMS, TABLE, System
from lookup_experts.benchmarks.processes import in_fresh_process, resident_bytes
from lookup_experts.benchmarks.timing import Advance, interleave, median, pair_ratios, spread
from lookup_experts.console import quiet_transformers
from lookup_experts.errors import TableError
from lookup_experts.folders.attach import attach
from lookup_experts.folders.load import load
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation.inspection import inspect_folder
from lookup_experts.generation.sampling import Sampling
from lookup_experts.generation.text import Generation, generate_ids
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.model.gateless_llama import GatelessLlamaConfig, GatelessLlamaForCausalLM
from lookup_experts.table.reader import TableReader
from lookup_experts.training.data import TokenShards

PROMPT_TOKENS = 16
WARM_UP_STEPS = 8
STEPS_BETWEEN_NEWS = 8
MEMORY_WARM_UP_TOKENS = 4
MEMORY_TOKENS = 16


def load_system(system: System, demo: Path) -> Any:
    """The system's model, ready to generate.

    Where a store can't bypass the page cache, its statistics say so; nothing is said here.
    """
    return load(demo / system.folder, store=system.store, notify=lambda message: None)


def count_parameters(demo: Path) -> dict[str, dict[str, int]]:
    """Of every system: where its parameters are, and how many a token brings.

    Numbers of the table count as parameters: in memory or on disk, as the system keeps them.
    """
    dense, mole, table = (
        inspect_folder(demo / folder)["parameters"] for folder in (DENSE, MOLE, TABLE)
    )
    return {
        "dense": {"resident_parameters": dense["resident"]},
        "mole_experts": {"resident_parameters": mole["resident"] + mole["experts"]},
        "mole_memory": {"resident_parameters": table["resident"] + table["table"]},
        "mole_disk": {
            "resident_parameters": table["resident"],
            "disk_parameters": table["table"],
            "loaded_parameters_per_token": table["loaded_per_token"],
        },
    }


# ----------------------------------------------------------------------------------- agreement


def continue_held_out_text(
    demo: Path, data: Path, num_prompts: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Continue passages of the held-out text greedily from the experts and from the table.

    Args:
        demo: the demo's folder with its models.
        data: the token shards.
        num_prompts: how many passages, evenly over the text.
        prompt_tokens: of each.
        new_tokens: to generate for each.

    Returns:
        `num_prompts`, `num_tokens` in all, `backend`: what read the table; and of the passage
        whose continuation repeats itself least `prompt`, `experts_text` and `table_text`.

    Raises:
        TableError: the tokens differ.
    """
    shards = TokenShards(data, "validation")
    starts = range(0, shards.num_tokens - prompt_tokens, shards.num_tokens // num_prompts)
    prompts = [shards.window(start, prompt_tokens).tolist() for start in starts[:num_prompts]]
    tokenizer, sampling = load_tokenizer(demo / TABLE), Sampling(max_new_tokens=new_tokens)
    experts, table = (
        [generate_ids(model, prompt, sampling, tokenizer=tokenizer) for prompt in prompts]
        for model in (load_system(system, demo) for system in (SYSTEMS[1], SYSTEMS[3]))
    )
    for pair in zip(experts, table, strict=True):
        require_same_tokens(*pair)
    shown = max(range(len(prompts)), key=lambda number: len(set(table[number].token_ids)))
    reader = table[shown].reader
    assert reader is not None
    return {
        "num_prompts": len(prompts),
        "num_tokens": sum(len(generation.token_ids) for generation in table),
        "backend": reader.backend,
        "prompt": tokenizer.decode(prompts[shown]),
        "experts_text": experts[shown].text,
        "table_text": table[shown].text,
    }


def require_same_tokens(experts: Generation, table: Generation) -> None:
    """Raise a `TableError` that says where two continuations part."""
    if experts.token_ids == table.token_ids:
        return
    pairs = zip(experts.token_ids, table.token_ids, strict=False)
    shared = next(
        (place for place, (one, other) in enumerate(pairs) if one != other),
        min(len(experts.token_ids), len(table.token_ids)),
    )
    raise TableError(
        f"The table gives other tokens than the experts that it was folded from, from token "
        f"{shared + 1} of {len(experts.token_ids)} on. The disk or the memory is not reliable, or "
        "this is a defect; delete the demo's folder and run it again."
    )


# ------------------------------------------------------------------------------------ decoding


def measure_decoding(
    demo: Path, data: Path, num_passages: int, context_length: int, progress: Advance
) -> dict[str, Any]:
    """Time decoding over passages of held-out text, all systems step by step in turn.

    Every system is fed the same text instead of what it would say itself, so that all of them see
    the same tokens, as often new ones as real text has them.

    Args:
        demo: the demo's folder with its models.
        data: the token shards.
        num_passages: how many, each `context_length` tokens long.
        context_length: at most that of the models.
        progress: called with (rounds done, rounds in all).

    Returns:
        For every system `ms_per_token`, `steps`, `ratio_to_dense` and `ratio_spread`: the median
        and the 10th and 90th percentile over pairs of neighbouring steps. For those with a table
        also `backend`, `bytes_per_record` (read past the table in memory) and `wait_ms_per_token`.
    """
    models = {system.name: load_system(system, demo) for system in SYSTEMS}
    shards = TokenShards(data, "validation")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rounds = context_length - PROMPT_TOKENS - WARM_UP_STEPS
    for number in range(num_passages):
        start = number * context_length % (shards.num_tokens - context_length + 1)
        passage = torch.from_numpy(shards.window(start, context_length).astype("int64"))
        with torch.inference_mode():
            steps = {name: _decoding(model, passage) for name, model in models.items()}
            interleave(steps, WARM_UP_STEPS)
            for done in range(rounds):
                for name, taken in interleave(steps, 1, done).items():
                    seconds[name] += taken
                if (done + 1) % STEPS_BETWEEN_NEWS == 0 or done + 1 == rounds:
                    progress(number * rounds + done + 1, num_passages * rounds)
    return {
        name: _speed(values, seconds["dense"]) | _reading(models[name])
        for name, values in seconds.items()
    }


def _decoding(model: Any, passage: Tensor) -> Callable[[], None]:
    """What feeds the next token of a passage [T] after its prompt, and takes the likeliest one."""
    prompt = passage[None, :PROMPT_TOKENS]
    past = {cache_argument(model): cache_of(model(prompt, use_cache=True))}
    tokens = iter(passage[PROMPT_TOKENS:].view(-1, 1, 1))

    def step() -> None:
        logits = model(next(tokens), use_cache=True, **past).logits
        int(logits[0, -1].argmax())

    return step


def _speed(seconds: list[float], baseline: list[float]) -> dict[str, Any]:
    ratios = pair_ratios(seconds, baseline)
    return {
        "ms_per_token": median(seconds) * 1000,
        "steps": len(seconds),
        "ratio_to_dense": median(ratios),
        "ratio_spread": list(spread(ratios)),
    }


def _reading(model: Any) -> dict[str, Any]:
    """What a table was asked for; nothing where there is none. Prompts are counted too."""
    reader = getattr(model, "expert_source", None)
    if not isinstance(reader, TableReader):
        return {}
    statistics = reader.stats()
    reader.close()
    return {
        "backend": statistics.backend,
        "bytes_per_record": statistics.bytes_read / statistics.ids_unique,
        "wait_ms_per_token": statistics.wait_seconds / statistics.batches * 1000,
    }


# -------------------------------------------------------------------------------------- memory


def measure_memory(demo: Path, system: System) -> dict[str, int]:
    """Load a model in a fresh process and generate a few tokens.

    Weights are mapped from their file, so rows of the embedding that no token has asked for aren't
    resident.

    Returns:
        `process_bytes`: all that is resident, Python and PyTorch included; `model_bytes`: what
        loading and running the model added.
    """
    before, after = in_fresh_process("Resident memory", _before_and_after, demo, system)
    return {"process_bytes": after, "model_bytes": after - before}


def _before_and_after(demo: Path, system: System) -> tuple[int, int]:
    """Before the model is loaded a model of no size is run, which imports and starts everything
    that running any model does."""
    quiet_transformers()
    config = GatelessLlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    smallest = attach(GatelessLlamaForCausalLM(config).eval(), num_experts=1)
    generate_ids(smallest, [1, 2, 3], Sampling(max_new_tokens=MEMORY_WARM_UP_TOKENS))
    before = resident_bytes()
    model = load_system(system, demo)
    generate_ids(model, [1, 2, 3], Sampling(max_new_tokens=MEMORY_TOKENS))
    return before, resident_bytes()
