"""Attached models as Hugging Face models: their classes, saving, loading, checkpointing.

An attached model's class is a subclass of its backbone's, made when it is first needed, so that
`isinstance`, `generate` and the Trainer see the backbone they know, and `save_pretrained` and
`from_pretrained` carry the experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.initialization import guard_torch_init_functions
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import GENERATION_CONFIG_NAME

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.adapters import refuse_adapters, tell_of_frozen_experts
from lookup_experts.folders.configuration import (
    MODEL_TYPE,
    LookupConfigMixin,
    attached_config_class,
    backbone_config_class,
)
from lookup_experts.folders.experts_alone import (
    backbone_folder,
    load_backbone,
    load_experts,
    note_backbone,
    save_experts,
)
from lookup_experts.folders.model_folder import CONFIG, find_folder, give_usual_mode
from lookup_experts.folders.own_code import (
    auto_map,
    load_classes,
    needs_own_code,
    require_trust,
    save_code,
)
from lookup_experts.folders.replacing import replaced_model
from lookup_experts.made_classes import make_class
from lookup_experts.model.freezing import allow_training, freeze_backbone, is_attached, is_quantised
from lookup_experts.model.initialization import (
    initialize_blocks,
)
from lookup_experts.model.input_gradients import InputGradientsMixin
from lookup_experts.model.placement import state_with_values
from lookup_experts.model.rows import ExpertSource
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import (
    Entrance,
    forward_pass,
    hidden_size_of,
    install,
    lookup_blocks,
    resumed,
)
from lookup_experts.table.reader import open_reader

SAVES = ("full", "experts")
"""What is saved of an attached model."""
TABLE_OPTIONS = ("store", "cache", "verify_checksums", "notify")
"""Keyword arguments of `from_pretrained` that are for the reader of the table."""
_CLASS_PREFIX = "LookupExperts"


@cache
def attached_class(backbone: Any) -> Any:
    """The class of an attached model: a subclass of its backbone's; one for each backbone."""
    return make_class(
        attached_class,
        backbone,
        f"{_CLASS_PREFIX}{backbone.__name__}",
        (LookupExpertsMixin, backbone),
        __doc__=f"{backbone.__name__} with lookup experts.",
        config_class=attached_config_class(backbone.config_class),
    )


def __getattr__(name: str) -> Any:
    """The class of an attached model by its name, as PEFT writes it down beside adapters."""
    backbone = getattr(transformers, name.removeprefix(_CLASS_PREFIX), None)
    if not name.startswith(_CLASS_PREFIX) or backbone is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return attached_class(backbone)


def backbone_class(attached: Any) -> Any:
    """The class of the backbone, of the class of an attached model."""
    made = next(kind for kind in attached.__mro__ if LookupExpertsMixin in kind.__bases__)
    return made.__bases__[1]


def become_attached(model: Any, settings: LookupSettings) -> None:
    """Turn a backbone that has just gained its modules into a model that saves as what it is."""
    backbone: Any = type(model)
    model.__class__ = attached_class(backbone)
    if not isinstance(model.config, LookupConfigMixin):
        model.config.__class__ = model.config_class
    model.config.lookup_experts = settings.to_dict()
    named = auto_map(backbone_config_class(type(model.config)), backbone)
    if named:
        model.config.auto_map = named
    elif hasattr(model.config, "auto_map"):  # transformers' own class was loaded all the same
        del model.config.auto_map


