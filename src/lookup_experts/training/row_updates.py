"""Static rows, of which a step sees few: no step touches or sends the others.

A form may learn rows for each token id by itself (`static` of its makers), [V, r] in every layer.
The ids of a batch are a small part of V, and so their gradients are sparse: of these ids alone.
AdamW however moves every row in every step, since its moments outlast the gradients they came from.
`RowAdamW` gives what AdamW gives, later: how far a row has moved since it was last seen follows
from its moments and the learning rates since, so that is added when the row is seen again (in the
forward pass to what is read, in the step to the row itself) and to all rows in `settle`, before
they are written anywhere.

Among processes, with whole copies of the model as with shards, every process has all static rows;
they exchange the gradients of the ids that they saw, once per step.

Letters: V ids, U ids that were seen, r numbers of a row.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lookup_experts.errors import UserError
from lookup_experts.model.wiring import routed_experts

LEAST_PART = 1e-9
"""Of a step's movement: after as many steps as leave less of it, a row stands still."""


def static_rows(model: nn.Module) -> list[nn.Embedding]:
    """The static rows of every layer that has some and trains them."""
    if not hasattr(model, "lookup_settings"):
        return []
    found = (getattr(maker, "static", None) for maker in routed_experts(model))
    return [s for s in found if isinstance(s, nn.Embedding) and s.weight.requires_grad]


