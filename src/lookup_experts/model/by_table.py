"""Several tables on one backbone, a name for each, and one of them for each sequence of a batch.

What each table needs of a block (routers, matrices) and where its rows come from is as if it were
alone; a batch is cut into the parts that belong together, and in each block every part has added
what its own table says. Sequences without a table get what the backbone gives, untouched.

A model's parts are found anew in each forward pass, when its token ids enter, and reading has begun
for all of them before the first block computes.

Shapes: B sequences, T tokens of each, P positions of a part, N rows of a token and layer, d hidden
size.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.blocks import find_ffns, placeholder_ids
from lookup_experts.model.forms import LookupBlock, RowObserver, is_unhooked
from lookup_experts.model.rows import Addition, ExpertSource, StepRows, TokenRows, leave
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import Entrance, hook_base, hook_ffn, new_block

_PREFIX = "table_"
"""Before a table's name in that of its module: no name is one that a module has itself."""


def module_of(table: str) -> str:
    """The name of a table's module in a block."""
    return f"{_PREFIX}{table}"


class Part(NamedTuple):
    """The positions of a batch that belong to one table."""

    table: str
    positions: Tensor | None
    """int64 [P], of B·T; None: all."""
    rows: TokenRows


class RowsByTable:
    """The rows of one batch, table by table.

    Args:
        parts: at least one; no position is in two.
        shape: (B, T).
    """

    def __init__(self, parts: Sequence[Part], shape: torch.Size) -> None:
        self.parts = parts
        self._shape = shape
        if self.only is not None and hasattr(self.only.rows, "begin_routed"):
            self.begin_routed = self.only.rows.begin_routed

    @property
    def only(self) -> Part | None:
        """The part that is the whole batch; None where there is none."""
        return self.parts[0] if self.parts[0].positions is None else None

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
        sources: by the tables' names.
    """

    def __init__(self, sources: Mapping[str, ExpertSource]) -> None:
        self.sources = dict(sources)
        self._chosen: tuple[str | None, ...] = (None,)

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
            if table is not None and table not in self.sources:
                raise unknown_name("table", table, self.sources)
        self._chosen = chosen

    def rows(
        self, token_ids: Tensor, ready: bool = False, base_model: nn.Module | None = None
    ) -> RowsByTable | None:
        """See `ExpertSource.rows`; None where no sequence has a table.

        Where there are fewer choices than sequences, each is for as many neighbours: `generate`
        puts beams and several answers to one prompt behind each other.

        Raises:
            UserError: the batch can't be shared out so.
        """
        chosen = self._chosen
        times, left = divmod(len(token_ids), len(chosen))
        if left:
            raise UserError(
                f"Tables were chosen for {len(chosen)} sequences, and {len(token_ids)} came. "
                "Choose one for all, or one for each: model.use_table(...)."
            )
        of_table: dict[str, list[int]] = {}
        for place, table in enumerate(chosen):
            if table is not None:
                of_table.setdefault(table, []).extend(range(place * times, (place + 1) * times))
        if not of_table:
            return None
        parts: list[Part] = []
        with ExitStack() as begun:
            for table, sequences in of_table.items():
                ids, positions = _of_sequences(token_ids, sequences)
                rows = self.sources[table].rows(ids, ready, base_model)
                if rows is not None:
                    begun.callback(leave, rows)
                    parts.append(Part(table, positions, rows))
            begun.pop_all()
        return RowsByTable(parts, token_ids.shape) if parts else None


def _of_sequences(token_ids: Tensor, sequences: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The token ids [b, T] of some sequences, and their positions; see `Part`."""
    if len(sequences) == len(token_ids):
        return token_ids, None
    columns = token_ids.shape[1]
    kept = torch.tensor(sequences, device=token_ids.device)
    places = torch.arange(columns, device=token_ids.device)
    return token_ids.index_select(0, kept), (kept.unsqueeze(1) * columns + places).view(-1)