class LookupExpertsConfig(PreTrainedConfig):
    """The model type `lookup_experts` as `AutoConfig` meets it in a `config.json`.

    It is never the configuration of a model: `from_dict` gives one of the backbone's kind, and
    tells `AutoModelForCausalLM` which class belongs to it.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for key in ("backbone", "backbone_type", "lookup_experts"):
            if key not in config_dict:
                raise UserError(f"The configuration of a model with lookup experts has no {key!r}.")
        if needs_own_code(config_dict):
            AutoModelForCausalLM.register(OwnCodeConfig, OwnCodeModel, exist_ok=True)
            return OwnCodeConfig.from_dict(config_dict, **kwargs)
        attached = attached_class(_saved_backbone(config_dict))
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto.register(attached.config_class, attached, exist_ok=True)
        return attached.config_class.from_dict(config_dict, **kwargs)


def known_backbones(config_class: Any) -> tuple[Any, ...]:
    """The classes with a language-model head that transformers has for a configuration's class, the
    usual one first."""
    mappings = (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )
    found = (mapping[config_class] for mapping in mappings if config_class in mapping)
    return tuple(dict.fromkeys(found))


def _saved_backbone(config_dict: dict[str, Any]) -> Any:
    """The class of the backbone that the `config.json` of an attached model tells of."""
    model_type = config_dict["backbone_type"]
    found = known_backbones(CONFIG_MAPPING[model_type]) if model_type in CONFIG_MAPPING else ()
    if not found:
        raise UserError(
            f"The backbone's model type {model_type!r} is unknown to transformers here: import the "
            "package that registers it first, or take a newer transformers."
        )
    architectures = config_dict.get("architectures") or ()
    named = [kind for kind in found if _CLASS_PREFIX + kind.__name__ in architectures]
    return (named or found)[0]


class OwnCodeConfig(LookupConfigMixin, PreTrainedConfig):
    """What is known of an attached model whose backbone has code of its own, before that was run:
    what its `config.json` states, names of sizes among them (`attribute_map`). Stands in for a
    configuration of the backbone's kind."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        backbone = {**config_dict["backbone"], "backbone_type": config_dict["backbone_type"]}
        return super().from_dict({**config_dict, "backbone": backbone}, **kwargs)


class OwnCodeModel:
    """What `AutoModelForCausalLM` takes for the class of such a model until it loads one."""

    config_class = OwnCodeConfig

    @classmethod
    def from_pretrained(
        cls, name: Any, *args: Any, config: Any, trust_remote_code: Any = None, **kwargs: Any
    ) -> Any:
        """As `LookupExpertsMixin.from_pretrained`, if the folder's code may be run.

        Raises:
            UserError: it may not, or can't be.
        """
        require_trust(name, trust_remote_code)
        folder = _local_folder(name, kwargs)
        stated = config.to_dict()
        del stated["model_type"]
        stated.pop("attribute_map", None)
        model_type = stated.pop("backbone_type")
        config_class, backbone = load_classes(folder, stated["auto_map"], model_type)
        config = attached_config_class(config_class).from_dict(stated)
        return attached_class(backbone).from_pretrained(
            name, *args, config=config, trust_remote_code=True, **kwargs
        )


