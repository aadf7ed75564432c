"""Training form -> table form: a model folder becomes an inference folder.

The inference folder holds the backbone with its routers, the tokenizer, and the table. It is made
under another name and renamed when it is complete; an interrupted run is taken up again by the
same call.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.folders.adapters import refuse_adapters
from lookup_experts.folders.attached_model import LookupExpertsMixin
from lookup_experts.folders.experts_alone import save_experts
from lookup_experts.folders.load import load
from lookup_experts.folders.model_folder import (
    TABLE,
    begin_inference_folder,
    local_folder,
    require_new,
    unfinished_place,
)
from lookup_experts.folders.own_code import copy_custom_generation
from lookup_experts.folders.saving import SAVES, require_referring
from lookup_experts.folders.tokenizer import TOKENIZER_FILES, copy_tokenizer
from lookup_experts.model.folded import evaluate_experts, expert_facts
from lookup_experts.model.moe import MoeGatelessLlamaForCausalLM
from lookup_experts.model.placement import state_with_values
from lookup_experts.model.wiring import routed_experts
from lookup_experts.table.build import (
    ALONE,
    CHUNK_BUDGET_BYTES,
    BuildPlan,
    Ranks,
    build_table,
    full_disk_as_user_error,
    plan_table,
)
from lookup_experts.table.counts import check_counts, keep_counts
from lookup_experts.table.encoding import Encoding, get_encoding
from lookup_experts.table.layout import TableShape
from lookup_experts.table.opening import Table
from lookup_experts.table.progress import Progress
from lookup_experts.table.store import Notify, log


def reparameterize(
    model_or_folder: Any,
    out: str | Path,
    *,
    encoding: str = "bfloat16",
    block_size: int | None = None,
    tokenizer: Any = None,
    token_counts: np.ndarray | None = None,
    trust_remote_code: bool = False,
    save: str = "full",
    progress: Progress | None = None,
    notify: Notify = log,
    ranks: Ranks = ALONE,
) -> Table:
    """Fold a model's routed experts into a table and write the inference folder.

    Args:
        model_or_folder: an attached model in training form, or a folder with one (the authors'
            format included).
        out: the folder to make; must not exist yet.
        encoding: how the table stores numbers.
        block_size: of the encodings nf4 and nf3: how many neighbours share a scale.
        tokenizer: saved with the model; default: the one in the folder, if there is one.
        token_counts: int64 [vocab_size], how often each id occurs in text like that to come; kept
            with the table for `TableReader.fill_cache`.
        trust_remote_code: let code that a folder brings along run, see `load`.
        save: `full`: the backbone lies with the table. `experts`: it stays where it is, and is
            referred to, of a model that does so already (`attach`); a quantised one always does.
        progress: called with (ids done, ids in all).
        notify: told when an interrupted run is taken up again; default: a warning of the logger
            `lookup_experts`.
        ranks: the processes that call this together, on a folder that all of them see, with the
            same model; each writes shards of the table. See `join_ranks`.

    Returns:
        The finished table.

    Raises:
        TableError: `token_counts` isn't of the model's vocabulary.
        UserError: `out` exists, the model has no experts to fold or refers to no backbone, or the
            disk is too small.
    """
    chosen = get_encoding(encoding, block_size)
    if save not in SAVES:
        raise unknown_name("value of save", save, SAVES)
    out = Path(out)
    if not ranks.is_main:
        return _help_to_fold(model_or_folder, out, chosen, trust_remote_code, progress, ranks)
    require_new(out)
    folder = None if isinstance(model_or_folder, nn.Module) else local_folder(model_or_folder)
    model = (
        model_or_folder
        if folder is None
        else load(folder, weights="plain", trust_remote_code=trust_remote_code)
    )
    _require_experts(model)
    _require_savable(model)
    if save == "experts":
        require_referring(model)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if token_counts is not None:
        check_counts(token_counts, vocab_size, "token_counts")
    partial = begin_inference_folder(out, notify)
    _save_tokenizer(tokenizer, folder, partial)
    if folder is not None:
        copy_custom_generation(folder, partial)
    embedding = model.get_input_embeddings()
    layers = routed_experts(model)
    plan = plan_folding(
        embedding, layers, vocab_size, chosen, tokenizer_hash=tokenizer_hash(partial)
    )
    # Before the table, which may take hours: what can't be saved shows at once.
    with full_disk_as_user_error(partial):
        save_without_experts(model, partial, plan.manifest.fingerprint, save)
    _say_who_writes(plan, ranks, notify)
    ranks.wait()  # for the others to find the folder
    build_table(partial / TABLE, plan, evaluate_experts(embedding, layers), progress, ranks)
    with full_disk_as_user_error(partial):
        keep_counts(partial / TABLE, token_counts, vocab_size)
    partial.rename(out)
    ranks.wait()
    return Table(out / TABLE, plan.manifest)


def _help_to_fold(
    model_or_folder: Any,
    out: Path,
    encoding: Encoding,
    trust_remote_code: bool,
    progress: Progress | None,
    ranks: Ranks,
) -> Table:
    """Write shards of a table whose folder the main process makes, which has checked everything."""
    ranks.wait()
    model = model_or_folder
    if not isinstance(model, nn.Module):
        model = load(local_folder(model_or_folder), trust_remote_code=trust_remote_code)
    embedding, layers = model.get_input_embeddings(), routed_experts(model)
    partial = unfinished_place(out)
    plan = plan_folding(
        embedding,
        layers,
        embedding.weight.shape[0],
        encoding,
        tokenizer_hash=tokenizer_hash(partial),
    )
    build_table(partial / TABLE, plan, evaluate_experts(embedding, layers), progress, ranks)
    ranks.wait()
    return Table(out / TABLE, plan.manifest)


def _say_who_writes(plan: BuildPlan, ranks: Ranks, notify: Notify) -> None:
    shards = len(plan.manifest.shards)
    if ranks.count > 1:
        idle = max(0, ranks.count - shards)
        notify(
            f"{ranks.count} processes write {shards} shard{'s' if shards > 1 else ''}"
            + (f"; {idle} of them have nothing to do." if idle else ".")
        )


def plan_folding(
    embedding: nn.Module,
    layers: Sequence[Any],
    vocab_size: int,
    encoding: Encoding,
    *,
    tokenizer_hash: str | None = None,
    chunk_budget_bytes: int = CHUNK_BUDGET_BYTES,
) -> BuildPlan:
    """What the table of the given experts will be.

    Args:
        embedding: the backbone's input embedding.
        layers: what makes the rows of each layer, in order.
        vocab_size: V, records 0 to V - 1; the rows of the embedding.

    See `plan_table` for the rest.
    """
    facts = expert_facts(embedding, layers)
    return plan_table(
        TableShape(vocab_size, facts.num_layers, facts.num_experts, facts.row_size),
        encoding,
        fingerprint=facts.fingerprint,
        evaluation_bytes=facts.evaluation_bytes,
        embedding_hash=facts.embedding_hash,
        tokenizer_hash=tokenizer_hash,
        chunk_budget_bytes=chunk_budget_bytes,
    )


def tokenizer_hash(folder: Path) -> str | None:
    """SHA-256 of a folder's tokenizer file; None where there is none."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None


