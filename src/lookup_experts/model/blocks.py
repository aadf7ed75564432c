"""Where the FFN of each block is, in any Hugging Face causal LM.

Nothing here changes a model. A model qualifies when its base model, or the part of it that deals
with text where it takes images or sound too, holds one list of blocks and
each block has exactly one child that goes by one of `FFN_NAMES`; the probe behind that list
covered 30 of 31 common families. The child's inputs and outputs are all that matters then:
whatever it adds to the residual stream, the experts add beside it.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lookup_experts.errors import UserError

FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "feedforward", "ff")
# The sizes of a block's FFN go by several names in the configurations of the library.
FFN_SIZE_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")

_PLACEHOLDER_NAMES = tuple(
    f"{medium}_token_{suffix}"
    for medium in ("image", "video", "audio")
    for suffix in ("id", "index")
)


def find_ffns(model: nn.Module) -> list[nn.Module]:
    """The FFN of every block, in order.

    Args:
        model: a Hugging Face `PreTrainedModel` with a language-model head.

    Raises:
        UserError: the model has no such blocks; names its model type and what was found.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    blocks = _find_blocks(model, model_type)
    ffns = []
    for number, block in enumerate(blocks):
        names = [name for name, _ in block.named_children() if name in FFN_NAMES]
        if len(names) != 1:
            children = ", ".join(name for name, _ in block.named_children())
            raise UserError(
                f"Can't attach lookup experts to model type {model_type!r}: block {number} should "
                f"have one FFN child named {' or '.join(FFN_NAMES)}, it has "
                f"{len(names) or 'none'} (children: {children})."
            )
        ffns.append(getattr(block, names[0]))
    if len({id(ffn) for ffn in ffns}) != len(ffns):
        raise UserError(
            f"Can't attach lookup experts to model type {model_type!r}: its blocks share an FFN, "
            "and experts need one place per layer."
        )
    return ffns


def _find_blocks(model: nn.Module, model_type: str) -> Sequence[nn.Module]:
    """The base model's one list of blocks that have an FFN."""
    base: Any = getattr(model, "base_model", model)
    config = getattr(model, "config", None)
    if is_multimodal(config):
        base, config = base.get_decoder(), text_config(config)
    num_layers = getattr(config, "num_hidden_layers", None)
    lists = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and any(name in FFN_NAMES for name, _ in module[0].named_children())
    ]
    if len(lists) != 1:
        raise UserError(
            f"Can't attach lookup experts to model type {model_type!r}: expected one list of "
            f"{num_layers} blocks, each with an FFN child named {' or '.join(FFN_NAMES)}; found "
            f"{len(lists) or 'none'}."
        )
    return list(lists[0])


def text_config(config: Any) -> Any:
    """The part of a model's configuration that deals with text; often all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_multimodal(config: Any) -> bool:
    """Whether a model takes more than text, and deals with text in a part of its own."""
    return text_config(config) is not config


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """The token ids in whose places a multi-modal model puts images or sound; sorted."""
    if not is_multimodal(config):
        return ()
    found = {getattr(config, name, None) for name in _PLACEHOLDER_NAMES}
    return tuple(sorted(token_id for token_id in found if isinstance(token_id, int)))


def ffn_size(config: object, hidden_size: int) -> int:
    """The hidden size of the backbone's FFN; four times the hidden size if it isn't stated."""
    for name in FFN_SIZE_NAMES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size > 0:
            return size
    return 4 * hidden_size
