"""What a recipe costs, from its sizes alone: `mole train --dry-run`.

No model is built and no data is read. The formulas are those of the paper (arXiv 2503.15798, Table
1) with what it leaves out: attention, the head, routers and norms, and the unique ids, for which
rows are made once each (`model/computed_rows.py`). What makes and what reads the rows of a layer
is asked of their form, whose modules have shapes without memory.

A FLOP is a multiplication or an addition; a matrix product of a token with a weight is two for
each weight. A backward pass takes two forward passes' worth.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any

from torch import nn

from lookup_experts.model.forms import Sizes, get_form, shapes_of_layer
from lookup_experts.model.offloaded import offloaded_mixture, offloaded_table
from lookup_experts.model.settings import LookupSettings
from lookup_experts.training.recipe import ModelRecipe, Recipe

BACKWARD = 2
"""FLOPs of a backward pass, in forward passes."""
# Tokens in a window of English prose (24 novels, GPT-NeoX's tokenizer) -> tokens per unique id.
_PROSE = ((128, 1.4), (512, 1.9), (2048, 2.7), (8192, 4.0), (32768, 6.9), (131072, 13.5))
_PROSE_END = (524288, 33.0)
_FLOAT32 = 4
# AdamW's two moments.
_OPTIMIZER_FLOATS = 2


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has."""

    total: int
    """In training form, all of them trained."""
    backbone: int
    """Without what lookup experts add; of a mixture of experts, everything."""
    routed_experts: int
    """Of the experts that a router chooses from or weighs, with their norms; of lookup experts,
    these become the table."""
    routers: int
    """Of all routers."""
    active: int
    """That a token uses while generating: without lookup experts, of a mixture the selected."""
    offloaded_experts: int
    """Numbers that are kept outside of the GPU: a table's, or a mixture's routed experts."""
    loaded_per_token: int
    """Numbers of these that one token needs; of a mixture in the worst case."""
    readers: int = 0
    """Of what reads the rows of lookup experts, which stays in memory: routers, gates, matrices
    from a row to the model's width, norms."""
    static_rows: int = 0
    """Of the routed experts, what is learnt for each token id by itself."""


