"""The mixture of experts that MoLE is compared with, on the same backbone.

Each block's FFN is N experts on the hidden state, `down(gelu(up(h)))` without a gate, of which a
router selects k per token; the selected are weighed by a softmax over their logits alone. A shared
expert, which every token uses, can stand beside them; the paper's baseline has none. In the paper
(arXiv 2503.15798, section 4.1) k is 2, an expert is half as large as the dense FFN, the
load-balance loss weighs 0.01 and the z-loss 0.001.

Shapes: S positions, d hidden size, D hidden size of an expert, N experts, k selected per position.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.initialization import guard_torch_init_functions

from lookup_experts.errors import UserError
from lookup_experts.model.gateless_llama import GatelessLlamaConfig, GatelessMLP
from lookup_experts.model.input_gradients import InputGradientsMixin
from lookup_experts.model.router_losses import add_router_losses, record_logits

_ALIGNMENT = 16
"""Bytes that the rows of a grouped matrix product must be a multiple of."""


class MoeGatelessLlamaConfig(GatelessLlamaConfig):
    """That of the backbone with a mixture of experts; `intermediate_size` is of one expert.

    `shared_size` is the hidden size of an expert that every token uses; None: there is none.
    """

    model_type = "moe_gateless_llama"

    num_experts: int = 10
    num_experts_per_tok: int = 2
    shared_size: int | None = None
    load_balance_loss: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_experts_per_token(self.num_experts_per_tok, self.num_experts)


def check_experts_per_token(selected: int, num_experts: int) -> None:
    """Raise a `UserError` unless so many of the experts can be selected."""
    if not 1 <= selected <= num_experts:
        raise UserError(
            f"num_experts_per_tok is {selected}; expected 1 to {num_experts}, the number of "
            "experts."
        )


def select_experts(logits: Tensor, num_selected: int) -> tuple[Tensor, Tensor]:
    """The experts of the highest logits and their shares.

    Args:
        logits: [S, N], what the router gives.
        num_selected: k.

    Returns:
        Numbers of experts [S, k] int64, and weights [S, k] float32 that add up to 1.
    """
    highest, selected = logits.topk(num_selected, dim=-1)
    return selected, highest.softmax(dim=-1, dtype=torch.float32)


def mix_selected(
    hidden: Tensor, selected: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Each position's weighted sum of what its selected experts say.

    Computes only the selected pairs of position and expert, sorted by expert: one grouped matrix
    product where there is a kernel for it (CUDA, without waiting for the device), else one product
    per expert that was selected. A single position on the CPU needs no sorting.

    Args:
        hidden: [S, d] floating point.
        selected: [S, k] int64, the experts of each position, all different.
        weights: [S, k] floating point.
        up_proj: [N, D, d].
        down_proj: [N, d, D].

    Returns:
        [S, d] in the dtype that matrix products have here (autocast's, if it is on).
    """
    if hidden.is_cuda and _has_grouped_product(up_proj):
        return mix_selected_grouped(hidden, selected, weights, up_proj, down_proj)
    if hidden.shape[0] == 1 and not hidden.is_cuda:
        return mix_selected_single(hidden, selected, weights, up_proj, down_proj)
    return mix_selected_sliced(hidden, selected, weights, up_proj, down_proj)


