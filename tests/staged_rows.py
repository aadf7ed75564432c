"""Models whose rows lie as records in the order of their positions: a step's, ready to be read."""

from typing import Any

import pytest
import torch
from tiny_models import gateless_model
from torch import Tensor, nn

import lookup_experts as le
from lookup_experts.model.rows import mix
from lookup_experts.table.additions import StepRecords
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape

FORMS = {"wide": ("mole", None), "narrow": ("mole", 7), "gated": ("meki", 7)}
"""name -> form and row size."""
OPERATION_OF = {
    "wide": "route_mix_add",
    "narrow": "route_mix_project",
    "gated": "gate_project",
}
"""What does a block's part in a step."""


class StageRows(StepRecords):
    """Rows of records that lie in the order of the positions."""

    def __init__(
        self, layout: RecordLayout, dtype: torch.dtype, memory: Tensor, index: Tensor
    ) -> None:
        super().__init__(layout, dtype, memory.device, self._whole, None, index.numel())
        self.layout, self.dtype, self.memory = layout, dtype, memory
        self.index, self.num_positions = index, index.numel()

    def _whole(self, layer: int) -> tuple[Tensor, int]:
        return self.memory, layer * self.layout.layer_bytes

    def layer(self, layer: int, experts: nn.Module | None = None) -> Tensor:
        codes = self.memory[:, self.layout.layer_slice(layer)]
        shape = self.layout.shape
        return self.layout.encoding.decode(codes, shape.num_experts, shape.row_size, self.dtype)

    def mix(self, layer: int, weights: Tensor, experts: nn.Module | None = None) -> Tensor:
        places = torch.arange(self.num_positions, device=weights.device)
        return mix(self.layer(layer), places, weights)


class StageSource:
    """The rows of a model in training form as records, made when its ids enter."""

    def __init__(self, model: Any, encoding: str) -> None:
        self._source, self._encoding = model.expert_source, get_encoding(encoding)

    def rows(self, token_ids: Tensor, ready: bool = False, base_model: Any = None) -> StageRows:
        rows = self._source.rows(token_ids, ready, base_model)
        experts = [layer.mlp.lookup_experts.routed for layer in base_model.layers]
        layers = [
            rows.layer(number, each)[rows.index.view(-1)] for number, each in enumerate(experts)
        ]
        _, num_experts, row_size = layers[0].shape
        shape = TableShape(1000, len(layers), num_experts, row_size)
        layout = RecordLayout(shape, self._encoding)
        memory = torch.zeros(len(layers[0]), layout.stride, dtype=torch.uint8)
        codes = torch.cat([self._encoding.encode(each) for each in layers], dim=1)
        memory[:, : codes.shape[1]] = codes
        return StageRows(layout, layers[0].dtype, memory, rows.index)


def stage_model(form: str, encoding: str = "float32") -> Any:
    """A model of a form that takes its rows from records."""
    torch.manual_seed(0)
    name, row_size = FORMS[form]
    model = le.attach(gateless_model(), form=name, row_size=row_size, init="normal").eval()
    for block in model.lookup_blocks:
        for weight in block.parameters():
            nn.init.normal_(weight, 0.0, 0.3)
    model.set_expert_source(StageSource(model, encoding))
    return model


def by_the_book(model: Any, ids: Tensor) -> Tensor:
    """Its logits by operations that each do one thing; its rows matter to them."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("begin_routed", "begin_gated", "route_mix_add"):
            patch.setattr(StepRecords, name, lambda *_: None)
        logits: Tensor = model(input_ids=ids).logits
        assert (logits - gateless_model()(input_ids=ids).logits).abs().max() > 1e-2
    return logits
