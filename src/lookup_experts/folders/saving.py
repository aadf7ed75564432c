"""Saving an attached model: in full, or its experts alone; with its table, and code of its own."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.adapters import refuse_adapters
from lookup_experts.folders.configuration import backbone_config_class
from lookup_experts.folders.experts_alone import save_experts
from lookup_experts.folders.model_folder import CONFIG, TABLE, give_usual_mode
from lookup_experts.folders.own_code import save_code
from lookup_experts.folders.replacing import replaced_model
from lookup_experts.made_classes import made_of
from lookup_experts.model.freezing import is_attached, is_quantised
from lookup_experts.model.placement import state_with_values

SAVES = ("full", "experts")
"""What is saved of an attached model."""


class SavingMixin:
    """What `save_pretrained` of an attached model does differently from that of its backbone."""

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
        model: Any = self
        in_table_form = model.lookup_settings.form == "table"
        tables = {TABLE: model.expert_source.folder} if in_table_form else {}
        with replaced_model(Path(save_directory), variant, tables) as folder:
            write(folder, **options)
            self.save_beside_weights(folder)

    def save_beside_weights(self, folder: Path) -> None:
        """Complete a folder that transformers has saved: code of the backbone's own, modes."""
        if (folder / CONFIG).exists():  # adapters are saved without
            config: Any = self.config
            save_code(folder, backbone_config_class(type(config)), made_of(type(self)))
            give_usual_mode(folder)

    def save_in_full(self, folder: Any, **options: Any) -> None:
        """As transformers' `save_pretrained`, without a table, whatever the model refers to."""
        model: Any = self
        own = self.config  # type: ignore[has-type]
        self.config = deepcopy(own)
        self.config.lookup_experts = replace(model.lookup_settings, backbone=None).to_dict()
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

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """What the Trainer doesn't miss in a checkpoint: a backbone that isn't saved."""
        module: Any = self
        if module.lookup_settings.backbone is None:
            return self._ignored_on_save
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
    if save == "experts":
        require_referring(model)
    if save == "full" and is_quantised(model):
        raise UserError(
            f"This {type(model).__name__} is quantised: its experts are saved without it."
        )
    return save == "experts"


def require_referring(model: Any) -> None:
    """Raise a `UserError` for a model whose experts can't be saved without their backbone."""
    if model.lookup_settings.backbone is None:
        raise UserError(
            "This model refers to no backbone, so its experts can't be saved alone: attach them "
            'with save="experts".'
        )


def _is_writing(is_main_process: bool) -> bool:
    """Whether this process is the one that writes; as transformers decides it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return is_main_process and torch.distributed.get_rank() == 0
    return is_main_process


def _has_weights_elsewhere(model: Any) -> bool:
    return any(tensor.is_meta for tensor in model.state_dict().values())
