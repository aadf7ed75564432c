"""A model as its experts alone, with a reference to the backbone they belong to.

Where the backbone isn't trained there is no need to save it again. The folder then holds
`config.json`, whose `lookup_experts` settings name the backbone, and in `model.safetensors` the
routed experts and routers; loading it loads the backbone from where it is.

What tells one backbone from another is a fingerprint of the files of its weights: SHA-256 over the
names, dtypes and shapes of all tensors and `SAMPLES` stretches of each one's bytes. Training
changes every part of a tensor that it changes, so samples tell, and a large model is checked in an
instant. (It says nothing about damage: transformers' own loading doesn't look for that either.)

Whether the backbone in memory is still the one referred to is looked at when experts are saved
(`backbone_samples.py`).
"""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.folders.backbone_samples import BackboneSamples, require_backbone_of_files
from lookup_experts.folders.configuration import backbone_config_class
from lookup_experts.folders.gguf_file import gguf_tensors, loaded_gguf_file
from lookup_experts.folders.model_folder import (
    find_folder,
    read_config,
    refuse_partial_loading,
    weight_files,
)
from lookup_experts.folders.official import BACKBONES, load_official, official_kind
from lookup_experts.model.freezing import forget_quantizer, is_attached, is_quantised
from lookup_experts.model.placement import state_with_values
from lookup_experts.model.settings import BackboneReference, LookupSettings

SAMPLES = 16
SAMPLE_BYTES = 4096


def require_reference(model: Any, save: str, train_backbone: bool) -> None:
    """Refuse what `attach` can't do for saving: see its arguments."""
    if save == "experts":
        if train_backbone:
            raise UserError(
                'save="experts" leaves the backbone out, so it must not be trained: add '
                'train_backbone=False, or take save="full".'
            )
        if not model.name_or_path:
            raise UserError(
                f'save="experts" needs a backbone that was loaded from a folder or the hub; this '
                f'{type(model).__name__} was not. Save it and load it, or take save="full".'
            )
    elif is_quantised(model):
        raise UserError(
            f"This {type(model).__name__} is quantised: its experts are saved without it. "
            'Attach them with train_backbone=False, save="experts".'
        )


def refer_to_backbone_of(model: Any) -> BackboneReference:
    """The reference to a model that experts are attached to, by what it was loaded from.

    Raises:
        UserError: what it was loaded from isn't there, or is another model than the one in memory.
    """
    name, file = model.name_or_path, loaded_gguf_file(model)
    if file is None:
        reference = refer_to(name)
        require_backbone_of_files(model, find_folder(name))
    elif Path(file).is_file():  # as transformers has it: in the working directory, or anywhere
        path = Path(file).resolve()
        reference = refer_to(path.parent, path.name)
    else:
        reference = refer_to(name, file)
    return reference


def refer_to(name: str | Path, file: str | None = None) -> BackboneReference:
    """The reference to a backbone.

    Args:
        name: the folder, or the model on the hub, that it is loaded from.
        file: the GGUF file in there; None: the folder's own weights.
    """
    folder = _folder_with(name, file)
    stated = str(folder.resolve()) if Path(name).is_dir() else str(name)
    return BackboneReference(stated, backbone_fingerprint(folder, file), file)


def _folder_with(name: str | Path, file: str | None) -> Path:
    """As `find_folder`; of a model on the hub only the given file, if one is given."""
    return find_folder(name) if file is None else find_folder(name, allow_patterns=file)


def backbone_fingerprint(folder: Path, file: str | None = None) -> str:
    """The fingerprint of a model folder's weights, those of experts aside; the same however they
    are cut into files.

    Args:
        folder: a model folder.
        file: the GGUF file in it that is meant; None: its safetensors files.
    """
    files = weight_files(folder) if file is None else [folder / file]
    tensors = sorted(
        (name, path, place)
        for path in files
        for name, place in _tensors(path)
        if not is_attached(name)
    )
    digest = hashlib.sha256()
    for name, path, (kind, shape, start, stop) in tensors:
        digest.update(f"{name} {kind} {shape}\n".encode())
        with path.open("rb") as opened:
            for offset in _sample_offsets(start, stop):
                opened.seek(offset)
                digest.update(opened.read(min(SAMPLE_BYTES, stop - offset)))
    return digest.hexdigest()


