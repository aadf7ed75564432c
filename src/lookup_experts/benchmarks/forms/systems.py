"""What the study compares, as names, recipes and models."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lookup_experts.benchmarks.forms.parts import MEKI, PartsBlock, PartsRows
from lookup_experts.model.forms import Sizes
from lookup_experts.model.wiring import hidden_size_of
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape
from lookup_experts.training.initialization import give_weights
from lookup_experts.training.models import build_without_weights
from lookup_experts.training.recipe import ExpertsRecipe, ModelRecipe, Recipe

PAPER_ROWS = 4
"""MoLE-4E's, whose table in bfloat16 is the measure of all bytes."""
NORM_EPS = 1e-6


@dataclass(frozen=True)
class System:
    """One model of the study."""

    form: str
    """`dense`, `mole`, `meki`, or `parts`: those of `parts`."""
    num_rows: int = 0
    """N, rows of one id and layer."""
    row_size: int = 0
    """r"""
    expert_size: int | None = None
    """D; None: as the form has it."""
    parts: tuple[str, ...] = ()
    widened_by: int = 0
    """Of dense: units that every FFN has more."""

    @property
    def name(self) -> str:
        """Tells it from all others."""
        if self.form == "dense":
            return f"dense, FFN + {self.widened_by}" if self.widened_by else "dense"
        words = [{"mole": f"mole-{self.num_rows}e", "meki": "meki"}.get(self.form, "")]
        if self.form == "parts":
            words = [self._parts_in_words]
            if self.num_rows > 1:
                words.append(f"{self.num_rows} rows")
        words.append(f"r {self.row_size}")
        if self.expert_size is not None:
            words.append(f"size {self.expert_size}")
        return ", ".join(words)

    @property
    def _parts_in_words(self) -> str:
        left_out = [part for part in MEKI if part not in self.parts]
        if len(left_out) > 1:
            return " + ".join(self.parts)
        added = [part for part in self.parts if part not in MEKI]
        return "".join(
            ["meki", *(f" without {part}" for part in left_out), *(f" with {p}" for p in added)]
        )

    @property
    def family(self) -> str:
        """Whose learning rate it takes: `dense`, `mole` or `meki`."""
        return "meki" if self.form == "parts" else self.form

    def recipe(self, base: Recipe, *, tokens: int, seed: int, learning_rate: float) -> Recipe:
        """The dense base recipe with this system's experts, as far as recipes know them."""
        model = base.model
        if self.form == "dense":
            model = replace(model, ffn_size=model.ffn_size + self.widened_by)
        elif self.form == "mole":
            experts = ExpertsRecipe(
                num_experts=self.num_rows, row_size=self.row_size, size=self.expert_size
            )
            model = replace(model, experts=experts)
        else:
            experts = ExpertsRecipe(form="meki", row_size=self.row_size, size=self.expert_size)
            model = replace(model, experts=experts)
        training = replace(
            base.training, tokens=tokens, steps=None, seed=seed, learning_rate=learning_rate
        )
        return replace(base, model=model, training=training)

    def build(self, recipe: Recipe, vocab_size: int, device: torch.device) -> Any:
        """Its model before training; the same seed gives the backbone the same weights."""
        model = build_without_weights(recipe, vocab_size)
        if self.form == "parts":
            self._put_parts(model, recipe.model, vocab_size)
        give_weights(model, device, recipe.training.seed, recipe.model.init_std)
        return model

    def _put_parts(self, model: Any, sizes: ModelRecipe, vocab_size: int) -> None:
        """In the places of the blocks of `meki`."""
        width = hidden_size_of(model)
        expert_size = self.expert_size or width // 2
        of_backbone = Sizes(vocab_size, width, width)
        shared = (self.row_size, NORM_EPS)
        with torch.device("meta"):
            for place, layer in enumerate(model.model.layers):
                block = PartsBlock(place, self.parts, self.num_rows, width, *shared)
                block.routed = PartsRows(
                    self.parts, self.num_rows, of_backbone, expert_size, *shared
                )
                layer.mlp.lookup_experts = block

    def table_bytes(self, sizes: ModelRecipe, vocab_size: int, encoding: str) -> int:
        """Of its table, padding included."""
        shape = TableShape(vocab_size, sizes.num_layers, self.num_rows, self.row_size)
        return RecordLayout(shape, get_encoding(encoding)).table_bytes


def paper(width: int) -> System:
    """The paper's MoLE-4E."""
    return System("mole", PAPER_ROWS, width)


def meki(row_size: int, expert_size: int | None = None) -> System:
    """MeKi with rows of this size."""
    return System("meki", 1, row_size, expert_size)


def fitting_row(width: int, divisor: int) -> int:
    """The longest row that in nf4, with its scale, takes that part of the paper's bytes in
    bfloat16; a multiple of four, or the smallest row there is."""
    encoding = get_encoding("nf4")
    budget = 2 * PAPER_ROWS * width // divisor
    sizes = range(4, 2 * budget + 1, 4)
    return max((r for r in sizes if encoding.layer_bytes(1, r) <= budget), default=1)


def main_systems(width: int) -> list[System]:
    """The points of loss against bytes, what matters most first."""
    narrow = [max(1, width // part) for part in (4, 8, 2, 1)]
    fitting = [fitting_row(width, divisor) for divisor in (16, 32)]
    systems = [System("dense"), paper(width)]
    systems += [meki(r) for r in dict.fromkeys([*narrow[:1], *fitting, *narrow[1:]])]
    systems += [System("dense", widened_by=r) for r in (narrow[0], width)]
    systems += [System("mole", PAPER_ROWS, r) for r in narrow[:3]]
    for num_rows in (1, 16):
        systems += [System("mole", num_rows, r) for r in (width, *narrow[:3])]
    return systems


def taken_apart(width: int, ffn_size: int) -> list[System]:
    """MeKi at d/4 without one part, with few of them, with others, and on several rows."""
    row = max(1, width // 4)

    def system(*parts: str, num_rows: int = 1, row_size: int = row) -> System:
        return System("parts", num_rows, row_size, None, parts)

    def without(part: str) -> tuple[str, ...]:
        return tuple(other for other in MEKI if other != part)

    made = ("static", "computed")
    systems = [system(*without(part)) for part in MEKI]
    systems += [
        system(*MEKI, num_rows=4, row_size=max(1, row // 4)),
        system(*MEKI, num_rows=4),
        system(*MEKI, "input_norm"),
        meki(row, ffn_size),
        system(*without("gate"), "product_gate"),
    ]
    systems += [system(*made), system("static"), system("computed")]
    systems += [system(*made, part) for part in MEKI if part not in made]
    # As many bytes in nf4 as a sixteenth of the paper's.
    systems += [system(*MEKI, num_rows=2, row_size=fitting_row(width, 32))]
    return systems