class RowAdamW(torch.optim.AdamW):
    """AdamW, for which sparse gradients of `rows` stand for those of the whole.

    Epsilon aside, which it takes as growing with the root of the second moment between two
    gradients, this is AdamW on dense gradients. Its state is AdamW's once `settle` was called.

    Args:
        groups: parameters and their settings, as of torch's AdamW; rows don't decay.
        rows: embeddings, whose gradients become sparse.

    Raises:
        UserError: the first moment outlasts the second, so that rows would never stand still.
    """

    def __init__(self, groups: list[dict[str, Any]], rows: Sequence[nn.Embedding]) -> None:
        super().__init__(groups)
        self._rows: dict[nn.Parameter, _Row] = {}
        place_of = {p: place for place, g in enumerate(self.param_groups) for p in g["params"]}
        for embedding in rows:
            weight: Any = embedding.weight
            self._rows[weight] = _Row(weight, self, place_of[weight])
            embedding.sparse = True
            embedding.register_forward_hook(self._bring_up)

    def _bring_up(self, embedding: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        row = self._rows.get(embedding.weight)
        missing = None if row is None else row.missing(args[0])
        return output if missing is None else output + missing.view_as(output).to(output.dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """AdamW's; of sparse gradients only their rows are touched."""
        sparse = [
            (p, p.grad) for p in self._rows if p.grad is not None and p.grad.layout != torch.strided
        ]
        for parameter, _ in sparse:
            parameter.grad = None
        result = super().step(closure)
        for parameter, gradient in sparse:
            gradient = gradient.coalesce()
            self._rows[parameter].step(gradient.indices()[0], gradient.values())
        return result

    def load_state_dict(self, state_dict: Any) -> None:
        """As of any optimizer; the state is one after `settle`, or of torch's AdamW."""
        super().load_state_dict(state_dict)
        for row in self._rows.values():
            row.forget()

    @torch.no_grad()
    def settle(self) -> None:
        """Move all rows to where they are by now."""
        for row in self._rows.values():
            row.settle()


class _Row:
    """The rows of one parameter, [V, r], each as it was when it was last seen."""

    def __init__(self, weight: nn.Parameter, optimizer: torch.optim.AdamW, place: int) -> None:
        self._weight, self._optimizer, self._place = weight, optimizer, place
        group = self._group
        assert group["weight_decay"] == 0, "embeddings don't decay"
        self._shrinks = group["betas"][0] / math.sqrt(group["betas"][1])
        if self._shrinks >= 1:
            raise UserError(
                f"training.betas {list(group['betas'])}: of static rows the first must be less "
                f"than the root of the second, {math.sqrt(group['betas'][1]):.4f}."
            )
        self._window = math.ceil(math.log(LEAST_PART) / math.log(max(self._shrinks, 1e-9)))
        self._settled_at: int | None = None
        self._seen_at: Any = None
        """int64 [V], steps since the rows were settled."""
        self._moves: Any = None
        """[steps since then + 1]: how far, in (first moment / root of the second) of that time, a
        row has moved since it was seen at each of them."""

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.param_groups[self._place]

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state[self._weight]
        return state

    def missing(self, ids: Tensor) -> Tensor | None:
        """What rows [..., r] of ids lack; None where all are as they should be."""
        if self._settled_at is None or len(self._moves) == 1:
            return None
        moves = self._moves[self._seen_at[ids]].unsqueeze(-1)
        state = self._state
        return -moves * self._ratio(state["exp_avg"][ids], state["exp_avg_sq"][ids])

    def _ratio(self, first: Tensor, second: Tensor) -> Tensor:
        taken = max(1, self._settled_at + len(self._moves) - 1)  # type: ignore[operator]
        correction = math.sqrt(1 - self._group["betas"][1] ** taken)
        return first.float() / (second.float().sqrt() + self._group["eps"] * correction)

    def step(self, ids: Tensor, gradient: Tensor) -> None:
        """One step with the gradients [U, r] of ids [U], which are all different."""
        state = self._begun()
        number = len(self._moves) - 1  # steps since the rows were settled
        beta1, beta2 = self._group["betas"]
        weight, first, second = self._now(ids, number)
        gradient = gradient.float()
        first = first.lerp(gradient, 1 - beta1)
        second = second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["step"] += 1
        reach, correction = self._reach()
        eps = self._group["eps"] * correction
        weight = weight - reach * first / (second.sqrt() + eps)
        for whole, part in (
            (self._weight, weight),
            (state["exp_avg"], first),
            (state["exp_avg_sq"], second),
        ):
            whole.index_copy_(0, ids, part.to(whole.dtype))
        self._seen_at[ids] = number + 1
        self._pass_on(reach)

    def _begun(self) -> dict[str, Any]:
        """The state, with what belongs to settled rows where there is none yet."""
        state = self._state
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=self._weight.device)
            state["exp_avg"] = torch.zeros_like(self._weight)
            state["exp_avg_sq"] = torch.zeros_like(self._weight)
        if self._settled_at is None:
            self._begin_from(int(state["step"]))
        return state

    def forget(self) -> None:
        """All rows are as they should be, and so is the state."""
        self._settled_at = None

    def _begin_from(self, step: int) -> None:
        self._settled_at = step
        device = self._weight.device
        self._seen_at = torch.zeros(len(self._weight), dtype=torch.int64, device=device)
        self._moves = torch.zeros(1, device=device)

    def _now(self, ids: Tensor | slice, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and moments of ids, float32, where AdamW would have them after `number` steps."""
        state = self._state
        seen_at = self._seen_at[ids]
        first, second = state["exp_avg"][ids].float(), state["exp_avg_sq"][ids].float()
        moves = self._moves[seen_at].unsqueeze(1)
        weight = self._weight[ids].float() - moves * self._ratio(first, second)
        passed = (number - seen_at).unsqueeze(1).float()
        beta1, beta2 = self._group["betas"]
        return weight, first * beta1**passed, second * beta2**passed

    def _reach(self) -> tuple[float, float]:
        """How far this step moves a row whose moments are equal in size, and the root of the
        second moment's correction."""
        taken = self._settled_at + len(self._moves)  # type: ignore[operator]
        beta1, beta2 = self._group["betas"]
        correction = math.sqrt(1 - beta2**taken)
        return float(self._group["lr"]) * correction / (1 - beta1**taken), correction

    def _pass_on(self, reach: float) -> None:
        """Let every row that was not seen move as well: on paper."""
        moves = self._moves
        window = moves[-self._window :]
        ages = torch.arange(len(window), 0, -1, device=moves.device, dtype=moves.dtype)
        window += reach * self._shrinks**ages
        self._moves = torch.cat([moves, moves.new_zeros(1)])

    def settle(self) -> None:
        """See `RowAdamW.settle`."""
        if self._settled_at is None or len(self._moves) == 1:
            return
        state = self._state
        number = len(self._moves) - 1
        for start in range(0, len(self._weight), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            found = self._now(part, number)
            wholes = (self._weight, state["exp_avg"], state["exp_avg_sq"])
            for whole, value in zip(wholes, found, strict=True):
                whole[part] = value.to(whole.dtype)
        self.forget()


_AT_ONCE = 2**16
"""Rows that are settled together."""


# ----------------------------------------------------------------------------- among processes


def keep_whole(model: nn.Module) -> list[nn.Embedding]:
    """Give all processes the same static rows, and keep DDP from them; gives them back."""
    rows = static_rows(model)
    if not rows or not dist.is_initialized():
        return rows
    for embedding in rows:
        dist.broadcast(embedding.weight.data, src=0)
    weights = {id(embedding.weight) for embedding in rows}
    names = [name for name, p in model.named_parameters() if id(p) in weights]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return rows


@torch.no_grad()
def exchange_gradients(rows: Sequence[nn.Embedding]) -> None:
    """Make the sparse gradients of static rows the mean over all processes.

    All layers of a process saw the same ids; what is sent are these and their rows' gradients.
    """
    gradients = [row.weight.grad.coalesce() for row in rows if row.weight.grad is not None]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        ids = [gradient.indices()[0] for gradient in gradients]
        values = [gradient.values() for gradient in gradients]
    else:
        assert len(gradients) == len(rows), "every layer is in every step"
        together = torch.cat([gradient.values() for gradient in gradients], dim=1)
        union, mean = _mean_over_processes(gradients[0].indices()[0], together)
        ids = [union] * len(rows)
        values = list(mean.split([row.embedding_dim for row in rows], dim=1))
    trained = [row.weight for row in rows if row.weight.grad is not None]
    for weight, places, value in zip(trained, ids, values, strict=True):
        weight.grad = torch.sparse_coo_tensor(
            places.unsqueeze(0), value, weight.shape, is_coalesced=True, check_invariants=False
        )


def _mean_over_processes(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [U] and values [U, n] of each process -> those of any, and the sum over processes by
    their number. The same bits everywhere."""
    count = dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=ids.device) for _ in range(count)]
    dist.all_gather(lengths, torch.tensor([len(ids)], device=ids.device))
    sizes = [int(length) for length in lengths]
    missing = max(sizes) - len(ids)
    padded = (
        torch.cat([ids, ids.new_zeros(missing)]),
        torch.cat([values, values.new_zeros(missing, values.shape[1])]),
    )
    gathered = []
    for mine in padded:
        everyone = [torch.empty_like(mine) for _ in range(count)]
        dist.all_gather(everyone, mine.contiguous())
        gathered.append([part[:size] for part, size in zip(everyone, sizes, strict=True)])
    union, places = torch.unique(torch.cat(gathered[0]), return_inverse=True)
    total = values.new_zeros(len(union), values.shape[1])
    # One process after the other: the ids of each are all different, so no order is left open.
    for place, part in zip(places.split(sizes), gathered[1], strict=True):
        total.index_add_(0, place, part)
    return union, total / count


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter], rows: Sequence[nn.Embedding], max_norm: float
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where the gradients of static rows are sparse.

    Args:
        parameters: all that are trained, `rows` among them.
        rows: whose gradients were exchanged.
        max_norm: the largest norm of all gradients together.

    Returns:
        Their norm before.
    """
    apart = {row.weight for row in rows}
    dense = [p.grad for p in parameters if p.grad is not None and p not in apart]
    found = nn.utils.get_total_norm(dense)
    norm = found.full_tensor() if hasattr(found, "full_tensor") else found
    sparse = [row.weight.grad.values() for row in rows if row.weight.grad is not None]
    if sparse:
        norm = torch.linalg.vector_norm(
            torch.stack([norm, nn.utils.get_total_norm(sparse).to(norm.device)])
        )
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for gradients in (dense, sparse):
        if gradients:
            torch._foreach_mul_(gradients, factor)
    return norm