@dataclass(frozen=True)
class Flops:
    """FLOPs per token."""

    training: float
    """Forward and backward, the experts once per unique id."""
    training_backbone: float
    """Of these the backbone's, with routers and the weighted sum."""
    training_experts: float
    """Of these the lookup experts', on unique ids."""
    training_experts_per_position: float
    """What they would be, were the experts evaluated at every position."""
    inference: float
    """A token at the end of a full context, the experts in a table."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU; float32 weights, gradients and optimizer."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Beside a shard: two whole blocks while they compute, with their gradients, and what lies
    outside of the blocks. Beside a whole copy: DDP's buckets of gradients."""
    activations: int
    """An estimate: what one micro batch keeps for its backward pass, and the logits."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class Costs:
    """Everything that `mole train --dry-run` tells."""

    parameters: Parameters
    flops_per_token: Flops
    tokens_per_unique_id: float
    """In a micro batch; in a process's part of a step where expert outputs are shared."""
    training_flops: float
    """Of the whole run."""
    table_bytes: dict[str, int]
    """By encoding; empty without lookup experts."""
    bytes_per_token: dict[str, int]
    """Of the record that is read for a token, by encoding."""
    num_gpus: int
    memory_per_gpu: dict[str, Memory]
    """`ddp`: each has a copy; `fsdp2`: each has a shard, which rules out shared expert outputs."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = asdict(self)
        for kind, memory in self.memory_per_gpu.items():
            values["memory_per_gpu"][kind]["total"] = memory.total
        return values


def costs(
    recipe: Recipe, vocab_size: int, num_gpus: int = 1, tokens_per_unique_id: float | None = None
) -> Costs:
    """What a recipe costs.

    Args:
        recipe: sizes and batches.
        vocab_size: rows of the embedding, where the recipe leaves that to the data.
        num_gpus: for the memory of each.
        tokens_per_unique_id: where the experts are evaluated, in a micro batch or with shared
            expert outputs in a process's part of a step; default: that of English prose.
    """
    training = recipe.training
    window = _evaluation_window(recipe, num_gpus)
    ratio = tokens_per_unique_id or prose_tokens_per_unique_id(window)
    parameters = count(recipe.model, vocab_size)
    flops = _flops(recipe, vocab_size, ratio)
    tables = table_sizes(recipe.model, vocab_size)
    return Costs(
        parameters=parameters,
        flops_per_token=flops,
        tokens_per_unique_id=round(ratio, 3),
        training_flops=flops.training * training.num_steps * training.tokens_per_step,
        table_bytes={name: total for name, (total, _) in tables.items()},
        bytes_per_token={name: record for name, (_, record) in tables.items()},
        num_gpus=num_gpus,
        memory_per_gpu={
            kind: _memory(recipe, vocab_size, parameters, ratio, num_gpus, kind)
            for kind in (("ddp",) if training.share_expert_outputs else ("ddp", "fsdp2"))
        },
    )


def _evaluation_window(recipe: Recipe, num_gpus: int) -> int:
    """Tokens of whose unique ids a process evaluates the experts once."""
    training = recipe.training
    sequences = training.sequences_per_micro_batch
    if training.share_expert_outputs:
        sequences = max(sequences, training.sequences_per_step // num_gpus)
    return sequences * training.context_length


# ------------------------------------------------------------------------------- parameters


def count(model: ModelRecipe, vocab_size: int) -> Parameters:
    """The parameters of a recipe's model, as `count_parameters` finds them in the built one."""
    d, layers = model.hidden_size, model.num_layers
    outside = 2 * vocab_size * d + d  # embedding, head, last norm
    attention_and_norms = layers * (4 * d * d + 2 * d)
    ffns = layers * 2 * d * model.ffn_size
    if model.moe is not None:
        moe = model.moe
        size = moe.size or model.ffn_size // 2
        shared = layers * 2 * d * (moe.shared_size or 0)
        routers = layers * moe.num_experts * d
        mixture = offloaded_mixture(layers, moe.num_experts, moe.experts_per_token, d, size)
        routed, loaded = mixture.parameters, mixture.loaded_per_token
        total = outside + attention_and_norms + shared + routed + routers
        return Parameters(total, total, routed, routers, total - routed + loaded, routed, loaded)
    backbone = outside + attention_and_norms + ffns
    if model.experts is None:
        return Parameters(backbone, backbone, 0, 0, backbone, 0, 0)
    with_experts = _expert_layers(model)
    maker, reader = _shapes(model, vocab_size)
    routed, readers = with_experts * _numbers(maker), with_experts * _numbers(reader)
    routers = with_experts * model.experts.num_rows * d if _has_router(model) else 0
    table = offloaded_table(with_experts, model.experts.num_rows, maker.row_size, vocab_size)
    active = backbone + readers
    return Parameters(
        active + routed,
        backbone,
        routed,
        routers,
        active,
        table.parameters,
        table.loaded_per_token,
        readers,
        with_experts * _static_numbers(maker),
    )


def _shapes(model: ModelRecipe, vocab_size: int) -> tuple[Any, Any]:
    """What makes and what reads the rows of a layer; of a dense model, nothing."""
    experts, d = model.experts, model.hidden_size
    assert experts is not None and experts.kind is not None
    default = get_form(experts.form).defaults(d, model.ffn_size).expert_size
    settings = LookupSettings(
        num_experts=experts.num_rows,
        expert_size=experts.size or default,
        layers=(0,),
        expert_kind=experts.kind,
        row_form=experts.form,
        row_size=experts.row_size,
    )
    return shapes_of_layer(settings, Sizes(vocab_size, d, d))


def _has_router(model: ModelRecipe) -> bool:
    assert model.experts is not None
    return bool(get_form(model.experts.form).HAS_ROUTER)


def _numbers(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _static_numbers(module: nn.Module) -> int:
    """Those that are looked up, not multiplied."""
    return sum(_numbers(part) for part in module.modules() if isinstance(part, nn.Embedding))


def _products(module: nn.Module) -> int:
    """Numbers that an input is multiplied with."""
    matrices = sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)
    return matrices - _static_numbers(module)


def _expert_layers(model: ModelRecipe) -> int:
    assert model.experts is not None
    return model.num_layers if model.experts.layers is None else len(set(model.experts.layers))


