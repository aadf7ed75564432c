"""One model over many processes: FSDP2, PyTorch's `fully_shard`.

Each block is a unit whose weights are gathered for its forward and backward passes and freed after
them; a block's experts are evaluated within it, so they are gathered with it. Accelerate would do
the same from its configuration; here it is done before the weights exist, so that a model larger
than one process's memory can begin, and along a dimension that the processes divide, since a
stack of 4 experts cut along its first would leave all but 4 processes empty-handed.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lookup_experts.errors import UserError
from lookup_experts.training.row_updates import static_rows

MAX_FILE_BYTES = 2 * 10**9
"""Of a weights file of the trained model: what the writing process holds at once."""
LAUNCHER_SWITCH = "ACCELERATE_USE_FSDP"
"""Set to true by `accelerate launch` with a configuration whose distributed_type is FSDP."""


def take_over_from_launcher() -> bool:
    """Whether `accelerate launch` asks for sharding; accelerate itself is then told not to.

    Raises:
        UserError: it asks for a kind of sharding that this project doesn't do.
    """
    if os.environ.get(LAUNCHER_SWITCH, "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "The accelerate configuration asks for FSDP 1; set fsdp_version: 2 in its fsdp_config."
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError(
            "The accelerate configuration asks for fsdp_offload_params, which is not supported; "
            "use more processes, or training.gradient_checkpointing."
        )
    os.environ[LAUNCHER_SWITCH] = "false"
    return True


def join_processes() -> torch.device:
    """Join the processes that torchrun started, where that has not been done; this one's device."""
    from accelerate import PartialState

    if "RANK" not in os.environ:
        raise UserError(
            "Sharding needs the processes of torchrun, if only one: "
            "`torchrun --nproc-per-node N -m lookup_experts.cli train ... --shard`."
        )
    device = PartialState(cpu=not torch.cuda.is_available()).device
    assert isinstance(device, torch.device)
    return device


def shard_model(model: Any, device: torch.device) -> None:
    """Cut a model's parameters into one shard per process, in place; on the meta device, mostly.

    Static rows stay whole in every process (`row_updates.py`).

    Args:
        model: a transformers model, which names the classes of its blocks.
        device: of this process; the processes' group exists already.

    Raises:
        UserError: the model names no classes of blocks that it has.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f"{type(model).__name__} doesn't name its blocks (_no_split_modules), so it can't be "
            "sharded; train it without --shard."
        )
    # Of static rows a step needs few: gathering them would send all.
    whole: Any = {rows.weight for rows in static_rows(model)}
    for part in [*blocks, model]:
        fully_shard(
            part, mesh=mesh, shard_placement_fn=_placement(mesh.size()), ignored_params=whole
        )
    for rows in static_rows(model):
        if not rows.weight.is_meta:
            rows.to(device)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def _placement(num_processes: int) -> Any:
    def choose(parameter: nn.Parameter) -> Shard:
        """The first dimension that is cut into equal parts; only the first may be cut unevenly."""
        for dimension, size in enumerate(parameter.shape):
            if size % num_processes == 0:
                return Shard(dimension)
        return Shard(0)

    return choose


def write_sharded_model(model: Any, folder: Path, writes: bool) -> None:
    """A Hugging Face folder of a sharded model, a few parameters at a time.

    Args:
        model: all processes call this together; each parameter is gathered in turn.
        folder: to be created.
        writes: whether this process is the one that writes; it never holds more than
            `MAX_FILE_BYTES` and one parameter.
    """
    groups = list(_by_size(model.state_dict()))
    names = [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number in range(1, len(groups) + 1)
    ]
    if writes:
        folder.mkdir(parents=True)
        _write_configuration(model, folder)
        places = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        total = sum(tensor.nbytes for group in groups for tensor in group.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, group in zip(names, groups, strict=True):
        held = {}
        for name, tensor in group.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if writes:
                held[name] = whole.cpu().contiguous()
        if writes:
            save_file(held, folder / file, metadata={"format": "pt"})


def write_gathered_model(model: Any, folder: Path, writes: bool) -> None:
    """A Hugging Face folder of a sharded model as its own `save_pretrained` writes it.

    Args:
        model: all processes call this together; each parameter is gathered in turn.
        folder: to be created.
        writes: whether this process is the one that writes; it holds the whole model, as each
            does that has loaded one.
    """
    weights: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}  # tied weights stay one tensor, which is written once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            value = tensor.detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            gathered[id(tensor)] = whole.cpu().contiguous() if writes else whole.new_empty(0)
        weights[name] = gathered[id(tensor)]
    if writes:
        model.save_pretrained(folder, state_dict=weights)


def _by_size(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A model's tensors in their order, in groups of up to `MAX_FILE_BYTES`."""
    group: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in state.items():
        if group and num_bytes + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group, num_bytes = {}, 0
        group[name] = tensor
        num_bytes += tensor.nbytes
    yield group


def _write_configuration(model: Any, folder: Path) -> None:
    """As `save_pretrained` does; `fully_shard` has put FSDP before the class's name."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
