"""Each position's weighted sum, straight out of encoded records on a device.

`decode_and_mix` is one operation for the decoding of `encoding.py` and the sum of
`model/rows.py`: for each position it reads its record's codes, and no row is ever written to
memory. `route_mix_add`, `route_mix_project` and `gate_project` are all that a block's lookup
experts do, in one operation: a step of decoding takes a GPU longer to be told of each operation
than to do it. On CUDA they are kernels of `kernels.py` and `step_kernels.py`; elsewhere they are
their references.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.table.encoding import Encoding, get_encoding


def decode_and_mix(
    records: Tensor,
    places: Tensor,
    weights: Tensor,
    encoding: Encoding,
    hidden_size: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """What the experts of one layer say at each position, summed in float32.

    Args:
        records: uint8 [M, W], contiguous.
        places: int64 [P], each position's row of `records`.
        weights: [P, N], any float type.
        encoding: of the records.
        hidden_size: d.
        offset: the byte of a row where the layer's codes begin.
        dtype: of the result.

    Returns:
        [P, d]; no gradients.
    """
    if torch.compiler.is_compiling():
        # As one opaque operation: a graph neither looks into it nor splits at it.
        operation = torch.ops.lookup_experts.decode_and_mix
        block_size = encoding.block_size or 0
        return operation(
            records, places, weights, encoding.name, block_size, hidden_size, offset, dtype
        )
    return _run(records, places, weights, encoding, hidden_size, offset, dtype)


def decode_and_mix_reference(
    records: Tensor,
    places: Tensor,
    weights: Tensor,
    encoding: Encoding,
    hidden_size: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same by the book: all rows [P, N, d] in float32, then an einsum."""
    num_experts = weights.shape[1]
    layer_bytes = encoding.layer_bytes(num_experts, hidden_size)
    layer = records[:, offset : offset + layer_bytes].index_select(0, places)
    rows = encoding.decode(layer, num_experts, hidden_size, torch.float32)
    return torch.einsum("pnd,pn->pd", rows, weights.float()).to(dtype)


def route_mix_add(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor | None,
    encoding: Encoding,
    offset: int,
    residual: Tensor | None = None,
) -> Tensor:
    """An FFN's output and what the layer's experts add, if rows are as wide as the model: the
    router's softmax included, in float32 throughout, rounded once.

    Args:
        records: uint8 [M, W], contiguous.
        places: int64 [P], each position's row of `records`; None: the same as the position.
        hidden_states: [..., d], P positions; what the FFN and the router see.
        router: [N, d], the router's weight.
        output: [..., d], what the FFN gives; None: nothing, what is added is asked for.
        encoding: of the records.
        offset: the byte of a row where the layer's codes begin.
        residual: [..., d], what else is to be added; not in a compiled graph.

    Returns:
        Like `hidden_states`, contiguous; no gradients.
    """
    if torch.compiler.is_compiling():
        assert places is not None and output is not None and residual is None
        operation = torch.ops.lookup_experts.route_mix_add
        block_size = encoding.block_size or 0
        return operation(
            records, places, hidden_states, router, output, encoding.name, block_size, offset
        )
    return _run_fused(records, places, hidden_states, router, output, encoding, offset, residual)


def route_mix_add_reference(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor | None,
    encoding: Encoding,
    offset: int,
    residual: Tensor | None = None,
) -> Tensor:
    """The same by the book: logits, their softmax, the weighted sum, the additions."""
    mixed = _routed(records, places, hidden_states, router, encoding, router.shape[1], offset)
    total = mixed.view(hidden_states.shape)
    for added in (output, residual):
        total = total if added is None else total + added.float()
    return total.to(hidden_states.dtype).contiguous()