def mix_selected_reference(
    hidden: Tensor, selected: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """`mix_selected` by the book: one expert after the other, on the positions that chose it."""
    mixed = None
    for expert in range(up_proj.shape[0]):
        positions, places = torch.where(selected == expert)
        said = F.linear(F.gelu(F.linear(hidden[positions], up_proj[expert])), down_proj[expert])
        said = said * weights[positions, places, None].to(said.dtype)
        mixed = said.new_zeros(hidden.shape) if mixed is None else mixed
        mixed = mixed.index_add(0, positions, said)
    assert mixed is not None
    return mixed


def mix_selected_sliced(
    hidden: Tensor, selected: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """`mix_selected` with a matrix product per expert on its slice of one sorted buffer."""
    pairs, order = selected.flatten().sort(stable=True)
    counts = torch.bincount(pairs, minlength=up_proj.shape[0]).tolist()
    positions = order // selected.shape[1]
    # `unbind` takes the gradients of all slices back in one pass; indexing would write a whole
    # tensor of zeros for each expert.
    slices = zip(
        hidden.index_select(0, positions).split(counts),
        up_proj.unbind(),
        down_proj.unbind(),
        strict=True,
    )
    said = torch.cat(
        [F.linear(F.gelu(F.linear(part, up)), down) for part, up, down in slices if len(part)]
    )
    return weighted_sum(said, weights, order, positions)


def mix_selected_single(
    hidden: Tensor, selected: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """`mix_selected` for one position, as in decoding: nothing to sort, one expert at a time."""
    said = torch.cat(
        [
            F.linear(F.gelu(F.linear(hidden, up_proj[expert])), down_proj[expert])
            for expert in selected[0].tolist()
        ]
    )
    return (said * weights.to(said.dtype).t()).sum(dim=0, keepdim=True)


def mix_selected_grouped(
    hidden: Tensor, selected: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """`mix_selected` with grouped matrix products: the shapes don't depend on what was selected."""
    num_experts = up_proj.shape[0]
    device = hidden.device
    if torch.is_autocast_enabled(device.type):  # which doesn't know grouped products
        dtype = torch.get_autocast_dtype(device.type)
        hidden, up_proj, down_proj = hidden.to(dtype), up_proj.to(dtype), down_proj.to(dtype)
    pairs, order = selected.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=device)
    ends = torch.searchsorted(pairs, experts, right=True, out_int32=True)
    positions = order // selected.shape[1]
    inputs = hidden.index_select(0, positions)
    activated = F.gelu(F.grouped_mm(inputs, up_proj.transpose(1, 2), offs=ends))
    said = F.grouped_mm(activated, down_proj.transpose(1, 2), offs=ends)
    return weighted_sum(said, weights, order, positions)


def _has_grouped_product(weight: Tensor) -> bool:
    """Are the rows of batched weights [N, out, in] aligned as the kernel needs them, both ways?"""
    size = 2 if torch.is_autocast_enabled(weight.device.type) else weight.element_size()
    return all(width * size % _ALIGNMENT == 0 for width in weight.shape[1:])


def weighted_sum(said: Tensor, weights: Tensor, order: Tensor, positions: Tensor) -> Tensor:
    """Sorted outputs [S·k, d] back to their positions: [S, d]."""
    shares = weights.flatten().index_select(0, order).unsqueeze(1)
    mixed = said.new_zeros(weights.shape[0], said.shape[1])
    return mixed.index_add(0, positions, said * shares.to(said.dtype))


class MoeExperts(nn.Module):
    """The N experts of one layer as batched weights in the layout of `nn.Linear`.

    Args:
        num_experts: N.
        hidden_size: d, what comes in and goes out.
        expert_size: D, the hidden size of each expert.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """[S, d], [S, k], [S, k] -> [S, d]; see `mix_selected`."""
        return mix_selected(hidden, selected, weights, self.up_proj, self.down_proj)


class MoeFFN(nn.Module):
    """A block's router and its experts, in place of a dense FFN.

    Args:
        config: its sizes.
    """

    def __init__(self, config: MoeGatelessLlamaConfig) -> None:
        super().__init__()
        self.num_selected = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = MoeExperts(config.num_experts, config.hidden_size, config.intermediate_size)
        self.shared: GatelessMLP | None = None
        if config.shared_size is not None:
            self.shared = GatelessMLP(config.hidden_size, config.shared_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(hidden)
        record_logits(logits)
        selected, weights = select_experts(logits, self.num_selected)
        mixed = self.experts(hidden, selected, weights).view(hidden_states.shape)
        return mixed if self.shared is None else mixed + self.shared(hidden_states)


class MoeGatelessLlamaForCausalLM(InputGradientsMixin, LlamaForCausalLM):
    """The paper's backbone with a mixture of experts in every block.

    In training its loss includes the routers' auxiliary losses; `router_losses` has them apart.
    """

    config_class = MoeGatelessLlamaConfig

    def __init__(self, config: MoeGatelessLlamaConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.mlp = MoeFFN(config)
        self.init_weights()
        add_router_losses(self, config.num_experts_per_tok, config.load_balance_loss, config.z_loss)

    @property
    def moe_layers(self) -> list[MoeFFN]:
        """Of every block, in order."""
        return [block.mlp for block in self.model.layers]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Batched weights are no modules that transformers knows to initialise."""
        super().initialize_weights()
        with guard_torch_init_functions():  # weights that were loaded stay
            for module in self.modules():
                if isinstance(module, MoeExperts):
                    for weight in module.parameters():
                        nn.init.normal_(weight, 0.0, self.config.initializer_range)


def count_active(model: Any) -> int:
    """The parameters of a model that a token uses: of its experts, the selected ones."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, MoeFFN):
            experts = sum(parameter.numel() for parameter in module.experts.parameters())
            num_experts = module.router.out_features
            total -= experts // num_experts * (num_experts - module.num_selected)
    return total
