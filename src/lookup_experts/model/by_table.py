"""Several tables on one backbone, a name for each, and one of them for each sequence of a batch.

Tables that are alike are a *group*: their records are read by one source, together, and what reads
the rows lies side by side, so that a batch of several takes as many operations as one of one. A
group of one table is as if that was alone.

A batch is cut into the parts that belong to one group, and in each block every part has added what
its own tables say. Sequences without a table get what the backbone gives, untouched. Reading has
begun for all parts when the token ids have entered.

Shapes: B sequences, T tokens of each, P positions of a part, N rows of a token and layer, d hidden
size, V ids of a table.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.blocks import find_ffns, placeholder_ids
from lookup_experts.model.forms import LookupBlock, RowObserver, is_unhooked
from lookup_experts.model.rows import (
    Addition,
    ExpertSource,
    StepRows,
    TokenRows,
    check_bounds,
    leave,
)
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.stacked_experts import StackedRows
from lookup_experts.model.wiring import Entrance, hook_base, hook_ffn, new_block

Key = tuple[str, ...]
"""A group: the names of its tables, in order."""


class Group(NamedTuple):
    """Where the rows of a group come from."""

    tables: Key
    source: ExpertSource
    """Of the table in place k the record of id i is that of id k·V + i."""
    vocab_size: int
    """V, of each table."""


class Positions(NamedTuple):
    """Which sequences of a batch belong to a group."""

    group: Group
    sequences: Tensor | None
    """int64 [b], of B; None: all."""
    flat: Tensor | None
    """int64 [P], of B·T: the positions in them; None: all."""
    tables: Tensor
    """int64 [b]: the place in the group of each sequence's table."""


class Part(NamedTuple):
    """The positions of a batch that belong to a group, and their rows."""

    group: Key
    flat: Tensor | None
    """See `Positions`."""
    rows: TokenRows


class RowsByTable:
    """The rows of one batch, group by group.

    Args:
        parts: at least one; no position is in two.
        shape: (B, T).
    """

    def __init__(self, parts: Sequence[Part], shape: torch.Size) -> None:
        self.parts = parts
        self._shape = shape
        # By this a forward pass knows that `BlockByTable.begin` may be asked.
        if self.only is not None and hasattr(self.only.rows, "begin_routed"):
            self.begin_routed = self.only.rows.begin_routed

    @property
    def only(self) -> Part | None:
        """The part that is the whole batch; None where there is none."""
        return self.parts[0] if self.parts[0].flat is None else None

    @property
    def index(self) -> Tensor:
        """[B, T]; see `TokenRows.index`: each position is a place of its own."""
        return torch.arange(self.num_positions).view(self._shape)

    @property
    def num_positions(self) -> int:
        """B·T"""
        return self._shape.numel()

    def leave(self) -> None:
        """The forward pass is over."""
        for part in self.parts:
            leave(part.rows)