def route_mix_project(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    out_proj: Tensor,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """What the layer's experts add, if rows are narrow: router, sum and product, in float32
    throughout, rounded once.

    Args:
        out_proj: [d, r], the weight of the product.
        others: as in `route_mix_add`, of rows of r numbers.

    Returns:
        Like `hidden_states`, contiguous; no gradients.
    """
    arguments = (records, places, hidden_states, router, out_proj, encoding, offset)
    if records.device.type != "cuda":
        return route_mix_project_reference(*arguments)
    from lookup_experts.table.step_kernels import route_mix_project_kernel

    with _current(records.device):
        return route_mix_project_kernel(*arguments)


def route_mix_project_reference(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    out_proj: Tensor,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """The same by the book."""
    row_size = out_proj.shape[1]
    mixed = _routed(records, places, hidden_states, router, encoding, row_size, offset)
    added = mixed @ out_proj.float().T
    return added.view(hidden_states.shape).to(hidden_states.dtype).contiguous()


def gate_project(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    gate: Tensor,
    out_proj: Tensor,
    norm: Tensor,
    epsilon: float,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """RMSNorm(out_proj · (sigmoid(gate · h) + row)), in float32 throughout, rounded once.

    Args:
        gate: [r, d].
        out_proj: [d, r].
        norm: [d], the norm's weight.
        epsilon: the norm's.
        others: as in `route_mix_add`, of one row of r numbers.

    Returns:
        Like `hidden_states`, contiguous; no gradients.
    """
    arguments = (
        records, places, hidden_states, gate, out_proj, norm, epsilon, encoding, offset,
    )  # fmt: skip
    if records.device.type != "cuda":
        return gate_project_reference(*arguments)
    from lookup_experts.table.step_kernels import gate_project_kernel

    with _current(records.device):
        return gate_project_kernel(*arguments)


def gate_project_reference(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    gate: Tensor,
    out_proj: Tensor,
    norm: Tensor,
    epsilon: float,
    encoding: Encoding,
    offset: int,
) -> Tensor:
    """The same by the book."""
    row_size, hidden_size = gate.shape
    states = hidden_states.reshape(-1, hidden_size).float()
    one = torch.ones(len(states), 1, device=records.device)
    row = decode_and_mix_reference(
        records, _places(places, records, len(states)), one, encoding, row_size, offset,
        torch.float32,
    )  # fmt: skip
    inner = torch.sigmoid(states @ gate.float().T) + row
    normed = torch.nn.functional.rms_norm(
        inner @ out_proj.float().T, (hidden_size,), norm.float(), epsilon
    )
    return normed.view(hidden_states.shape).to(hidden_states.dtype).contiguous()


def add_three(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The sum of three tensors of one shape and float type, rounded once; contiguous."""
    if first.device.type != "cuda":
        return add_three_reference(first, second, third)
    from lookup_experts.table.step_kernels import add_three_kernel

    with _current(first.device):
        return add_three_kernel(first, second, third)


def add_three_reference(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The same by the book."""
    return (first.float() + second.float() + third.float()).to(first.dtype).contiguous()


def _routed(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    encoding: Encoding,
    row_size: int,
    offset: int,
) -> Tensor:
    """Each position's rows, weighed by the router, float32 [P, r]."""
    states = hidden_states.reshape(-1, router.shape[1])
    weights = (states.float() @ router.float().T).softmax(dim=-1)
    return decode_and_mix_reference(
        records, _places(places, records, len(states)), weights, encoding, row_size, offset,
        torch.float32,
    )  # fmt: skip


def _places(places: Tensor | None, records: Tensor, num_positions: int) -> Tensor:
    if places is None:
        return torch.arange(num_positions, device=records.device)
    return places


def prepare(encoding: Encoding, num_experts: int, hidden_size: int, device: torch.device) -> None:
    """Bring to the device what mixing there needs, so that no step has to.

    Raises:
        UserError: Triton is missing.
    """
    if device.type != "cuda":
        return
    try:
        from lookup_experts.table import kernels
    except ImportError as error:
        raise UserError(
            "Reading a table for a CUDA device needs Triton, which comes with torch for CUDA on "
            f"Linux and isn't here ({error}). Install it with: pip install triton"
        ) from error
    kernels.codes_of(encoding, num_experts, hidden_size, device)


def _run(
    records: Tensor,
    places: Tensor,
    weights: Tensor,
    encoding: Encoding,
    hidden_size: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    if records.device.type != "cuda":
        return decode_and_mix_reference(
            records, places, weights, encoding, hidden_size, offset, dtype
        )
    from lookup_experts.table.kernels import decode_and_mix_kernel

    with _current(records.device):
        return decode_and_mix_kernel(records, places, weights, encoding, hidden_size, offset, dtype)


def _run_fused(
    records: Tensor,
    places: Tensor | None,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor | None,
    encoding: Encoding,
    offset: int,
    residual: Tensor | None = None,
) -> Tensor:
    arguments = (records, places, hidden_states, router, output, encoding, offset, residual)
    if records.device.type != "cuda":
        return route_mix_add_reference(*arguments)
    from lookup_experts.table.step_kernels import route_mix_add_kernel

    with _current(records.device):
        return route_mix_add_kernel(*arguments)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """The current device is where Triton launches; mostly it is the right one already."""
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@torch.library.custom_op("lookup_experts::decode_and_mix", mutates_args=())
def _operation(
    records: Tensor,
    places: Tensor,
    weights: Tensor,
    encoding: str,
    block_size: int,
    hidden_size: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    found = get_encoding(encoding, block_size or None)
    return _run(records, places, weights, found, hidden_size, offset, dtype)


@_operation.register_fake
def _shape_of_result(
    records: Tensor,
    places: Tensor,
    weights: Tensor,
    encoding: str,
    block_size: int,
    hidden_size: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return weights.new_empty((weights.shape[0], hidden_size), dtype=dtype)


@torch.library.custom_op("lookup_experts::route_mix_add", mutates_args=())
def _fused_operation(
    records: Tensor,
    places: Tensor,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor,
    encoding: str,
    block_size: int,
    offset: int,
) -> Tensor:
    found = get_encoding(encoding, block_size or None)
    return _run_fused(records, places, hidden_states, router, output, found, offset)


@_fused_operation.register_fake
def _shape_of_fused_result(
    records: Tensor,
    places: Tensor,
    hidden_states: Tensor,
    router: Tensor,
    output: Tensor,
    encoding: str,
    block_size: int,
    offset: int,
) -> Tensor:
    return output.new_empty(output.shape)
