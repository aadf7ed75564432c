"""The trained experts and the table on disk say the same: one prompt, continued by both."""

from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.demo.systems import SYSTEMS, load_system
from lookup_experts.errors import TableError
from lookup_experts.generation.loading import load_tokenizer
from lookup_experts.generation.text import Generation, Sampling, generate_ids
from lookup_experts.training.data import TokenShards

_BY_NAME = {system.name: system for system in SYSTEMS}


def continue_held_out_text(
    demo: Path, data: Path, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Continue the beginning of the held-out text greedily from the experts and from the table.

    Args:
        demo: the demo's folder with its models.
        data: the token shards.
        prompt_tokens: of the held-out text.
        new_tokens: to generate.

    Returns:
        `prompt`, `experts_text` and `table_text`, `num_tokens`, and `backend`: what read the table.

    Raises:
        TableError: the tokens differ.
    """
    prompt = TokenShards(data, "validation").window(0, prompt_tokens).tolist()
    sampling = Sampling(max_new_tokens=new_tokens)
    tokenizer = load_tokenizer(demo / _BY_NAME["mole_disk"].folder)
    experts, table = (
        generate_ids(load_system(_BY_NAME[name], demo), prompt, sampling, tokenizer=tokenizer)
        for name in ("mole_experts", "mole_disk")
    )
    require_same_tokens(experts, table)
    assert table.reader is not None
    return {
        "prompt": tokenizer.decode(prompt),
        "experts_text": experts.text,
        "table_text": table.text,
        "num_tokens": len(table.token_ids),
        "backend": table.reader.backend,
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
