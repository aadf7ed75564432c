"""A measurement in a process of its own, which nothing measured before has touched."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lookup_experts.errors import UserError


def in_fresh_process(what: str, measure: Callable[..., int], *arguments: Any) -> int:
    """What a function of some module gives in a new process.

    Args:
        what: is measured; for the message, should it fail.

    Raises:
        UserError: the process was killed. Exceptions of `measure` pass.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{what} can't be measured: its process was killed, as when memory runs out. "
                "Measure a smaller case, or leave this out."
            ) from error
