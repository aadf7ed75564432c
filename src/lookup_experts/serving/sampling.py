"""The next token of each row of a batch, chosen as its own request asks.

The order is that of transformers' `generate`: what `adjusting` changes, then temperature, then
top-k, top-p and min-p. What is drawn for a request depends on its own seed alone: one number per
token from its own generator, found in the cumulated probabilities. So neither the batch nor the
device changes it.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from lookup_experts.serving.adjusting import Adjustment

BLOCK = 256
"""Of probabilities that are added up first, when a token is drawn."""
COLDEST = 1e-5
"""Below this temperature the likeliest token is taken: dividing by less gives no numbers."""
NUCLEUS = 1024
"""For top-p, the likeliest tokens that are looked at before all are sorted."""


@dataclass
class Chooser:
    """How one request chooses its tokens."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 considers all."""
    min_p: float = 0.0
    """Tokens less probable than so many times the likeliest are not considered."""
    seed: int | None = None
    adjustment: Adjustment | None = None
    """Changes the logits before; None for a request that asks for nothing of the kind."""
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < COLDEST or self.top_p == 0 or self.top_k == 1


def choose(logits: Tensor, choosers: list[Chooser]) -> Tensor:
    """One token id per row of logits [B, V], int64 [B] on their device; draws one number for each
    row that samples. Where none does and none is changed, the host doesn't wait for the device."""
    likeliest = logits.argmax(-1)
    if all(how.is_greedy and not _is_alone(how) for how in choosers):
        return likeliest
    chosen = likeliest.tolist()
    plain = [row for row, how in enumerate(choosers) if not how.is_greedy and not _is_alone(how)]
    if plain:
        heat = torch.tensor([[choosers[row].temperature] for row in plain], device=logits.device)
        scaled = logits[plain].float() / heat
        drawn = _draw(scaled.softmax(-1), [choosers[row].random.random() for row in plain])
        for row, token_id in zip(plain, drawn.tolist(), strict=True):
            chosen[row] = token_id
    for row, how in enumerate(choosers):
        if _is_alone(how):
            chosen[row] = _choose_alone(logits[row].float(), how)
    return torch.tensor(chosen, device=logits.device)


def choose_reference(logits: Tensor, choosers: list[Chooser]) -> list[int]:
    """`choose` by the book, row by row: sort everything, cut, draw."""
    chosen = []
    for row, how in zip(logits.float(), choosers, strict=True):
        if how.adjustment is not None:
            row = how.adjustment.apply_reference(row)
        if how.is_greedy:
            chosen.append(int(row.argmax()))
            continue
        scaled, ids = (row / how.temperature).sort(descending=True, stable=True)
        if how.top_k:
            scaled, ids = scaled[: how.top_k], ids[: how.top_k]
        probabilities = scaled.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        keep = (before < how.top_p) & (probabilities >= how.min_p * probabilities[0])
        keep[0] = True
        ids, probabilities = ids[keep], probabilities[keep]
        order = ids.argsort() if not _is_cut(how) else torch.arange(len(ids))
        ids, probabilities = ids[order], probabilities[order]
        chosen.append(int(ids[int(draw_reference(probabilities[None], [how.random.random()]))]))
    return chosen


def _is_cut(how: Chooser) -> bool:
    return how.top_k > 0 or how.top_p < 1 or how.min_p > 0


def _is_alone(how: Chooser) -> bool:
    """Whether a row needs more than the whole batch does."""
    return how.adjustment is not None or (not how.is_greedy and _is_cut(how))


def _choose_alone(logits: Tensor, how: Chooser) -> int:
    """From one row's logits [V] float32."""
    if how.adjustment is not None:
        logits = how.adjustment.apply(logits)
    if how.is_greedy:
        return int(logits.argmax())
    if _is_cut(how):
        return _choose_cut(logits, how)
    return int(_draw((logits / how.temperature).softmax(-1)[None], [how.random.random()]))


def _choose_cut(logits: Tensor, how: Chooser) -> int:
    """From the likeliest tokens only; `logits` [V] float32."""
    vocab_size = len(logits)
    scaled = logits / how.temperature
    size = min(how.top_k or NUCLEUS, vocab_size)
    top, ids = scaled.topk(size)
    total = top.logsumexp(-1) if how.top_k else scaled.logsumexp(-1)
    probabilities = (top - total).exp()
    cumulated = probabilities.cumsum(-1)
    least = how.min_p * probabilities[0]
    # Whether more than these may be considered.
    is_short = bool((cumulated[-1] < how.top_p) & (probabilities[-1] >= least))
    if not how.top_k and is_short and size < vocab_size:
        top, ids = scaled.sort(descending=True, stable=True)
        probabilities = (top - total).exp()
        cumulated = probabilities.cumsum(-1)
    is_kept = (cumulated - probabilities < how.top_p) & (probabilities >= least)
    keep = max(1, int(is_kept.sum()))
    place = _draw(probabilities[None, :keep], [how.random.random()])
    return int(ids[int(place)])


def _draw(probabilities: Tensor, numbers: list[float]) -> Tensor:
    """For each row [B, M] of probabilities, scaled or not, the place where a number of [0, 1)
    falls when they are cumulated: int64 [B].

    In two levels, blocks and then one block's entries, since cumulating a whole vocabulary takes
    longer than the softmax before it. In float64, so that no order of additions matters.
    """
    size = probabilities.shape[1]
    blocks = F.pad(probabilities, (0, -size % BLOCK)).view(len(probabilities), -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    points = torch.tensor(numbers, dtype=torch.float64, device=sums.device) * sums.sum(-1)
    block = _find(sums, points)
    rows = torch.arange(len(blocks), device=block.device)
    points = points - (sums.cumsum(-1) - sums)[rows, block]
    return block * BLOCK + _find(blocks[rows, block].double(), points)


def _find(weights: Tensor, points: Tensor) -> Tensor:
    """The first place of each row [B, M] at which the cumulated weights exceed its point; at most
    the last place that has any weight, whatever rounding says."""
    cumulated = weights.cumsum(-1)
    places = torch.searchsorted(cumulated, points.unsqueeze(1), right=True).squeeze(1)
    return places.minimum((cumulated < cumulated[:, -1:]).sum(-1))


def draw_reference(probabilities: Tensor, numbers: list[float]) -> Tensor:
    """`_draw` entry by entry."""
    places = []
    for row, number in zip(probabilities.double().tolist(), numbers, strict=True):
        cumulated = list(accumulate(row))
        beyond = (place for place, sum_ in enumerate(cumulated) if sum_ > number * cumulated[-1])
        places.append(next(beyond, cumulated.index(cumulated[-1])))
    return torch.tensor(places)


def log_probabilities(logits: Tensor, chosen: Tensor, top: int) -> list["TokenLogProbability"]:
    """Of each row's chosen token, and of the likeliest ones, before temperature and cuts.

    Args:
        logits: [M, V].
        chosen: int64 [M].
        top: how many of the likeliest to tell.
    """
    scores = logits.float()
    totals = scores.logsumexp(-1, keepdim=True)
    own = (scores.gather(1, chosen.unsqueeze(1)) - totals).squeeze(1).tolist()
    values, ids = scores.topk(min(top, scores.shape[1]))
    values = values - totals
    return [
        TokenLogProbability(*row)
        for row in zip(chosen.tolist(), own, ids.tolist(), values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class TokenLogProbability:
    """Natural logarithms of probabilities at one position."""

    token_id: int
    value: float
    """Of the token that is there."""
    top_ids: list[int]
    """The likeliest tokens, likeliest first."""
    top_values: list[float]