class LookupExpertsMixin(InputGradientsMixin):
    """What an attached model does differently from its backbone."""

    _told_of_frozen_experts = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, LookupSettings.from_dict(config.lookup_experts))
        self.init_weights()  # type: ignore[attr-defined]

    @property
    def lookup_settings(self) -> LookupSettings:
        """What was attached."""
        return LookupSettings.from_dict(self.config.lookup_experts)

    @property
    def lookup_blocks(self) -> list[Any]:
        """What each block with experts has of them, in order."""
        return lookup_blocks(self)

    @property
    def lookup_entrance(self) -> Entrance:
        """Where token ids become rows."""
        return self.base_model.lookup_entrance  # type: ignore[attr-defined]

    @property
    def expert_source(self) -> ExpertSource | None:
        """Where the model's expert outputs come from."""
        return self.lookup_entrance.source

    def set_expert_source(self, source: ExpertSource) -> None:
        """Take expert outputs from another source from the next forward pass on."""
        self.lookup_entrance.source = source

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Weights that a checkpoint doesn't hold; experts start silent, as in `attach`.

        The base model initialises what is inside of it by itself, and doesn't know experts.
        """
        super().initialize_weights()  # type: ignore[misc]
        if self.lookup_settings.form == "experts":
            with guard_torch_init_functions():  # weights that were loaded stay
                initialize_blocks(self, self.lookup_settings, "zero")

    def train(self, mode: bool = True) -> Any:
        """As torch does; who trains adapters that leave routed experts frozen is told so once."""
        super().train(mode)  # type: ignore[misc]
        if mode and not self._told_of_frozen_experts:
            self._told_of_frozen_experts = tell_of_frozen_experts(self)
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Checkpointed blocks recompute with the token ids of their own forward pass.

        Without this, another forward before the backward (an evaluation, a second loss) would
        make the recomputation read the newer ids, and gradients would be wrong without an error.
        """
        if enable:
            given = dict(getattr(gradient_checkpointing_func, "keywords", {}))
            if given.get("use_reentrant", True):
                raise UserError(
                    "Gradient checkpointing with lookup experts needs use_reentrant=False; pass "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            context_fn = partial(_checkpoint_contexts, given.get("context_fn", _no_contexts))
            gradient_checkpointing_func = partial(
                _checkpoint_block,
                gradient_checkpointing_func,
                partial(gradient_checkpointing_func, context_fn=context_fn),
            )
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; in table form the table beside the weights is opened too.

        Experts that were saved without their backbone come with the backbone that they refer to.
        Keyword arguments named in `TABLE_OPTIONS` go to the table's reader.
        """
        options = {name: kwargs.pop(name) for name in TABLE_OPTIONS if name in kwargs}
        if _refers_to_backbone(pretrained_model_name_or_path, kwargs):
            folder = _local_folder(pretrained_model_name_or_path, kwargs)
            loaded = _load_on_backbone(cls, folder, *args, **kwargs)
        else:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.lookup_settings.form == "table":
            folder = _local_folder(pretrained_model_name_or_path, kwargs)
            settings = model.lookup_settings
            weight = next(model.get_input_embeddings().parameters())
            reader = open_reader(
                folder,
                num_layers=len(settings.layers),
                num_experts=settings.num_experts,
                row_size=settings.row_size or hidden_size_of(model),
                fingerprint=settings.fingerprint,
                dtype=weight.dtype,
                device=weight.device,
                **options,
            )
            model.set_expert_source(reader)
        return loaded

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        *,
        save: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers does; in table form the table is saved with the weights.

        The model takes the place of the one that was in the folder, as a whole (`replacing.py`);
        one with adapters that transformers itself has added saves those alone.

        Args:
            save: `full`: everything. `experts`: experts and routers, with a reference to their
                backbone (`experts_alone.py`); for models that have one. Default: what `attach` was
                told.

        Raises:
            UserError: the experts are to be saved alone, and the backbone in memory is no longer
                the one that they refer to; the model has adapters of PEFT that aren't merged, or
                tensors without values.
        """
        if not self._hf_peft_config_loaded:  # type: ignore[attr-defined]
            refuse_adapters(self, "saved")
        alone = _saves_experts_alone(self, save)
        writes = _is_writing(is_main_process)
        options = {"state_dict": state_dict, "max_shard_size": max_shard_size}
        more = {"push_to_hub": push_to_hub, "variant": variant, **kwargs}
        if alone:
            for name in ("push_to_hub", "variant", "distributed_checkpoint"):
                if more.get(name):
                    raise UserError(f"Experts alone can't be saved with {name}; leave it out.")
        else:
            options |= more
        if push_to_hub:  # under the folder's name, not that of the one where the files are written
            options.setdefault("repo_id", Path(save_directory).name)
        write = partial(save_experts, self) if alone else self.save_in_full
        if not writes or more.get("distributed_checkpoint"):
            # Weights that are cut among processes are gathered, or written, by all of them.
            write(save_directory, is_main_process=writes, **options)
            if writes:
                self.save_beside_weights(Path(save_directory))
            return
        source: Any = self.expert_source if self.lookup_settings.form == "table" else None
        table = None if source is None else source.folder
        with replaced_model(Path(save_directory), variant, table) as folder:
            write(folder, **options)
            self.save_beside_weights(folder)

    def save_in_full(self, folder: Any, **options: Any) -> None:
        """As transformers' `save_pretrained`, backbone and all; a table isn't saved."""
        own = self.config  # type: ignore[has-type]
        self.config = deepcopy(own)
        self.config.lookup_experts = replace(self.lookup_settings, backbone=None).to_dict()
        model: Any = self
        if options.get("state_dict") is None and _has_weights_elsewhere(model):
            options["state_dict"] = state_with_values(model)  # transformers can't get at all
        # Where a class has code of its own, transformers looks for it in the module of the class,
        # which for an attached one is this.
        self.__dict__["is_remote_code"] = lambda: False
        try:
            super().save_pretrained(folder, **options)  # type: ignore[misc]
        finally:
            del self.__dict__["is_remote_code"]
            self.config = own

    def save_beside_weights(self, folder: Path) -> None:
        """Complete a folder that transformers has saved: code of the backbone's own, modes."""
        if (folder / CONFIG).exists():  # adapters are saved without
            config: Any = self.config
            save_code(folder, backbone_config_class(type(config)), backbone_class(type(self)))
            give_usual_mode(folder)

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """What the Trainer doesn't miss in a checkpoint: a backbone that isn't saved."""
        if self.lookup_settings.backbone is None:
            return self._ignored_on_save
        module: Any = self
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        return {name for name, _ in tensors if not is_attached(name)} & module.state_dict().keys()

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, names: Any) -> None:
        self._ignored_on_save = names

    _ignored_on_save: Any = None


