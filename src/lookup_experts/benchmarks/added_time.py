"""Where a step with lookup experts spends time that its backbone doesn't.

Only on a CPU: on a GPU the host is done before the work is.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lookup_experts.benchmarks.timing import median
from lookup_experts.model.blocks import find_ffns


class AddedTime:
    """Seconds of every call, as they came.

    Attributes:
        entrance: of asking for a batch's records, before the first block; a number per pass.
        blocks: of router, waiting, sum and addition; a number per block and pass.
    """

    def __init__(self) -> None:
        self.entrance: list[float] = []
        self.blocks: list[float] = []

    def medians_ms(self, skip: int) -> tuple[float, float]:
        """Milliseconds per pass, at the entrance and in all blocks, without the first passes."""
        num_blocks = len(self.blocks) // len(self.entrance)
        passes = [
            sum(self.blocks[first : first + num_blocks])
            for first in range(skip * num_blocks, len(self.blocks), num_blocks)
        ]
        return median(self.entrance[skip:]) * 1e3, median(passes) * 1e3


@contextmanager
def added_time(model: Any) -> Iterator[AddedTime]:
    """Times what attaching added to `model`, every time it is called within.

    By hooks right before and after those of `attach`.
    """
    added = AddedTime()
    ffns = [ffn for ffn in find_ffns(model) if hasattr(ffn, "lookup_experts")]
    with ExitStack() as hooks:
        base: nn.Module = model.base_model
        stopwatch = _Stopwatch(added.entrance)
        hooks.enter_context(_removed(base.register_forward_pre_hook(stopwatch.start, prepend=True)))
        hooks.enter_context(_removed(base.register_forward_pre_hook(stopwatch.stop)))
        for ffn in ffns:
            stopwatch = _Stopwatch(added.blocks)
            hooks.enter_context(_removed(ffn.register_forward_hook(stopwatch.start, prepend=True)))
            hooks.enter_context(_removed(ffn.register_forward_hook(stopwatch.stop)))
        yield added


class _Stopwatch:
    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds
        self._started_at = 0.0

    def start(self, *_: Any) -> None:
        self._started_at = time.perf_counter()

    def stop(self, *_: Any) -> None:
        self._seconds.append(time.perf_counter() - self._started_at)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
