"""The processes that torchrun started, for work that they share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from lookup_experts.errors import UserError
from lookup_experts.table.build import ALONE, Ranks

LONGEST_WAIT = timedelta(days=7)
"""For the slowest of them; by default it would be half an hour."""
FAILED = 2
"""The exit code of bad input."""


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started together with this one; without it, this one alone.

    Raises (from `Ranks.wait`):
        UserError: in the main process, where another one has ended.
        SystemExit: in the others: whoever has ended has said why.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    import torch.distributed as distributed

    distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    rank = distributed.get_rank()

    def wait() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:  # gloo's, of a connection that was closed
            if rank != 0:
                raise SystemExit(FAILED) from error
            raise UserError(
                "Another of the processes has ended. Run the same command again: it goes on."
            ) from error

    try:
        yield Ranks(rank, count, wait)
    finally:
        distributed.destroy_process_group()
