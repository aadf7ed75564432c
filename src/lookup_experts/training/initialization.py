"""The weights of a model before training, each from a random stream of its own.

The stream of a parameter is decided by the seed and the parameter's name. So one process, several
with whole copies and several with a shard each begin with the same bits, and no process ever holds
more than one whole parameter beside its shards.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def give_weights(model: nn.Module, device: torch.device, seed: int, std: float) -> None:
    """Allocate a model's parameters, which are on the meta device, and fill them.

    Args:
        model: as `build_without_weights` gives it, whole or sharded over processes.
        device: where the weights go; the model's buffers go there too.
        seed: the recipe's.
        std: the standard deviation of matrices; the weights of norms and scales are 1.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.to_empty(device=device)
    for module, name, buffer in buffers:  # `to_empty` forgets their values
        module._buffers[name] = buffer.to(device)
    for name, parameter in model.named_parameters():
        _fill(parameter, draw(name, parameter.shape, seed, std))


def draw(name: str, shape: torch.Size, seed: int, std: float) -> Tensor:
    """The whole of one parameter before training: float32, on the CPU."""
    if len(shape) == 1:
        assert "norm" in name or "scale" in name, (
            name
        )  # biases, which models here don't have, would begin at 0
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def _fill(parameter: Tensor, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    # Every process has drawn the same, so each takes its part without asking the others.
    mesh, placements = parameter.device_mesh, parameter.placements
    on_device = whole.to(parameter.device)
    parameter.copy_(distribute_tensor(on_device, mesh, placements, src_data_rank=None))
