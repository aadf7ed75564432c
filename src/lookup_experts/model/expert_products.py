"""The matrix products of a layer's experts, and the normalisation of what they see.

The products do what autograd would do, with two differences that pay on large batches: the
activations are recomputed in the backward pass rather than kept, which halves the memory that
experts need; and on a CPU the experts are computed one after the other, so that what lies between
two products is of one expert's size. A GPU takes all experts in one batched product.

Shapes: U unique token ids, N experts, e embedding size, D hidden size of an expert, r row size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EXPERT_KINDS = ("gelu", "swiglu")


class NormWeight(nn.Module):
    """The weight of an RMSNorm whose division, the same in every layer, has been done.

    A module, though it is one product: weights that lie elsewhere are brought to the module that
    is called.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, normalized: Tensor) -> Tensor:
        """[U, e] -> [U, e] in the dtype of the weight."""
        return (normalized * self.weight).to(self.weight.dtype)


def normalize(embeddings: Tensor, eps: float | None) -> Tensor:
    """RMS normalisation without its weight, which is all that layers differ in.

    [U, e] -> [U, e], float32 where embeddings are shorter: rounded once, after the weight.
    """
    precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return F.rms_norm(precise, precise.shape[-1:], eps=eps)


def expert_outputs(kind: str, inputs: Tensor, into: Sequence[Tensor], down: Tensor) -> Tensor:
    """What N experts say of U inputs; differentiable once.

    Args:
        kind: one of `EXPERT_KINDS`.
        inputs: [U, e], normalised.
        into: the weights of the products before the activation, [N, D, e] each: up, or gate and
            up for `swiglu`.
        down: [N, d, D].

    Returns:
        [N, U, d], contiguous, in autocast's dtype if it is on, else in that of the inputs.
    """
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs, down = inputs.to(dtype), down.to(dtype)
        into = [weight.to(dtype) for weight in into]
    if torch.is_grad_enabled():
        outputs: Tensor = _ExpertOutputs.apply(kind, inputs, down, *into)
        return outputs
    return _forward(kind, inputs, into, down, kept=None)


class _ExpertOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, inputs: Tensor, down: Tensor, *into: Tensor) -> Tensor:
        kept = [inputs.new_empty(w.shape[0], inputs.shape[0], w.shape[1]) for w in into]
        outputs = _forward(kind, inputs, into, down, kept)
        ctx.kind = kind
        ctx.save_for_backward(inputs, down, *into, *kept)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, down, *rest = ctx.saved_tensors
        into, kept = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        wants_inputs, wants_down, *wants_into = ctx.needs_input_grad[1:]
        batch = inputs.unsqueeze(0)
        grad_inputs = torch.zeros_like(inputs) if wants_inputs else None
        grad_down = torch.empty_like(down) if wants_down else None
        grad_into = [
            torch.empty_like(weight) if wanted else None
            for weight, wanted in zip(into, wants_into, strict=True)
        ]
        for part in _parts(down):
            before = [hidden[part] for hidden in kept]
            grad_part = grad[part]
            if grad_down is not None:
                hidden = _activate(ctx.kind, before)
                torch.bmm(grad_part.mT, hidden, out=grad_down[part])
                del hidden
            grad_hidden = torch.bmm(grad_part, down[part])
            grad_before = _activate_backward(ctx.kind, grad_hidden, before)
            del grad_hidden
            for weight, gradient, found in zip(into, grad_into, grad_before, strict=True):
                if gradient is not None:
                    rows = batch.expand(found.shape[0], -1, -1)
                    torch.bmm(found.mT, rows, out=gradient[part])
                if grad_inputs is not None:
                    grad_inputs += torch.bmm(found, weight[part]).sum(0)
        return None, grad_inputs, grad_down, *grad_into


def _forward(
    kind: str, inputs: Tensor, into: Sequence[Tensor], down: Tensor, kept: list[Tensor] | None
) -> Tensor:
    """[N, U, d]; fills `kept`, [N, U, D] each, with what the activation was given."""
    batch = inputs.unsqueeze(0)
    outputs = inputs.new_empty(down.shape[0], inputs.shape[0], down.shape[1])
    for part in _parts(down):
        before = []
        for place, weight in enumerate(into):
            rows = batch.expand(weight[part].shape[0], -1, -1)
            if kept is None:
                before.append(torch.bmm(rows, weight[part].mT))
            else:
                before.append(torch.bmm(rows, weight[part].mT, out=kept[place][part]))
        torch.bmm(_activate(kind, before), down[part].mT, out=outputs[part])
    return outputs


def _parts(down: Tensor) -> list[slice]:
    """Which experts are computed at once."""
    num_experts = down.shape[0]
    if down.device.type == "cpu":
        return [slice(expert, expert + 1) for expert in range(num_experts)]
    return [slice(0, num_experts)]


def _activate(kind: str, before: Sequence[Tensor]) -> Tensor:
    if kind == "swiglu":
        gate, up = before
        return F.silu(gate) * up
    return F.gelu(before[0])


def _activate_backward(kind: str, grad: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each tensor that the activation was given."""
    if kind == "swiglu":
        gate, up = before
        return [torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)]
    return [torch.ops.aten.gelu_backward(grad, before[0])]