class BlockByTable(LookupBlock):
    """What a block has of each table; a child for each.

    Args:
        layer: see `LookupBlock`.
        blocks: by the tables' names, of those that have something in this block.
    """

    def __init__(self, layer: int, blocks: Mapping[str, LookupBlock]) -> None:
        super().__init__(layer)
        for table, block in blocks.items():
            self.add_module(module_of(table), block)

    def block(self, table: str) -> Any:
        """A table's own; None if it has nothing here."""
        return self._modules.get(module_of(table))

    def forward(
        self, hidden_states: Tensor, rows: Any, observe: RowObserver | None = None
    ) -> Tensor:
        """See `LookupBlock.forward`; rows: `RowsByTable`."""
        observer = None if observe is None else _Observer(rows.num_positions)
        added = torch.zeros_like(hidden_states)
        for part in rows.parts:
            block = self.block(part.table)
            if block is not None:
                states = _of_part(hidden_states, part)
                told = None if observer is None else observer.of(part)
                added = _put(added, part, block(states, part.rows, told).view(states.shape))
        if observer is not None:
            observer.tell(self.layer, observe)
        return added

    def begin(self, hidden_states: Tensor, rows: Any) -> Addition | None:
        """See `LookupBlock.begin`; of a batch that has one table."""
        begin_rows: StepRows = rows.only.rows
        block = self.block(rows.only.table)
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
        """See `LookupBlock.add_to`; where a part has no table, or this block nothing of its table,
        the output stays to the bit."""
        observer = None if observe is None else _Observer(rows.num_positions)
        # Not for a single part, whose sum is a tensor of its own.
        total = output if rows.only is not None else output.clone()
        for part in rows.parts:
            block = self.block(part.table)
            if block is not None:
                states, own = _of_part(hidden_states, part), _of_part(output, part)
                told = None if observer is None else observer.of(part)
                if is_unhooked(block):
                    added = block.add_to(own, states, part.rows, told)
                else:
                    added = own + block(states, part.rows, told).view(own.shape)
                total = _put(total, part, added)
        if observer is not None:
            observer.tell(self.layer, observe)
        return total


def _of_part(states: Tensor, part: Part) -> Tensor:
    """[..., d] of a batch -> [1, P, d] of a part, or all of it."""
    if part.positions is None:
        return states
    return states.reshape(-1, states.shape[-1]).index_select(0, part.positions).unsqueeze(0)


def _put(total: Tensor, part: Part, values: Tensor) -> Tensor:
    """`total` [..., d] with a part's positions from `values`; written to, unless it is replaced."""
    if part.positions is None:
        return values
    flat = total.view(-1, total.shape[-1])
    flat.index_copy_(0, part.positions, values.view(-1, values.shape[-1]).to(total.dtype))
    return total


class _Observer:
    """Gathers the weights of a layer's parts.

    Args:
        num_positions: B·T.
    """

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._seen: list[tuple[Part, Tensor]] = []

    def of(self, part: Part) -> RowObserver:
        """What hears of a part."""
        return lambda layer, weights: self._seen.append((part, weights))

    def tell(self, layer: int, observe: RowObserver | None) -> None:
        """Weights [B·T, N] of the table that has the most rows; nan where there are none. Nothing,
        if no part had any."""
        if not self._seen or observe is None:
            return
        most = max(weights.shape[1] for _, weights in self._seen)
        like = self._seen[0][1]
        full = like.new_full((self._num_positions, most), torch.nan)
        for part, weights in self._seen:
            places = slice(None) if part.positions is None else part.positions
            full[places, : weights.shape[1]] = weights
        observe(layer, full)


def install_tables(model: Any, settings: Mapping[str, LookupSettings]) -> None:
    """Add to a backbone the modules and hooks of several tables; see `wiring.install`. Weights are
    left as they come, and sources are still to be set."""
    ffns = find_ffns(model)
    for layer, place in enumerate(
        sorted({block for one in settings.values() for block in one.layers})
    ):
        blocks = {
            table: new_block(one.layers.index(place), model, one, ffns[place])
            for table, one in settings.items()
            if place in one.layers
        }
        hook_ffn(ffns[place], BlockByTable(layer, blocks))
    hook_base(model.base_model, Entrance(None, placeholder_ids(model.config)))
