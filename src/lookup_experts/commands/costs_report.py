"""What `mole train --dry-run` prints."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lookup_experts import console
from lookup_experts.errors import UserError
from lookup_experts.units import format_bytes

if TYPE_CHECKING:
    from lookup_experts.training.costs import Costs
    from lookup_experts.training.recipe import Recipe


def report_costs(
    recipe: "Recipe", name: str, num_gpus: int, tokens_per_id: float | None, json: bool
) -> None:
    """Print a recipe's costs: one JSON object, or lines for a person."""
    from lookup_experts.training.costs import costs

    if num_gpus < 1:
        raise UserError(f"--gpus {num_gpus}: expected at least 1.")
    if tokens_per_id is not None and not 1 <= tokens_per_id < float("inf"):
        raise UserError(f"--tokens-per-id {tokens_per_id}: expected at least 1.")
    vocab_size = recipe.model.vocab_size
    if vocab_size is None:
        raise UserError(
            f"{name} takes its vocabulary from the data, and a dry run reads none: add "
            "--set model.vocab_size=50304."
        )
    found = costs(recipe, vocab_size, num_gpus, tokens_per_id)
    if json:
        console.json_result(found.to_dict())
    else:
        console.result("\n".join([name, *_lines(found)]))


def _lines(found: "Costs") -> Iterator[str]:
    counts, flops = found.parameters, found.flops_per_token
    yield (
        f"parameters: {_short(counts.total)} trained, {_short(counts.active)} active per token, "
        f"{_short(counts.routed_experts)} in routed experts, {_short(counts.routers)} in routers"
    )
    if counts.readers:
        yield (
            f"  what reads the rows stays in memory: {_short(counts.readers)} numbers, "
            f"{format_bytes(2 * counts.readers)} in bfloat16"
        )
    if counts.static_rows:
        yield f"  of the routed experts {_short(counts.static_rows)} in rows of their own per id"
    if counts.offloaded_experts:
        yield (
            f"outside of the GPU while generating: {_short(counts.offloaded_experts)} numbers, "
            f"{_short(counts.loaded_per_token)} of them per token"
        )
    for encoding, num_bytes in found.table_bytes.items():
        record = format_bytes(found.bytes_per_token[encoding])
        yield f"  table in {encoding}: {format_bytes(num_bytes)}, {record} read per token"
    yield f"training: {_short(flops.training)}FLOPs per token, {found.training_flops:.2e} in all"
    if flops.training_experts:
        yield (
            f"  of these lookup experts {_short(flops.training_experts)}, evaluated once per "
            f"{found.tokens_per_unique_id:.1f} tokens; "
            f"{_short(flops.training_experts_per_position)} if at every position"
        )
    yield f"inference: {_short(flops.inference)}FLOPs per token at a full context"
    for kind, memory in found.memory_per_gpu.items():
        yield (
            f"memory per GPU, {found.num_gpus} with {kind}: {format_bytes(memory.total)} = "
            f"weights {format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, "
            f"AdamW {format_bytes(memory.optimizer)}, gathered {format_bytes(memory.gathered)}, "
            f"activations about {format_bytes(memory.activations)} (an estimate)"
        )


def _short(number: float) -> str:
    """`1.85 G`, `36.9 k`: three digits, powers of ten."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g} {unit}".rstrip() + (" " if not unit else "")
