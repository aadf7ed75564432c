"""From a folder to a model that is ready to generate."""

from collections.abc import Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import GENERATION_CONFIG_NAME

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.attached_model import LookupExpertsMixin
from lookup_experts.folders.by_table import put_tables_on
from lookup_experts.folders.configuration import (
    ATTACHED,
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
)
from lookup_experts.folders.model_folder import (
    TABLE,
    find_folder,
    first_line,
    local_folder,
    read_config,
    refuse_partial_loading,
    weight_files,
)
from lookup_experts.folders.official import BACKBONES, load_official, moe_settings, official_kind
from lookup_experts.folders.offloaded_model import PREFIX as OFFLOADED
from lookup_experts.folders.offloaded_model import OffloadedEmbeddingsMixin, offloaded_class
from lookup_experts.folders.own_code import (
    auto_map,
    load_classes,
    needs_own_code,
    require_trust,
)
from lookup_experts.folders.tables import TABLE_OPTIONS, one_store, share_cache
from lookup_experts.made_classes import made_of, make_class
from lookup_experts.model.embedding_settings import KEY as OFFLOADED_EMBEDDINGS
from lookup_experts.model.fast_linears import check_weights, make_fast
from lookup_experts.model.freezing import allow_training, freeze_backbone
from lookup_experts.model.moe import MoeGatelessLlamaConfig, check_experts_per_token
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import (
    hidden_size_of,
    install,
)
from lookup_experts.table.lanes import check_device
from lookup_experts.table.reader import open_reader
from lookup_experts.table.store import Notify, log

_KINDS = ("lookup_experts", OFFLOADED_EMBEDDINGS)
"""What a configuration of ours tells of, one of them or both."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    folder: str | Path,
    *,
    store: str = "auto",
    cache: int | str = 0,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    weights: str = "auto",
    verify_checksums: bool = False,
    num_experts_per_tok: int | None = None,
    trust_remote_code: bool = False,
    tables: Mapping[str, str | Path] | None = None,
    notify: Notify = log,
) -> Any:
    """The model in a folder, in evaluation mode.

    Takes a folder in training form, in table form, in the authors' format, or a plain Hugging
    Face model. What comes back is a transformers model; `generate` is transformers' own.

    Args:
        folder: a folder, or a name on the Hugging Face hub.
        store: where the records of a table are read from: `memory`, `mmap`, `direct` (from disk
            past the page cache), or `auto`: memory if the table fits half of what is free, else
            direct; `auto:8GB`, if it fits that.
        cache: budget of the row cache in bytes, or in words like `256MB`; 0 is off. With the model
            on a GPU half of it is the GPU's memory, or as much as is said behind a colon:
            `256MB:64MB`.
        device: where the model runs.
        dtype: of the weights: `float32`, `bfloat16`, `float16`, or `auto` for that of the folder.
        weights: of the linear layers, on a CPU: `auto` has them as the processor multiplies them
            fastest, the numbers being the same (`model/fast_linears.py`), and steps attend by what
            is fastest there (`model/attention.py`); `plain` leaves all as torch and transformers
            have it; `int8` is `auto` with weights rounded to 8 bits.
        verify_checksums: compare every record that is read with its checksum.
        num_experts_per_tok: of the paper's mixture-of-experts baseline, how many experts each token
            selects; default: what the folder says, else 2.
        trust_remote_code: let code that the folder brings along run; a model of a class that isn't
            transformers' own needs it.
        tables: folders in table form, by names, that were made with the model in `folder` as their
            frozen backbone. Texts are generated with the one that `model.use_table(name)` says, at
            first with none.
        notify: told which store was chosen and why, and what could not be had; default: a warning
            of the logger `lookup_experts`.

    Raises:
        UserError: no such folder, no model in it, or one that can't be loaded; a table that is
            missing, damaged or of another model; 8 bits for a GPU, or for a quantised model; tables
            of another backbone.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    check_weights(weights, device)
    check_device(device)
    path = local_folder(folder)
    config = read_config(path)
    kind = official_kind(path, config)
    selection = _expert_selection(path, kind, config, num_experts_per_tok)
    if kind is not None:
        backbone = BACKBONES[kind]
        model_class = attached_class(backbone) if kind == "mole" else backbone
        model = load_official(path, kind, config, model_class, _torch_dtype(dtype), **selection)
        model.to(device)
    else:
        if needs_own_code(config):
            require_trust(path, trust_remote_code)
        selection["trust_remote_code"] = trust_remote_code
        if config.get("model_type") == MODEL_TYPE:
            weight_files(path)
            selection |= {
                "store": store,
                "cache": cache,
                "verify_checksums": verify_checksums,
                "notify": notify,
            }
        model = _load_huggingface(path, device, dtype, selection)
    if tables:
        reading = {"store": store, "cache": cache, "verify_checksums": verify_checksums}
        model = put_tables_on(model, path, tables, {**reading, "notify": notify})
    return make_fast(model.eval(), weights, notify)