def table_sizes(model: ModelRecipe, vocab_size: int) -> dict[str, tuple[int, int]]:
    """Bytes of all records, and of one, for every encoding; padding included."""
    if model.experts is None:
        return {}
    from lookup_experts.table.encoding import ENCODINGS
    from lookup_experts.table.layout import RecordLayout, TableShape

    row_size = model.experts.row_size or model.hidden_size
    shape = TableShape(vocab_size, _expert_layers(model), model.experts.num_rows, row_size)
    layouts = {name: RecordLayout(shape, encoding) for name, encoding in ENCODINGS.items()}
    return {name: (layout.table_bytes, layout.stride) for name, layout in layouts.items()}


# ------------------------------------------------------------------------------------ FLOPs


def _flops(recipe: Recipe, vocab_size: int, ratio: float) -> Flops:
    model, context = recipe.model, recipe.training.context_length
    at_end = _forward_flops(model, vocab_size, context)
    on_average = _forward_flops(model, vocab_size, context / 2)  # attention looks back only
    experts = 0.0
    if model.experts is not None:
        experts = 2.0 * _expert_layers(model) * _products(_shapes(model, vocab_size)[0])
    passes = 1 + BACKWARD
    return Flops(
        training=passes * (on_average + experts / ratio),
        training_backbone=passes * on_average,
        training_experts=passes * experts / ratio,
        training_experts_per_position=passes * experts,
        inference=at_end,
    )