def _tensors(path: Path) -> list[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Name, and (dtype, shape, first byte, last byte + 1) of every tensor in a file of weights."""
    if path.suffix != ".safetensors":
        return gguf_tensors(path)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(header_bytes))
            return [
                (
                    name,
                    (
                        entry["dtype"],
                        tuple(entry["shape"]),
                        *(8 + header_bytes + offset for offset in entry["data_offsets"]),
                    ),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, MemoryError) as error:
            raise UserError(f"{path} can't be read as safetensors: {error}.") from error


def _sample_offsets(start: int, stop: int) -> list[int]:
    """Where the samples of a tensor begin: all of it, or evenly from its first byte to its last."""
    if stop - start <= SAMPLES * SAMPLE_BYTES:
        return list(range(start, stop, SAMPLE_BYTES))
    last = stop - SAMPLE_BYTES
    return [start + (last - start) * number // (SAMPLES - 1) for number in range(SAMPLES)]


def set_backbone_reference(model: Any, reference: BackboneReference | None) -> None:
    """Decide how an attached model is saved: as experts with a reference, or (None) in full."""
    settings = replace(model.lookup_settings, backbone=reference)
    model.config.lookup_experts = settings.to_dict()


def save_experts(
    model: Any,
    folder: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write the experts of a model that refers to its backbone.

    Args:
        model: an attached model whose settings have a `backbone`.
        folder: made if it isn't there.
        is_main_process: False writes nothing.
        state_dict: the weights, where they had to be gathered; others than the experts' are left
            out.
        max_shard_size: of a file, as in transformers.
    """
    from huggingface_hub import save_torch_state_dict

    trained = [n for n, p in model.named_parameters() if p.requires_grad and not is_attached(n)]
    if trained:
        raise UserError(
            f"{trained[0]} of the backbone is being trained, but this model saves its experts "
            'alone. Save all of it: model.save_pretrained(folder, save="full").'
        )
    if not is_main_process:
        return
    weights = model.state_dict() if state_dict is None else state_dict
    _require_backbone_referred_to(model, weights)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if state_dict is None:
        experts = state_with_values(model, is_attached)
    else:
        experts = {name: weight for name, weight in weights.items() if is_attached(name)}
    save_torch_state_dict(experts, folder, max_shard_size=max_shard_size)
    model.generation_config.save_pretrained(folder)
    _config_to_save(model).save_pretrained(folder)


def note_backbone(model: Any) -> None:
    """Remember what the backbone of a model is like now that it is the one referred to."""
    model.backbone_samples = BackboneSamples(model)


def _require_backbone_referred_to(model: Any, state: dict[str, Tensor]) -> None:
    samples: BackboneSamples | None = getattr(model, "backbone_samples", None)
    difference = None if samples is None else samples.difference(state)
    if difference is not None:
        raise UserError(
            f"The backbone in memory is no longer {model.lookup_settings.backbone.name}: "
            f"{difference}. Its experts can't be saved alone, since they would be loaded on that. "
            + (
                "Load the model anew."
                if is_quantised(model)
                else 'Save all of it: model.save_pretrained(folder, save="full").'
            )
        )


def _config_to_save(model: Any) -> Any:
    """The model's configuration, without a quantisation that its backbone's folder doesn't have."""
    config = copy.deepcopy(model.config)
    # FSDP's `fully_shard` puts its own name before that of the class.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    reference = model.lookup_settings.backbone
    if hasattr(config, "quantization_config") and (
        reference.file is not None
        or "quantization_config" not in read_config(find_folder(reference.name))
    ):
        del config.quantization_config
    return config


def load_experts(model: Any, folder: Path) -> None:
    """Give an attached model the experts and routers of a folder; all of them must be there."""
    own = {name: weight for name, weight in model.state_dict().items() if is_attached(name)}
    fill_experts(own, folder)


@torch.no_grad()
def fill_experts(own: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors with the experts and routers in a folder, by their names.

    The number of the block and what it has of experts is what counts of a name: transformers saves
    the FFNs of some mixtures under another one than they have in memory.

    Raises:
        UserError: one has none, there are others, or a shape is another.
    """
    own_names = {_place_of_expert(name): name for name in own}
    given: set[str] = set()
    mismatched = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for stored in filter(is_attached, file.keys()):
                name = own_names.get(_place_of_expert(stored), stored)
                given.add(name)
                if name in own and own[name].shape == tuple(file.get_slice(stored).get_shape()):
                    own[name].copy_(file.get_tensor(stored))
                elif name in own:
                    mismatched.append(name)
    report = {
        "missing_keys": own.keys() - given,
        "unexpected_keys": given - own.keys(),
        "mismatched_keys": mismatched,
    }
    refuse_partial_loading(folder, report, "missing", "mismatched", "unexpected")


def _place_of_expert(name: str) -> tuple[str | None, str]:
    """The number of the block in a parameter's name, and what follows the experts' module."""
    ffn, _, inner = name.partition(".lookup_experts.")
    return next(filter(str.isdecimal, ffn.split(".")), None), inner


def backbone_folder(folder: Path, settings: LookupSettings) -> Path:
    """Where the backbone is that the experts in a folder were trained on.

    Raises:
        UserError: it isn't there, or is another one.
    """
    assert settings.backbone is not None
    name, file = settings.backbone.name, settings.backbone.file
    help_text = (
        'If it has moved, say so in config.json, under "lookup_experts", "backbone", "name".'
    )
    try:
        place = _folder_with(folder / name if (folder / name).is_dir() else name, file)
    except Exception as error:  # the hub's client raises many kinds, all of them: not to be had
        raise UserError(
            f"{folder} has the experts for the backbone {name}, which is no folder here and could "
            f"not be fetched from the hub ({type(error).__name__}). {help_text}"
        ) from error
    if file is not None and not (place / file).is_file():
        raise UserError(
            f"{folder} has experts for the backbone in {file}, which isn't in {place}. {help_text}"
        )
    if backbone_fingerprint(place, file) != settings.backbone.fingerprint:
        where = place if file is None else place / file
        raise UserError(
            f"{folder} has experts for another backbone than the one in {where}: its weights have "
            f"another fingerprint. {help_text}"
        )
    return place


def _plain(config: Any) -> Any:
    """The backbone's configuration out of that of the attached model."""
    plain = copy.deepcopy(config)
    plain.__class__ = backbone_config_class(type(config))
    del plain.lookup_experts
    return plain


def load_backbone(
    place: Path, config: Any, model_class: Any, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """The backbone in a folder, and transformers' report on loading it.

    Args:
        place: what `backbone_folder` gives.
        config: of the attached model.
        model_class: of the backbone. Code of its own comes with the experts; what lies beside the
            backbone may have changed since.
        args, kwargs: of `from_pretrained`: dtype, quantisation, devices ...
    """
    reference = LookupSettings.from_dict(config.lookup_experts).backbone
    assert reference is not None
    if reference.file is None:
        stored = read_config(place)
        kind = official_kind(place, stored)
        if kind is not None:
            dtype = kwargs.get("dtype") or "auto"
            nothing: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}
            return load_official(place, kind, stored, BACKBONES[kind], dtype), nothing
    else:
        kwargs["gguf_file"] = str(place / reference.file)
    kwargs["output_loading_info"] = True
    model, report = model_class.from_pretrained(place, *args, config=_plain(config), **kwargs)
    forget_quantizer(model)
    return model, report
