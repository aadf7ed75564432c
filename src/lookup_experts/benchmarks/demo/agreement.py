"""The trained experts and the table on disk say the same: passages, continued by both."""

from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.demo.systems import SYSTEMS, load_system
from lookup_experts.errors import TableError
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation.text import Generation, Sampling, generate_ids
from lookup_experts.training.data import TokenShards

_BY_NAME = {system.name: system for system in SYSTEMS}


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
    tokenizer = load_tokenizer(demo / _BY_NAME["mole_disk"].folder)
    experts, table = (
        _continuations(load_system(_BY_NAME[name], demo), prompts, new_tokens, tokenizer)
        for name in ("mole_experts", "mole_disk")
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


def _continuations(
    model: Any, prompts: list[list[int]], new_tokens: int, tokenizer: Any
) -> list[Generation]:
    sampling = Sampling(max_new_tokens=new_tokens)
    return [generate_ids(model, prompt, sampling, tokenizer=tokenizer) for prompt in prompts]


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