def _saves_experts_alone(model: Any, save: str | None) -> bool:
    """Whether `save_pretrained`, told so, is to leave out the backbone."""
    refers = model.lookup_settings.backbone is not None
    if save is None:
        return refers
    if save not in SAVES:
        raise unknown_name("value of save", save, SAVES)
    if save == "experts" and not refers:
        raise UserError(
            "This model refers to no backbone, so its experts can't be saved alone: attach them "
            'with save="experts".'
        )
    if save == "full" and is_quantised(model):
        raise UserError(
            f"This {type(model).__name__} is quantised: its experts are saved without it."
        )
    return save == "experts"


def _is_writing(is_main_process: bool) -> bool:
    """Whether this process is the one that writes; as transformers decides it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return is_main_process and torch.distributed.get_rank() == 0
    return is_main_process


def _has_weights_elsewhere(model: Any) -> bool:
    return any(tensor.is_meta for tensor in model.state_dict().values())


def _load_on_backbone(
    attached: Any,
    folder: Path,
    *args: Any,
    config: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """The model of a folder that refers to its backbone.

    Args:
        attached: the class of the model.
        folder: what `save_experts` wrote.
        config: its configuration, as `AutoConfig` gives it; read from the folder if None.
        output_loading_info: give transformers' report on the backbone too.
        args, kwargs: of `from_pretrained`, for the backbone: dtype, quantisation, devices ...

    Raises:
        UserError: the backbone isn't there, or is another one.
    """
    if config is None:
        config = LookupExpertsConfig.from_pretrained(folder)
    settings = LookupSettings.from_dict(config.lookup_experts)
    place = backbone_folder(folder, settings)
    model, report = load_backbone(place, config, backbone_class(attached), *args, **kwargs)
    note_backbone(model)
    if "generation_config" not in kwargs and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    install(model, settings)
    become_attached(model, settings)
    load_experts(model, folder)
    freeze_backbone(model)
    allow_training(model)
    model.eval()
    return (model, report) if output_loading_info else model


def _refers_to_backbone(name: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `from_pretrained` is given experts without their backbone."""
    config = kwargs.get("config")
    if config is None and name is not None:
        folder = _local_folder(name, kwargs)
        config = LookupExpertsConfig.from_pretrained(folder)
    settings = getattr(config, "lookup_experts", None)
    return settings is not None and settings.get("backbone") is not None


def _checkpoint_block(given: Any, restoring: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a block through `restoring`, which recomputes with the rows of its own forward pass.

    A graph of `torch.compile` recomputes within itself, from the rows that it was given; there
    contexts are neither needed nor allowed.
    """
    checkpointed = given if torch.compiler.is_compiling() else restoring
    return checkpointed(*args, **kwargs)


def _checkpoint_contexts(
    inner: Callable[[], tuple[Any, Any]],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    forward, recompute = inner()
    return forward, _both(resumed(forward_pass()), recompute)


def _no_contexts() -> tuple[Any, Any]:
    return nullcontext(), nullcontext()


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Any:
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
        yield


def _local_folder(name: Any, kwargs: dict[str, Any]) -> Path:
    """The folder on this machine that a model name stands for, by what `from_pretrained` got."""
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if key in kwargs}
    return find_folder(name, **hub)
