"""What of a model's experts is kept outside of the GPU, and what of that one token needs.

The formulas of the paper (arXiv 2503.15798, Table 1), of all layers together: for what a table
holds and for a mixture of experts whose routed experts are loaded when they are selected.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Offloaded:
    """Numbers outside of the GPU."""

    parameters: int
    """All of them."""
    loaded_per_token: int
    """Those that one token needs; of a mixture of experts in the worst case, none being there."""


def offloaded_table(num_layers: int, num_experts: int, row_size: int, vocab_size: int) -> Offloaded:
    """The table of lookup experts: r·N·V per layer, of which a token loads r·N; in the paper a
    row is as wide as the model, r = d."""
    per_token = num_layers * num_experts * row_size
    return Offloaded(per_token * vocab_size, per_token)


def offloaded_mixture(
    num_layers: int, num_experts: int, experts_per_token: int, hidden_size: int, expert_size: int
) -> Offloaded:
    """A mixture's routed experts: 2·d·N·D per layer, of which a token loads 2·d·k·D."""
    per_expert = num_layers * 2 * hidden_size * expert_size
    return Offloaded(num_experts * per_expert, experts_per_token * per_expert)
