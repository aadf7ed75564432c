"""Models and tables of the paper's shapes with random numbers: speed doesn't depend on them."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lookup_experts import __version__, console
from lookup_experts.errors import DiskFullError
from lookup_experts.folders.load import become_attached
from lookup_experts.model.forms import Sizes, get_form
from lookup_experts.model.gateless_llama import GatelessLlamaForCausalLM, paper_config
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.wiring import install
from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.layout import RecordLayout, TableShape, plan_shards
from lookup_experts.table.manifest import TableManifest, write_manifest
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.reader import TableReader
from lookup_experts.table.shard_writer import ShardWriter
from lookup_experts.table.store_choice import open_store
from lookup_experts.units import format_bytes

SMOLLM2 = "smollm2-135m"
"""The shape of a real model: deep and narrow, one weight for embedding and head."""
FINGERPRINT = "random numbers"
DISTINCT_RECORDS = 512
SPREAD = 0.02


@dataclass(frozen=True)
class Case:
    """A model to measure."""

    shape: str = "160m"
    """160m, 410m, 1b or smollm2-135m."""
    num_experts: int = 4
    encoding: str = "bfloat16"
    """Of the table."""
    dtype: torch.dtype = torch.bfloat16
    """Of the weights."""
    form: str = "mole"
    """Of the rows."""
    row_size: int | None = None
    """Numbers of a row; None: as many as the shape is wide."""
    vocab_size: int | None = None
    """V; None: the paper's."""

    @property
    def config(self) -> Any:
        """Of its backbone."""
        _, config = backbone_of(self.shape)
        config.vocab_size = self.vocab_size or config.vocab_size
        return config

    @property
    def layout(self) -> RecordLayout:
        """Of its table."""
        config = self.config
        row_size = self.row_size or config.hidden_size
        shape = TableShape(config.vocab_size, config.num_hidden_layers, self.num_experts, row_size)
        return RecordLayout(shape, get_encoding(self.encoding))

    @property
    def settings(self) -> LookupSettings:
        """In training form, as `attach` settles them."""
        config = self.config
        defaults = get_form(self.form).defaults(config.hidden_size, config.intermediate_size)
        return LookupSettings(
            num_experts=self.num_experts,
            expert_size=defaults.expert_size,
            layers=tuple(range(config.num_hidden_layers)),
            expert_kind=defaults.expert_kind,
            row_form=self.form,
            row_size=self.row_size,
        )

    @property
    def sizes(self) -> Sizes:
        """Of its backbone."""
        config = self.config
        return Sizes(config.vocab_size, config.hidden_size, config.hidden_size)

    @property
    def dtype_name(self) -> str:
        """As `--dtype` names it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """For files: `160m-4e-bfloat16`; of narrow rows `160m-meki-r96-bfloat16`."""
        rows = f"{self.num_experts}e" if get_form(self.form).HAS_ROUTER else self.form
        size = "" if self.row_size in (None, self.sizes.hidden_size) else f"-r{self.row_size}"
        ids = "" if self.vocab_size is None else f"-v{self.vocab_size}"
        return f"{self.shape}-{rows}{size}{ids}-{self.encoding}"

    @property
    def built_name(self) -> str:
        """The same for the table that `mole bench build` made."""
        return f"{self.name}-built"


def backbone_of(shape: str) -> tuple[Any, Any]:
    """The class and the configuration of the dense model of a shape."""
    if shape != SMOLLM2:
        return GatelessLlamaForCausalLM, paper_config(shape)
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def random_model(model_class: Any, config: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of a class of transformers with random weights, to generate with."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def dense_model(case: Case, device: str = "cpu") -> Any:
    """The backbone alone, with random weights."""
    model_class, _ = backbone_of(case.shape)
    return random_model(model_class, case.config, case.dtype).to(device)


def table_model(
    case: Case,
    table: Table,
    store: str,
    cache_bytes: int = 0,
    notify: Any = lambda message: None,
    device: str = "cpu",
) -> Any:
    """The backbone of `dense_model` with what reads rows, and the given table."""
    model = dense_model(case, device=device)
    settings = replace(case.settings, form="table", fingerprint=FINGERPRINT)
    install(model, settings)
    become_attached(model, settings)
    for block in model.lookup_blocks:
        for weight in block.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0.0, SPREAD)
    opened = open_store(table, store, notify=notify)
    model.set_expert_source(TableReader(table, opened, case.dtype, device, cache_bytes))
    return model


def random_table(case: Case, folder: Path) -> Table:
    """A table of the case's layout in `folder`, built from experts or made up; made if it isn't
    there.

    A few hundred distinct records are encoded and repeated over the vocabulary: as many bytes
    lie on the disk, and reading one tells nothing about the next.
    """
    target = folder / case.name
    for made in (folder / case.built_name, target):
        if (made / MANIFEST_NAME).exists():
            return open_table(made)
    layout = case.layout
    free = shutil.disk_usage(_existing(folder)).free
    if layout.table_bytes > free:
        raise DiskFullError(
            f"The table of {case.name} takes {format_bytes(layout.table_bytes)}; "
            f"{format_bytes(free)} are free in {folder}."
        )
    target.mkdir(parents=True, exist_ok=True)
    manifest = TableManifest(
        layout=layout,
        shards=tuple(plan_shards(layout)),
        fingerprint=FINGERPRINT,
        embedding_hash=None,
        tokenizer_hash=None,
        created_by=f"lookup-experts {__version__}",
    )
    records = _random_records(layout)
    with console.progress_bar("Writing a table") as progress:
        for shard in manifest.shards:
            with ShardWriter(target / shard.file, layout, shard, FINGERPRINT) as writer:
                for first in range(0, shard.num_ids, len(records)):
                    writer.write(first, records[: shard.num_ids - first])
                    progress(shard.first_id + first, layout.shape.vocab_size)
                writer.finish()
    write_manifest(target, manifest)
    return open_table(target)


def _random_records(layout: RecordLayout) -> np.ndarray:
    shape = layout.shape
    generator = torch.Generator().manual_seed(0)
    records = np.zeros((DISTINCT_RECORDS, layout.stride), np.uint8)
    target = torch.from_numpy(records)
    for layer in range(shape.num_layers):
        size = (DISTINCT_RECORDS, shape.num_experts, shape.row_size)
        rows = torch.randn(size, generator=generator) * SPREAD
        target[:, layout.layer_slice(layer)] = layout.encoding.encode(rows)
    return records


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
