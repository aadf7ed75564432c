"""Which part of the text is held out for validation.

Documents are held out by a hash of their text, so that neither their order nor their neighbours
matter, and equal documents go together: none is held out that is also trained on. (Of a document
longer than a section the hash is over its first section.)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lookup_experts.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """The part that is held out."""

    fraction: float
    documents: np.ndarray
    """bool [documents]: held out as a whole."""
    tail_start: int | None
    """Where there are no two different documents: tokens from here on are held out."""

    def for_manifest(self) -> dict[str, Any]:
        return {"fraction": self.fraction, "by": self._by()}

    def _by(self) -> str:
        if self.tail_start is not None:
            return "tail"
        return "document" if self.documents.any() else "nothing"


def hold_out(keys: np.ndarray, num_tokens: np.ndarray, fraction: float) -> HeldOut:
    """Choose about `fraction` of the tokens: whole documents where there are two different ones.

    Args:
        keys: uint64 [documents], a hash of the text of each.
        num_tokens: int64 [documents]; 0 for empty documents, which don't count.
        fraction: from 0, nothing, to less than 1.
    """
    nothing = np.zeros(len(keys), dtype=bool)
    total = int(num_tokens.sum())
    if fraction == 0:
        return HeldOut(fraction, nothing, None)
    # Equal documents form a group. Sorted by key, hence in random order but always the same.
    (
        _,
        group_of,
    ) = np.unique(keys, return_inverse=True)
    group_tokens = np.bincount(group_of, weights=num_tokens).astype(np.int64)
    if np.count_nonzero(group_tokens) < 2:
        return HeldOut(fraction, nothing, _tail_start(total, fraction))
    groups = _choose_groups(group_tokens, fraction)
    return HeldOut(fraction, np.isin(group_of, groups) & (num_tokens > 0), None)


def _choose_groups(group_tokens: np.ndarray, fraction: float) -> list[int]:
    """Groups in their order until the fraction is reached; never all, and at least one.

    A group that would take more than twice the fraction is passed over, so that one long document
    among short ones isn't held out. If all are that long, it is the shortest.
    """
    total = int(group_tokens.sum())
    target = fraction * total
    most = min(2 * target, total - 1)
    chosen: list[int] = []
    held_out = 0
    for group in np.flatnonzero(group_tokens):
        if held_out >= target:
            break
        if held_out + group_tokens[group] <= most:
            chosen.append(int(group))
            held_out += int(group_tokens[group])
    if chosen:
        return chosen
    present = np.flatnonzero(group_tokens)
    return [int(present[np.argmin(group_tokens[present])])]


def _tail_start(total: int, fraction: float) -> int:
    if total < 2:
        raise UserError(
            f"The text has {total} token: too short to hold out a part of it. "
            "Give more text, or --validation 0."
        )
    return total - min(max(1, round(fraction * total)), total - 1)
