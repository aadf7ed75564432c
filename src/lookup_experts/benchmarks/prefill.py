"""Prefill: prompts of real text, MoLE with its table on disk beside its dense backbone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lookup_experts import console
from lookup_experts.benchmarks.beside_dense import (
    Comparison,
    System,
    disk_rate,
    draw_ratios,
    moles_of,
    speeds,
    weight_bytes,
)
from lookup_experts.benchmarks.machine import matmul_flops_per_second, memory_bytes_per_second
from lookup_experts.benchmarks.peers import measured_peers
from lookup_experts.benchmarks.processes import DiskCounter
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import TextWindows
from lookup_experts.benchmarks.timing import Advance, clock_of, interleave


def bench_prefill(
    comparison: Comparison, lengths: Sequence[int], pairs: int, results: Results
) -> None:
    """`mole bench prefill`: so many pairs of prompts of each length in tokens."""
    peers = comparison.peers()
    models, windows = comparison.prepare()
    for tokens in lengths:
        with console.progress_bar(f"prefill {tokens}") as advance:
            found = measure_prefill(models, windows, tokens, pairs, advance)
        results.add(*(result | {"dtype": comparison.case.dtype_name} for result in found))
        results.add(*measured_peers(peers, comparison.case, tokens=tokens))
    results.finish(draw_ratios)


@torch.inference_mode()
def measure_prefill(
    models: dict[System, Any], windows: TextWindows, tokens: int, pairs: int, advance: Advance
) -> list[Result]:
    """Prompts of `tokens` tokens, all models in turn.

    Returns:
        What `speeds` says, and of what the machine reaches at best: `share_of_matmul_flops`, the
        products with weights over the time, and `share_of_memory_bandwidth`, reading these once.
    """
    moles = moles_of(models)
    mole = next(iter(moles.values()))
    bytes_per_second, memory_rate = disk_rate(mole), memory_bytes_per_second(mole.device)
    flops_per_second = matmul_flops_per_second(mole.dtype, mole.device)
    for model in models.values():
        model(windows.take(1, tokens), logits_to_keep=1)
    seconds: dict[System, list[float]] = {name: [] for name in models}
    for each in moles.values():
        each.expert_source.reset_stats()
    disk = DiskCounter()
    for pair in range(pairs):
        prompt = windows.take(1, tokens)
        prompts = {name: partial(model, prompt, logits_to_keep=1) for name, model in models.items()}
        for name, taken in interleave(prompts, 1, pair, clock_of(mole.device)).items():
            seconds[name] += taken
        advance(pair + 1, pairs)
    read = {weights: each.expert_source.stats() for weights, each in moles.items()}
    size, from_disk = {"tokens": tokens}, disk.bytes_read()
    results = speeds("prefill", size, models, seconds, read, from_disk, bytes_per_second)
    for result in results:
        model = models[result["weights"], result["system"]]
        step = result["ms_per_step"] / 1e3
        result["share_of_matmul_flops"] = prompt_flops(model, tokens) / step / flops_per_second
        result["share_of_memory_bandwidth"] = weight_bytes(model, tokens) / step / memory_rate
    return results


def prompt_flops(model: Any, tokens: int) -> float:
    """Of a prompt's products with a model's weights, two for each number and token.

    Only the last token goes through the output layer. What attention multiplies besides, keys and
    values, is left out.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    per_token = sum(
        weight.numel()
        for weight in model.parameters()
        if weight.dim() == 2 and weight is not embedding and weight is not head
    )
    return 2.0 * (tokens * per_token + head.numel())