class SourceByTable:
    """An `ExpertSource` over those of several tables.

    Args:
        groups: all tables are in one, each in one.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._group_of = {table: group for group in groups for table in group.tables}
        self._chosen: tuple[str | None, ...] = (None,)
        self._planned: tuple[Any, list[Positions]] = (None, [])

    def use(self, tables: str | Sequence[str | None] | None) -> None:
        """Take these from the next forward pass on.

        Args:
            tables: for all sequences, or one for each; None: the backbone alone.

        Raises:
            UserError: there is no table of that name.
        """
        chosen = (tables,) if tables is None or isinstance(tables, str) else tuple(tables)
        if not chosen:
            raise UserError("Tables were chosen for no sequence; give one name, or one for each.")
        for table in chosen:
            if table is not None and table not in self._group_of:
                raise unknown_name("table", table, self._group_of)
        self._chosen = chosen

    def find(self, table: str) -> tuple[ExpertSource, int]:
        """Where the rows of a table come from, and by how much its ids are to be raised there."""
        group = self._group_of[table]
        return group.source, group.tables.index(table) * group.vocab_size

    # Which parts there are depends on what was chosen; a graph begins behind it.
    @torch.compiler.disable
    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: nn.Module | None = None
    ) -> RowsByTable | None:
        """See `ExpertSource.rows`; None where no sequence has a table.

        Where there are fewer choices than sequences, each is for as many neighbours: `generate`
        puts beams and several answers to one prompt behind each other.

        Raises:
            UserError: the batch can't be shared out so.
            TableError: an id is outside of the tables, or reading can't begin.
        """
        parts: list[Part] = []
        with ExitStack() as begun:
            for positions in self._plan(token_ids):
                rows = _rows_of(positions, token_ids, ready, base_model)
                if rows is not None:
                    begun.callback(leave, rows)
                    parts.append(Part(positions.group.tables, positions.flat, rows))
            begun.pop_all()
        return RowsByTable(parts, token_ids.shape) if parts else None

    def _plan(self, token_ids: Tensor) -> list[Positions]:
        """Which sequences belong to which group; kept for the steps that follow with the same."""
        shape, device = token_ids.shape, token_ids.device
        key = (self._chosen, shape, device)
        if self._planned[0] == key:
            return self._planned[1]
        times, left = divmod(shape[0], len(self._chosen))
        if left:
            raise UserError(
                f"Tables were chosen for {len(self._chosen)} sequences, and {shape[0]} came. "
                "Choose one for all, or one for each: model.use_table(...)."
            )
        of_each = [table for table in self._chosen for _ in range(times)]
        with torch.inference_mode(False):  # autograd may see them in a later pass
            plan = [_positions(group, of_each, shape, device) for group in self.groups]
        self._planned = (key, [positions for positions in plan if positions is not None])
        return self._planned[1]


def _positions(
    group: Group, of_each: Sequence[str | None], shape: torch.Size, device: torch.device
) -> Positions | None:
    """A group's of a batch [B, T], of whose sequences the tables are given; None: it has none."""
    places = {table: place for place, table in enumerate(group.tables)}
    chosen = {row: places[table] for row, table in enumerate(of_each) if table in places}
    if not chosen:
        return None
    tables = torch.tensor(list(chosen.values()), device=device)
    if len(chosen) == shape[0]:
        return Positions(group, None, None, tables)
    sequences = torch.tensor(list(chosen), device=device)
    columns = torch.arange(shape[1], device=device)
    flat = (sequences.unsqueeze(1) * shape[1] + columns).view(-1)
    return Positions(group, sequences, flat, tables)


def _rows_of(
    positions: Positions, token_ids: Tensor, ready: bool, base_model: nn.Module | None
) -> TokenRows | None:
    """The rows of a group's sequences in a batch [B, T]."""
    group, ids = positions.group, token_ids
    if positions.sequences is not None:
        ids = ids.index_select(0, positions.sequences)
    if len(group.tables) == 1:
        return group.source.rows(ids, ready, base_model)
    ids = _checked(ids, group) + (positions.tables * group.vocab_size).unsqueeze(1)
    rows = group.source.rows(ids, ready, base_model)
    if rows is None:
        return None
    of_positions = positions.tables.repeat_interleave(ids.shape[1])
    stacked: Any = StackedRows(rows, of_positions, len(group.tables))
    return stacked


def _checked(ids: Tensor, group: Group) -> Tensor:
    """Ids of a table, which must not become those of the next one.

    On a GPU, which nobody waits for here, an id that is none becomes one that no table has.
    """
    if ids.device.type == "cpu":
        low, high = (int(one) for one in ids.aminmax()) if ids.numel() else (0, 0)
        check_bounds(low, high, group.vocab_size)
        return ids
    outside = group.vocab_size * len(group.tables)
    return ids.where((ids >= 0) & (ids < group.vocab_size), outside)


