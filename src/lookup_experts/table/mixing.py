"""Each position's weighted sum, straight out of encoded records on a device.

`decode_and_mix` is one operation for the decoding of `encoding.py` and the sum of
`model/experts.py`: for each position it reads its record's codes, and no row is ever written to
memory. On CUDA it is the kernel of `kernels.py`; elsewhere it is its reference.
"""

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


def prepare(encoding: Encoding, device: torch.device) -> None:
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
    kernels.codebook(encoding, device)


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

    with torch.cuda.device(records.device):  # the current one is where Triton launches
        return decode_and_mix_kernel(records, places, weights, encoding, hidden_size, offset, dtype)


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
