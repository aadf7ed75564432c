"""A model as its experts alone, with a reference to the backbone they belong to.

Where the backbone isn't trained there is no need to save it again. The folder then holds
`config.json`, whose `lookup_experts` settings name the backbone, and in `model.safetensors` the
routed experts and routers; loading it loads the backbone from where it is.

What tells one backbone from another is a fingerprint of the files of its weights: SHA-256 over the
names, dtypes and shapes of all tensors and `SAMPLES` stretches of each one's bytes. Training
changes every part of a tensor that it changes, so samples tell, and a large model is checked in an
instant. (It says nothing about damage: transformers' own loading doesn't look for that either.)
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
from lookup_experts.folders.configuration import backbone_config_class
from lookup_experts.folders.model_folder import (
    find_folder,
    read_config,
    refuse_partial_loading,
    weight_files,
)
from lookup_experts.folders.official import BACKBONES, load_official, official_kind
from lookup_experts.model.freezing import is_attached
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
    elif getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            f"This {type(model).__name__} is quantised: its experts are saved without it. "
            'Attach them with train_backbone=False, save="experts".'
        )


def refer_to(name: str | Path) -> BackboneReference:
    """The reference to a backbone, by the folder or the hub's name it is loaded from."""
    folder = find_folder(name)
    stated = str(folder.resolve()) if Path(name).is_dir() else str(name)
    return BackboneReference(stated, backbone_fingerprint(folder))


def backbone_fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder's weights; the same however they are cut into files."""
    tensors = sorted(
        (name, path, place) for path in weight_files(folder) for name, place in _tensors(path)
    )
    digest = hashlib.sha256()
    for name, path, (kind, shape, start, stop) in tensors:
        digest.update(f"{name} {kind} {shape}\n".encode())
        with path.open("rb") as file:
            for offset in _sample_offsets(start, stop):
                file.seek(offset)
                digest.update(file.read(min(SAMPLE_BYTES, stop - offset)))
    return digest.hexdigest()


def _tensors(path: Path) -> list[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Name, and (dtype, shape, first byte, last byte + 1) of every tensor in a safetensors file."""
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
            'alone. Attach the experts with save="full".'
        )
    if not is_main_process:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if state_dict is None else state_dict
    experts = {name: weight for name, weight in weights.items() if is_attached(name)}
    save_torch_state_dict(experts, folder, max_shard_size=max_shard_size)
    model.generation_config.save_pretrained(folder)
    _config_to_save(model).save_pretrained(folder)


def _config_to_save(model: Any) -> Any:
    """The model's configuration, without a quantisation that its backbone's folder doesn't have."""
    config = copy.deepcopy(model.config)
    # FSDP's `fully_shard` puts its own name before that of the class.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if hasattr(config, "quantization_config"):
        folder = find_folder(model.lookup_settings.backbone.name)
        stored = json.loads((folder / "config.json").read_text())
        if "quantization_config" not in stored:
            del config.quantization_config
    return config


def load_experts(model: Any, folder: Path) -> None:
    """Give an attached model the experts and routers of a folder; all of them must be there."""
    own = {name: weight for name, weight in model.state_dict().items() if is_attached(name)}
    given: set[str] = set()
    mismatched = []
    with torch.no_grad():
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    given.add(name)
                    if name in own and own[name].shape == tuple(file.get_slice(name).get_shape()):
                        own[name].copy_(file.get_tensor(name))
                    elif name in own:
                        mismatched.append(name)
    report = {
        "missing_keys": own.keys() - given,
        "unexpected_keys": given - own.keys(),
        "mismatched_keys": mismatched,
    }
    refuse_partial_loading(folder, report, "missing", "mismatched", "unexpected")


def backbone_folder(folder: Path, settings: LookupSettings) -> Path:
    """Where the backbone is that the experts in a folder were trained on.

    Raises:
        UserError: it isn't there, or is another one.
    """
    assert settings.backbone is not None
    name = settings.backbone.name
    help_text = (
        'If it has moved, say so in config.json, under "lookup_experts", "backbone", "name".'
    )
    try:
        place = find_folder(folder / name if (folder / name).is_dir() else name)
    except Exception as error:  # the hub's client raises many kinds, all of them: not to be had
        raise UserError(
            f"{folder} has the experts for the backbone {name}, which is no folder here and could "
            f"not be fetched from the hub ({type(error).__name__}). {help_text}"
        ) from error
    if backbone_fingerprint(place) != settings.backbone.fingerprint:
        raise UserError(
            f"{folder} has experts for another backbone than the one in {place}: its weights have "
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
    stored = read_config(place)
    kind = official_kind(place, stored)
    if kind is not None:
        dtype = kwargs.get("dtype") or "auto"
        nothing: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}
        return load_official(place, kind, stored, BACKBONES[kind], dtype), nothing
    kwargs["output_loading_info"] = True
    return model_class.from_pretrained(place, *args, config=_plain(config), **kwargs)