def save_without_experts(model: Any, folder: Path, fingerprint: str, save: str = "full") -> None:
    """Save what reads the rows, marked as being in table form, with the backbone or (`experts`)
    a reference to it.

    A quantised backbone, which transformers can't always save again, stays where it is.
    """
    alone = save == "experts" or getattr(model, "hf_quantizer", None) is not None
    settings = replace(
        model.lookup_settings,
        form="table",
        fingerprint=fingerprint,
        backbone=model.lookup_settings.backbone if alone else None,
    )
    state = state_with_values(model, lambda name: not _is_expert(name))
    training_config = model.config
    model.config = copy.deepcopy(training_config)
    model.config.lookup_experts = settings.to_dict()
    try:
        # The class's own method would take the table of a table-form model along; there is none.
        if alone:
            save_experts(model, folder, state_dict=state)
        else:
            model.save_in_full(folder, state_dict=state)
        model.save_beside_weights(folder)
    finally:
        model.config = training_config


def _is_expert(name: str) -> bool:
    return ".lookup_experts.routed." in name


def _require_experts(model: Any) -> None:
    refuse_adapters(model, "folded")
    if isinstance(model, MoeGatelessLlamaForCausalLM):
        raise UserError(
            "The experts of this mixture of experts look at the hidden state, so they can't be "
            "folded into a table; only lookup experts, which look at the token embedding, can."
        )
    if not isinstance(model, LookupExpertsMixin):
        raise UserError(
            f"This {type(model).__name__} has no lookup experts, so there is nothing to fold. "
            "Attach and train some first."
        )
    if model.lookup_settings.form != "experts":
        raise UserError("The experts of this model were folded into a table already.")


def _require_savable(model: Any) -> None:
    """Refuse a generation configuration that transformers would refuse to save with the model."""
    if not model.can_generate():
        return
    with TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise UserError(
                "The model's generation_config can't be saved, so correct it before you fold: "
                + " ".join(str(error).split())
            ) from error


def _save_tokenizer(tokenizer: Any, folder: Path | None, target: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    elif folder is not None:
        copy_tokenizer(folder, target)
