"""From a folder to a model that is ready to generate."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.attached_model import LookupExpertsMixin, attached_class
from lookup_experts.folders.configuration import MODEL_TYPE
from lookup_experts.folders.model_folder import (
    first_line,
    local_folder,
    read_config,
    refuse_partial_loading,
    weight_files,
)
from lookup_experts.folders.official import BACKBONES, load_official, moe_settings, official_kind
from lookup_experts.folders.own_code import needs_own_code, require_trust
from lookup_experts.model.moe import MoeGatelessLlamaConfig, check_experts_per_token
from lookup_experts.table.lanes import check_device
from lookup_experts.table.store import Notify, log

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    folder: str | Path,
    *,
    store: str = "auto",
    cache: int | str = 0,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    verify_checksums: bool = False,
    num_experts_per_tok: int | None = None,
    trust_remote_code: bool = False,
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
        cache: budget of the row cache in bytes, or in words like `256MB`; 0 is off.
        device: where the model runs.
        dtype: of the weights: `float32`, `bfloat16`, `float16`, or `auto` for that of the folder.
        verify_checksums: compare every record that is read with its checksum.
        num_experts_per_tok: of the paper's mixture-of-experts baseline, how many experts each token
            selects; default: what the folder says, else 2.
        trust_remote_code: let code that the folder brings along run; a model of a class that isn't
            transformers' own needs it.
        notify: told which store was chosen and why, and what could not be had; default: a warning
            of the logger `lookup_experts`.

    Raises:
        UserError: no such folder, no model in it, or one that can't be loaded; a table that is
            missing, damaged or of another model.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    check_device(device)
    path = local_folder(folder)
    config = read_config(path)
    kind = official_kind(path, config)
    selection = _expert_selection(path, kind, config, num_experts_per_tok)
    if kind is not None:
        backbone = BACKBONES[kind]
        model_class = attached_class(backbone) if kind == "mole" else backbone
        model = load_official(path, kind, config, model_class, _torch_dtype(dtype), **selection)
        return model.to(device).eval()
    if needs_own_code(config):
        require_trust(path, trust_remote_code)
    selection["trust_remote_code"] = trust_remote_code
    if config.get("model_type") == MODEL_TYPE:
        weight_files(path)
        options = {
            **selection,
            "store": store,
            "cache": cache,
            "verify_checksums": verify_checksums,
            "notify": notify,
        }
        return _load_huggingface(path, device, dtype, options).eval()
    return _load_huggingface(path, device, dtype, selection).eval()


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
    if isinstance(model, LookupExpertsMixin) and model.lookup_settings.form == "table":
        source: Any = model.expert_source
        source.move_to(device)
    return model


def _torch_dtype(dtype: str) -> Any:
    return dtype if dtype == "auto" else getattr(torch, dtype)
