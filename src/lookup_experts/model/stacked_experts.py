"""What reads the rows of several tables alike in a batch whose sequences have one each.

A step of decoding is many small operations, and with several tables it is as many as with one: the
routers and matrices of all are multiplied, and what isn't a position's own is left out of the
softmax, or is zero. The reference is each table's `LookupExperts` on its own positions.

Shapes: P positions, K tables, N experts of each, r numbers of a row, d hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.model.forms import RowObserver, Sizes
from lookup_experts.model.forms.mole import LookupExperts
from lookup_experts.model.rows import Addition, TokenRows, leave
from lookup_experts.model.settings import LookupSettings


def can_be_stacked(one: LookupSettings, other: LookupSettings) -> bool:
    """Whether two tables' blocks can lie side by side; their tables must be alike too."""

    def kind(settings: LookupSettings) -> tuple[Any, ...]:
        return settings.row_form, settings.num_experts, settings.row_size, settings.layers

    return kind(one) == kind(other) and one.row_form == "mole"


def most_stacked(settings: LookupSettings, hidden_size: int) -> int:
    """How many tables are multiplied for all at most: no more numbers than the model is wide."""
    row_size = settings.row_size or hidden_size
    per_table = settings.num_experts if row_size == hidden_size else row_size
    return max(1, hidden_size // max(per_table, settings.num_experts))


def new_stacked_reader(
    layer: int, settings: LookupSettings, sizes: Sizes, count: int
) -> "StackedExperts":
    """As `forms.mole.new_reader`, of so many tables."""
    return StackedExperts(layer, sizes.hidden_size, settings.num_experts, settings.row_size, count)


class StackedRows:
    """The rows of positions that belong to several tables alike, by one `TokenRows`.

    Args:
        rows: of all of them.
        tables: int64 [P], the place of each position's table.
        count: K, of the tables.
    """

    def __init__(self, rows: TokenRows, tables: Tensor, count: int) -> None:
        self.rows = rows
        self.mix = rows.mix
        self.num_positions = rows.num_positions
        self.own = tables + count * torch.arange(len(tables), device=tables.device)
        """int64 [P]: of [P·K] things, one for each position and table, those that matter."""
        self._is_own = F.one_hot(tables, count).unsqueeze(-1)

    @property
    def index(self) -> Tensor:
        """See `TokenRows.index`."""
        return self.rows.index

    def spread(self, values: Tensor) -> Tensor:
        """[P, r] -> [P, K·r]: in the place of each position's table, and zeros in the others'."""
        if self._is_own.dtype != values.dtype:
            self._is_own = self._is_own.to(values.dtype)
        return (values.unsqueeze(1) * self._is_own).flatten(1)

    def leave(self) -> None:
        """The forward pass is over."""
        leave(self.rows)


class StackedExperts(LookupExperts):
    """The `LookupExperts` of several tables alike, side by side.

    Args:
        layer: see `LookupBlock`.
        hidden_size: d.
        num_experts: N, of each table.
        row_size: r; None: d.
        count: K, of the tables.
    """

    def __init__(
        self, layer: int, hidden_size: int, num_experts: int, row_size: int | None, count: int
    ) -> None:
        stacked = None if row_size in (None, hidden_size) else row_size * count
        super().__init__(layer, hidden_size, num_experts * count)
        self._count, self._num_experts = count, num_experts
        if stacked is not None:
            self.out_proj = nn.Linear(stacked, hidden_size, bias=False)

    def of_table(self, place: int) -> dict[str, Tensor]:
        """Views of a table's weights, by the names that they have in a `LookupExperts`."""
        found = {"router.weight": self.router.weight.data.chunk(self._count)[place]}
        if self.out_proj is not None:
            found["out_proj.weight"] = self.out_proj.weight.data.chunk(self._count, 1)[place]
        return found

    def mixed(self, hidden_states: Tensor, rows: Any, observe: RowObserver | None = None) -> Tensor:
        """See `LookupExperts.mixed`; rows: `StackedRows`; [P, K·r] where there is a matrix behind
        the sum."""
        every = self.router_logits(hidden_states).reshape(-1, self._num_experts)
        logits = every.index_select(0, rows.own)
        weights = logits.softmax(-1, torch.float32 if torch.is_grad_enabled() else None)
        if observe is not None:
            observe(self.layer, weights)
        mixed: Tensor = rows.mix(self.layer, weights)
        return mixed if self.out_proj is None else rows.spread(mixed)

    def begin(self, hidden_states: Tensor, rows: Any) -> Addition | None:
        """See `LookupBlock.begin`; nothing begins earlier here."""
        return None