def _forward_flops(model: ModelRecipe, vocab_size: int, positions: float) -> float:
    """Of one token that attends to so many positions, lookup experts aside."""
    d = model.hidden_size
    ffn = 2 * d * model.ffn_size
    if model.moe is not None:
        selected = model.moe.experts_per_token * (model.moe.size or model.ffn_size // 2)
        ffn = 2 * d * (selected + (model.moe.shared_size or 0)) + d * model.moe.num_experts
    block = 2 * (4 * d * d + ffn) + 4 * positions * d
    mixing = 0
    if model.experts is not None:  # the products of what reads the rows, and their weighted sum
        maker, reader = _shapes(model, vocab_size)
        rows = model.experts.num_rows * maker.row_size
        mixing = _expert_layers(model) * 2 * (_products(reader) + rows)
    return model.num_layers * block + mixing + 2 * d * vocab_size


def prose_tokens_per_unique_id(tokens: int) -> float:
    """How often a token id occurs in a window of so many tokens of English prose, on average."""
    points = [(1, 1.0), *_PROSE, _PROSE_END]
    if tokens >= points[-1][0]:
        return points[-1][1]
    right = max(1, bisect_left([size for size, _ in points], tokens))
    (low, at_low), (high, at_high) = points[right - 1], points[right]
    part = log(tokens / low) / log(high / low)
    return exp(log(at_low) + part * log(at_high / at_low))


# ----------------------------------------------------------------------------------- memory


def _memory(
    recipe: Recipe, vocab_size: int, parameters: Parameters, ratio: float, num_gpus: int, kind: str
) -> Memory:
    # Static rows are whole everywhere, and their gradients those of a step's few ids.
    static = parameters.static_rows
    others = parameters.total - static
    shards = num_gpus if kind == "fsdp2" else 1
    share = -(-others // shards)
    held = _FLOAT32 * (share + static)
    if kind == "ddp":
        gathered = _FLOAT32 * others if num_gpus > 1 else 0
    else:
        outside = (2 * vocab_size + 1) * recipe.model.hidden_size
        block = (others - outside) // recipe.model.num_layers
        # A block's weights are gathered while those of the one before still compute.
        gathered = 2 * _FLOAT32 * (2 * block + outside) if num_gpus > 1 else 0
    return Memory(
        weights=held,
        gradients=_FLOAT32 * share,
        optimizer=_OPTIMIZER_FLOATS * held,
        gathered=gathered,
        activations=kept_bytes(recipe, vocab_size, ratio, num_gpus)
        + _passing_bytes(recipe, vocab_size, ratio),
    )


def kept_bytes(recipe: Recipe, vocab_size: int, ratio: float, num_gpus: int = 1) -> int:
    """An estimate of what is kept of a micro batch for its backward pass.

    Attention is taken to keep no scores (SDPA's kernels don't). Shared expert outputs are kept
    until the step's last backward pass.
    """
    model, training = recipe.model, recipe.training
    tokens = training.sequences_per_micro_batch * training.context_length
    kept = tokens * vocab_size * _FLOAT32  # the logits' softmax
    if training.precision == "bf16":  # autocast's copies of what is outside of the blocks
        kept += 2 * model.hidden_size * vocab_size
    if training.share_expert_outputs:
        kept += int(_shared_bytes(recipe, vocab_size, ratio, num_gpus))
    if training.gradient_checkpointing:
        return kept + model.num_layers * tokens * model.hidden_size * _FLOAT32
    return kept + int(model.num_layers * _block_bytes(recipe, vocab_size, ratio))


def _passing_bytes(recipe: Recipe, vocab_size: int, ratio: float) -> int:
    """What is there for a moment beside it: the logits with their gradient, or a block that is
    computed again."""
    training = recipe.training
    tokens = training.sequences_per_micro_batch * training.context_length
    logits = tokens * vocab_size * (_product_bytes(recipe) + _FLOAT32)
    if not training.gradient_checkpointing:
        return logits
    return max(logits, int(_block_bytes(recipe, vocab_size, ratio)))


def _product_bytes(recipe: Recipe) -> int:
    """Of a number that a matrix product gives."""
    return 2 if recipe.training.precision == "bf16" else _FLOAT32


def _block_bytes(recipe: Recipe, vocab_size: int, ratio: float) -> float:
    """What one block keeps: per token, per unique id, and autocast's copies of its weights."""
    model, training = recipe.model, recipe.training
    tokens = training.sequences_per_micro_batch * training.context_length
    width = _product_bytes(recipe)
    copies = 0.0
    if training.precision == "bf16":
        outside = 2 * vocab_size * model.hidden_size
        counts = count(model, vocab_size)
        copies = 2 * (counts.total - outside - counts.static_rows) / model.num_layers
    per_token = tokens * _token_bytes(model, width)
    unique = 0.0 if training.share_expert_outputs else tokens / ratio
    return copies + per_token + _expert_bytes(model, vocab_size, tokens, unique, width)


def _shared_bytes(recipe: Recipe, vocab_size: int, ratio: float, num_gpus: int) -> float:
    """What all layers' experts keep of a step's unique ids, and the sums of their gradients."""
    model = recipe.model
    if model.experts is None:
        return 0.0
    training = recipe.training
    window = _evaluation_window(recipe, num_gpus)
    unique, sums = window / ratio, 0.0
    if window > training.sequences_per_micro_batch * training.context_length:
        row_size = model.experts.row_size or model.hidden_size
        sums = _FLOAT32 * unique * model.experts.num_rows * row_size
    kept = model.num_layers * _expert_bytes(model, vocab_size, 0, unique, _product_bytes(recipe))
    return kept + _expert_layers(model) * sums


def _token_bytes(model: ModelRecipe, width: int) -> float:
    """Per token: what a block's attention, norms and FFN keep."""
    d, hidden = model.hidden_size, model.ffn_size
    if model.moe is not None:
        hidden = model.moe.experts_per_token * (model.moe.size or model.ffn_size // 2)
        hidden += model.moe.shared_size or 0
    norms = 2 * 2 * _FLOAT32 * d  # input and normed input, of both
    attention = width * 6 * d + 2 * _FLOAT32 * d  # inputs, q, k, v, output; what rotation keeps
    ffn = width * (d + 2 * hidden)
    return norms + attention + ffn


def _expert_bytes(
    model: ModelRecipe, vocab_size: int, tokens: int, unique: float, width: int
) -> float:
    """Of one block: what its lookup experts keep, per unique id and per token, and the index and
    the weights of the sum."""
    if model.experts is None:
        return 0.0
    maker, reader = _shapes(model, vocab_size)
    per_token = model.experts.num_rows * (8 + 4 + width) + width * reader.kept_numbers
    share = _expert_layers(model) / model.num_layers
    return float(share * (unique * width * maker.kept_numbers + tokens * per_token))