def _expert_selection(
    path: Path, kind: str | None, config: dict[str, Any], num_experts_per_tok: int | None
) -> dict[str, Any]:
    """The loading option that says how many experts are selected, where it was given."""
    if num_experts_per_tok is None:
        return {}
    if kind != "moe" and config.get("model_type") != MoeGatelessLlamaConfig.model_type:
        raise UserError(
            f"num_experts_per_tok is for the paper's mixture of experts; {path} is none. "
            "Leave it out."
        )
    check_experts_per_token(num_experts_per_tok, moe_settings(path, config)["num_experts"])
    return {"num_experts_per_tok": num_experts_per_tok}


def _load_huggingface(
    path: Path, device: str | torch.device, dtype: str, options: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are in the report
            **options,
        )
    # An import fails where the weights need a package of their own, as quantised ones do.
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} can't be loaded as a causal LM: {first_line(error)}") from error
    refuse_partial_loading(path, report, "missing", "mismatched")
    model = model.to(device)
    for reader in getattr(model, "embedding_readers", {}).values():
        reader.move_to(device)
    if isinstance(model, LookupExpertsMixin) and model.lookup_settings.form == "table":
        source: Any = model.expert_source
        source.move_to(device)
    return model


def _torch_dtype(dtype: str) -> Any:
    return dtype if dtype == "auto" else getattr(torch, dtype)


# ------------------------------------------------------------------- classes of attached models


class FromFolder:
    """How an attached model comes to be, out of a folder."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, LookupSettings.from_dict(config.lookup_experts))
        self.init_weights()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; in table form the table beside the weights is opened too.

        Experts that were saved without their backbone come with the backbone that they refer to.
        Keyword arguments named in `TABLE_OPTIONS` go to the table's reader.
        """
        options = {name: kwargs.pop(name) for name in TABLE_OPTIONS if name in kwargs}
        has_more_tables = issubclass(cls, OffloadedEmbeddingsMixin)
        if has_more_tables:
            folder = _local_folder(pretrained_model_name_or_path, kwargs)
            options = one_store(folder, options)
            kwargs |= options
        if _refers_to_backbone(pretrained_model_name_or_path, kwargs):
            folder = _local_folder(pretrained_model_name_or_path, kwargs)
            loaded = _load_on_backbone(cls, folder, *args, **kwargs)
        else:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.lookup_settings.form == "table":
            folder = _local_folder(pretrained_model_name_or_path, kwargs)
            settings = model.lookup_settings
            weight = next(chain(model.get_input_embeddings().parameters(), model.parameters()))
            if has_more_tables:
                options["cache"] = share_cache(folder, options.get("cache", 0), model.config)[TABLE]
            reader = open_reader(
                folder / TABLE,
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


@cache
def attached_class(backbone: Any) -> Any:
    """The class of an attached model: a subclass of its backbone's; one for each backbone."""
    return make_class(
        attached_class,
        backbone,
        ATTACHED + backbone.__name__,
        (FromFolder, LookupExpertsMixin, backbone),
        __doc__=f"{backbone.__name__} with lookup experts.",
        config_class=attached_config_class(backbone.config_class),
    )


def __getattr__(name: str) -> Any:
    """The class of an attached model by its name, as PEFT writes it down beside adapters."""
    backbone = getattr(transformers, name.removeprefix(ATTACHED), None)
    if not name.startswith(ATTACHED) or backbone is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return attached_class(backbone)


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
        for key in ("backbone", "backbone_type"):
            if key not in config_dict:
                raise UserError(f"The configuration of a model with lookup experts has no {key!r}.")
        if not any(key in config_dict for key in _KINDS):
            kinds = " or ".join(map(repr, _KINDS))
            raise UserError(f"The configuration of a model with lookup experts has no {kinds}.")
        if needs_own_code(config_dict):
            AutoModelForCausalLM.register(OwnCodeConfig, OwnCodeModel, exist_ok=True)
            return OwnCodeConfig.from_dict(config_dict, **kwargs)
        attached = saved_class(config_dict)
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
    prefixes = (ATTACHED, OFFLOADED, ATTACHED + OFFLOADED)
    named = [
        kind
        for kind in found
        if any(prefix + kind.__name__ in architectures for prefix in prefixes)
    ]
    return (named or found)[0]


def saved_class(config_dict: dict[str, Any]) -> Any:
    """The class of the model that a `config.json` of ours tells of."""
    model_class = _saved_backbone(config_dict)
    if OFFLOADED_EMBEDDINGS in config_dict:
        model_class = offloaded_class(model_class)
    return attached_class(model_class) if "lookup_experts" in config_dict else model_class


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
    model, report = load_backbone(place, config, made_of(attached), *args, **kwargs)
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


def _local_folder(name: Any, kwargs: dict[str, Any]) -> Path:
    """The folder on this machine that a model name stands for, by what `from_pretrained` got."""
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if key in kwargs}
    return find_folder(name, **hub)
