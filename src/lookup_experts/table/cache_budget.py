"""What a row cache may take, and on a GPU of which memory."""

from dataclasses import dataclass

from lookup_experts.errors import UserError
from lookup_experts.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class CacheBudget:
    """Bytes for records that were asked for before."""

    total: int
    """Of RAM; where the model runs on a GPU, of both memories together."""
    on_device: int | None = None
    """How much of it is a GPU's; None: half, or all if it holds the whole table."""

    def __post_init__(self) -> None:
        if self.on_device is not None and self.on_device > self.total:
            raise UserError(
                f"The part of the row cache on the GPU ({format_bytes(self.on_device)}) is larger "
                f"than the cache ({format_bytes(self.total)}). Write it like 256MB:64MB."
            )

    def split(self, table_bytes: int) -> tuple[int, int]:
        """Bytes of the GPU's memory, and of page-locked RAM."""
        on_device = self.on_device
        if on_device is None:
            on_device = self.total if table_bytes <= self.total else self.total // 2
        return on_device, self.total - on_device


def parse_cache(cache: "int | str | CacheBudget") -> CacheBudget:
    """A budget from a number of bytes, from words like `256MB`, or from `256MB:64MB`: so much in
    all, and of it so much in a GPU's memory."""
    if isinstance(cache, CacheBudget):
        return cache
    if isinstance(cache, int):
        return CacheBudget(parse_bytes(cache))
    total, colon, on_device = cache.partition(":")
    return CacheBudget(parse_bytes(total), parse_bytes(on_device) if colon else None)
