"""Classes of vLLM's with lookup experts attached, by the name of an attached model's class.

`LookupExpertsLlamaForCausalLM` of this module is vLLM's `LlamaForCausalLM` with experts. Models
that have embeddings in tables get a class as well, for vLLM to look at; `checks.py` refuses them.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from types import new_class
from typing import Any

from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer

from lookup_experts.errors import UserError
from lookup_experts.folders.configuration import ATTACHED
from lookup_experts.folders.experts_alone import backbone_folder
from lookup_experts.folders.model_folder import local_folder, refuse_partial_loading
from lookup_experts.folders.offloaded_model import PREFIX as OFFLOADED
from lookup_experts.model.blocks import FFN_NAMES
from lookup_experts.model.fast_linears import make_blocks_fast
from lookup_experts.model.forms import Sizes, get_form
from lookup_experts.model.settings import LookupSettings
from lookup_experts.vllm_plugin.blocks import place_block, widen_routers
from lookup_experts.vllm_plugin.checks import require_tested_version
from lookup_experts.vllm_plugin.sources import open_source, reader_options
from lookup_experts.vllm_plugin.step import Step

_OF_BLOCK = re.compile(r"\.(\d+)\.\w+\.lookup_experts\.(.+)")
"""The name of an expert's tensor in a folder: the block's number, and its name there."""


def __getattr__(name: str) -> Any:
    backbone = name.removeprefix(ATTACHED).removeprefix(OFFLOADED)
    if backbone == name or backbone not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _attached_class(backbone)


@cache
def _attached_class(backbone: str) -> Any:
    """The class of a model with experts, by the name that its backbone has in vLLM."""
    plain = ModelRegistry.models[backbone].load_model_cls()
    attributes = {"__module__": __name__, "__doc__": f"vLLM's {backbone} with lookup experts."}
    return new_class(
        ATTACHED + backbone, (ModelWithExperts, plain), exec_body=lambda own: own.update(attributes)
    )


class ModelWithExperts:
    """What a model with experts does differently from vLLM's class of its backbone."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        require_tested_version()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self._vllm_config = vllm_config
        self._settings = LookupSettings.from_dict(config.lookup_experts)
        self._step = Step()
        form = get_form(self._settings.row_form)
        sizes = Sizes(config.vocab_size, config.hidden_size, config.hidden_size)
        model: Any = self
        names = {module: name for name, module in model.named_modules(prefix=prefix)}
        ffns = _ffns_here(model)
        for place, number in enumerate(self._settings.layers):
            if number not in ffns:
                continue
            block = form.new_reader(place, self._settings, sizes)
            if self._settings.form == "experts":
                block.routed = form.new_maker(self._settings, sizes)
            block.requires_grad_(False)
            row_size = self._settings.row_size or sizes.hidden_size
            name = names[ffns[number]]
            place_block(ffns[number], block, row_size, name, self._step, vllm_config)

    @property
    def secondary_weights(self) -> list[Any]:
        """Where vLLM finds the backbone's weights if they aren't in the model's folder."""
        if self._settings.backbone is None:
            return []
        place = backbone_folder(self._folder, self._settings)
        return [DefaultModelLoader.Source(str(place), revision=None)]

    @property
    def _folder(self) -> Any:
        return local_folder(self._vllm_config.model_config.model)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM does; then the table is opened, if there is one.

        Raises:
            UserError: weights of the experts are missing, too many, or of other shapes.
            TableError: see `open_source`.
        """
        model: Any = self
        experts = _ExpertWeights(_ffns_here(model), self._settings)
        loaded = super().load_weights(experts.taken_out_of(weights))  # type: ignore[misc]
        refuse_partial_loading(
            self._folder, experts.report(), "missing", "mismatched", "unexpected"
        )
        if self._step.source is None:
            model_config = self._vllm_config.model_config
            self._step.source = open_source(
                self._folder,
                self._settings,
                model_config.hf_config,
                model_config.dtype,
                next(model.parameters()).device,
                reader_options(self._vllm_config.additional_config),
            )
            widen_routers(model)
            make_blocks_fast(model)
        return loaded | {name for name, _ in model.named_parameters() if ".lookup_experts." in name}

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, with the step's rows asked for ahead of the first block."""
        with self._step.of(input_ids, self):
            return super().forward(  # type: ignore[misc]
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )


def _ffns_here(model: Any) -> dict[int, Any]:
    """The FFNs of a model's blocks by the blocks' numbers; of blocks in other processes none.

    Raises:
        UserError: a block has no FFN, or several.
    """
    blocks: Any = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    found = {}
    for number, block in enumerate(blocks):
        if isinstance(block, PPMissingLayer):
            continue
        ffns = [child for name, child in block.named_children() if name in FFN_NAMES]
        if len(ffns) != 1:
            raise UserError(
                f"vLLM's {type(model).__name__} has {len(ffns) or 'no'} FFNs in block {number}, "
                "where lookup experts expect one."
            )
        found[number] = ffns[0]
    return found


class _ExpertWeights:
    """Takes what belongs to experts out of a stream of weights and gives it to them.

    Args:
        ffns: of the blocks in this process, by their numbers.
        settings: what was attached.
    """

    def __init__(self, ffns: dict[int, Any], settings: LookupSettings) -> None:
        self._elsewhere = {str(number) for number in settings.layers if number not in ffns}
        self._missing = {
            f"{number}.{name}": weight
            for number in settings.layers
            if number in ffns
            for name, weight in ffns[number].lookup_experts.named_parameters()
        }
        self._unexpected: list[str] = []
        self._mismatched: list[str] = []

    def taken_out_of(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The others, with their names."""
        for name, given in weights:
            found = _OF_BLOCK.search(name)
            if found is None:
                yield name, given
                continue
            weight = self._missing.pop(f"{found[1]}.{found[2]}", None)
            if weight is None and found[1] in self._elsewhere:
                continue
            if weight is None:
                self._unexpected.append(name)
            elif weight.shape != given.shape:
                self._mismatched.append(name)
            else:
                weight.data.copy_(given)

    def report(self) -> dict[str, list[str]]:
        """As transformers' loading report."""
        return {
            "missing_keys": list(self._missing),
            "unexpected_keys": self._unexpected,
            "mismatched_keys": self._mismatched,
        }
