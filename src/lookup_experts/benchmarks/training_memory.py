"""Peak memory of a training step, in a process of its own."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lookup_experts.benchmarks.processes import in_fresh_process
from lookup_experts.benchmarks.training import Key, Systems, TrainingCase


def peak_bytes(
    case: TrainingCase, system: str, num_experts: int | None, batches: Sequence[Tensor]
) -> int:
    """The most that one step over micro batches [B, context + 1] takes.

    On a CPU the whole process counts, programs included, by the kernel's own high-water mark; on a
    GPU what torch allocated.

    Raises:
        UserError: there is not enough memory.
    """
    experts = "" if num_experts is None else f", {num_experts} experts"
    what = f"Peak memory of {system}{experts}, {sum(b[:, 1:].numel() for b in batches):,} tokens,"
    return in_fresh_process(what, _peak_of_a_step, case, (system, num_experts), list(batches))


def _peak_of_a_step(case: TrainingCase, key: Key, batches: list[Tensor]) -> int:
    systems = Systems(case, [key])
    systems.step(key, [batch.to(case.device) for batch in batches])
    if case.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return high_water_mark()


def high_water_mark() -> int:
    """Bytes that this process held at most. Not `ru_maxrss`: a child inherits its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")