class BlockByTable(LookupBlock):
    """What a block has of each group; a child for each.

    Args:
        layer: see `LookupBlock`.
        blocks: of those that have something in this block.
    """

    def __init__(self, layer: int, blocks: Mapping[Key, LookupBlock]) -> None:
        super().__init__(layer)
        self._names = {group: f"group_{number}" for number, group in enumerate(blocks)}
        for group, block in blocks.items():
            self.add_module(self._names[group], block)

    def block(self, group: Key) -> Any:
        """A group's own; None if it has nothing here."""
        name = self._names.get(group)
        return None if name is None else self._modules[name]

    def weights_of(self, table: str) -> dict[str, Tensor]:
        """A table's weights here, by their names in a block of its own; writing to them writes to
        the model's."""
        for group in self._names:
            if table in group:
                block = self.block(group)
                if len(group) > 1:
                    stacked: dict[str, Tensor] = block.of_table(group.index(table))
                    return stacked
                return dict(block.state_dict(keep_vars=False))
        return {}

    def forward(
        self, hidden_states: Tensor, rows: Any, observe: RowObserver | None = None
    ) -> Tensor:
        """See `LookupBlock.forward`; rows: `RowsByTable`."""

        def added(block: Any, part: Part, told: RowObserver | None) -> Tensor:
            states = _of_part(hidden_states, part)
            own: Tensor = block(states, part.rows, told).view(states.shape)
            return own

        return self._of_parts(added, torch.zeros_like(hidden_states), rows, observe)

    def begin(self, hidden_states: Tensor, rows: Any) -> Addition | None:
        """See `LookupBlock.begin`; of a batch that has one table."""
        begin_rows: StepRows = rows.only.rows
        block = self.block(rows.only.group)
        if block is None or not is_unhooked(block):
            return None
        begun: Addition | None = block.begin(hidden_states, begin_rows)
        return begun

    def add_to(
        self,
        output: Tensor,
        hidden_states: Tensor,
        rows: Any,
        observe: RowObserver | None = None,
    ) -> Tensor:
        """See `LookupBlock.add_to`; where a position has no table, or this block nothing of it, the
        output stays to the bit."""

        def added_to(block: Any, part: Part, told: RowObserver | None) -> Tensor:
            states, own = _of_part(hidden_states, part), _of_part(output, part)
            total: Tensor
            if is_unhooked(block):
                total = block.add_to(own, states, part.rows, told)
            else:
                total = own + block(states, part.rows, told).view(own.shape)
            return total

        # A copy, unless a single part's sum, a tensor of its own, takes its place.
        total = output if rows.only is not None else output.clone()
        return self._of_parts(added_to, total, rows, observe)

    def _of_parts(
        self,
        compute: Callable[[Any, Part, RowObserver | None], Tensor],
        total: Tensor,
        rows: RowsByTable,
        observe: RowObserver | None,
    ) -> Tensor:
        """`total` [..., d] with what `compute` gives for each part in its place; written to, or
        replaced."""
        observer = _Observer(observe, rows.num_positions)
        for part in rows.parts:
            block = self.block(part.group)
            if block is not None:
                total = _put(total, part, compute(block, part, observer.of(part)))
        observer.tell(self.layer)
        return total


def _of_part(states: Tensor, part: Part) -> Tensor:
    """[..., d] of a batch -> [1, P, d] of a part, or all of it."""
    if part.flat is None:
        return states
    return states.reshape(-1, states.shape[-1]).index_select(0, part.flat).unsqueeze(0)


def _put(total: Tensor, part: Part, values: Tensor) -> Tensor:
    """`total` [..., d] with a part's positions from `values`; written to, unless it is replaced."""
    if part.flat is None:
        return values
    flat = total.view(-1, total.shape[-1])
    flat.index_copy_(0, part.flat, values.view(-1, values.shape[-1]).to(total.dtype))
    return total


class _Observer:
    """Gathers the weights of a layer's parts.

    Args:
        observe: told of all of them at once; None: nobody is.
        num_positions: B·T.
    """

    def __init__(self, observe: RowObserver | None, num_positions: int) -> None:
        self._observe = observe
        self._num_positions = num_positions
        self._seen: list[tuple[Part, Tensor]] = []

    def of(self, part: Part) -> RowObserver | None:
        """What hears of a part."""
        if self._observe is None:
            return None
        return lambda layer, weights: self._seen.append((part, weights))

    def tell(self, layer: int) -> None:
        """Weights [B·T, N] of the table that has the most rows; nan where there are none. Nothing,
        if no part had any."""
        if self._observe is None or not self._seen:
            return
        most = max(weights.shape[1] for _, weights in self._seen)
        like = self._seen[0][1]
        full = like.new_full((self._num_positions, most), torch.nan)
        for part, weights in self._seen:
            places = slice(None) if part.flat is None else part.flat
            full[places, : weights.shape[1]] = weights
        self._observe(layer, full)


def install_tables(model: Any, settings: Mapping[Key, LookupSettings]) -> None:
    """Add to a backbone the modules and hooks of several tables; see `wiring.install`. Weights are
    left as they come, and sources are still to be set.

    Args:
        settings: of each group, which is those of any of its tables.
    """
    ffns = find_ffns(model)
    places = sorted({place for one in settings.values() for place in one.layers})
    for layer, place in enumerate(places):
        blocks = {
            group: new_block(one.layers.index(place), model, one, ffns[place], len(group))
            for group, one in settings.items()
            if place in one.layers
        }
        hook_ffn(ffns[place], BlockByTable(layer, blocks))
    hook_base(model.base_model, Entrance(None, placeholder_ids(model.config)))
