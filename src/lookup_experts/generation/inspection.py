"""What is in a model folder or a table, without its weights and records; is a table sound?"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lookup_experts.errors import TableError, UserError
from lookup_experts.folders.experts_alone import backbone_folder
from lookup_experts.folders.gguf_file import gguf_tensors
from lookup_experts.folders.load import LookupExpertsConfig, load
from lookup_experts.folders.model_folder import TABLE, local_folder, read_config, weight_files
from lookup_experts.folders.official import moe_settings, official_kind, official_settings
from lookup_experts.folders.own_code import needs_own_code, require_trust
from lookup_experts.folders.readers import table_readers
from lookup_experts.folders.tables import embedding_place
from lookup_experts.folders.tokenizer import TOKENIZER_FILES
from lookup_experts.generation.folding import tokenizer_hash
from lookup_experts.model.embedding_settings import embedding_settings
from lookup_experts.model.fingerprint import embedding_hash
from lookup_experts.model.moe import MoeGatelessLlamaConfig
from lookup_experts.model.offloaded import offloaded_mixture, offloaded_table
from lookup_experts.model.settings import LookupSettings
from lookup_experts.model.table_embedding import TableEmbedding
from lookup_experts.table.counts import read_counts
from lookup_experts.table.format import MANIFEST_NAME
from lookup_experts.table.opening import Table, open_table
from lookup_experts.table.progress import Progress
from lookup_experts.table.verifying import VerifyReport, verify_table

MARKS: dict[str, dict[str, tuple[str, ...]]] = {
    "lookup-experts": {"experts": (".lookup_experts.routed.",), "readers": (".lookup_experts.",)},
    "official": {"experts": (".experts.", ".expert_layernorm."), "readers": (".router.",)},
    "huggingface": {},
}
"""What the names of weights contain, of routed experts and, beside these, of what reads the rows,
by the format of the folder."""
MOE_MARKS: dict[str, tuple[str, ...]] = {"experts": (".experts.",)}
"""Likewise in the paper's mixture of experts, the authors' and ours."""


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """What a folder holds, as plain JSON values; no weights and no records are read.

    Keys: `folder`, `form` (`experts`, `table`, `dense`, `offloaded`, `moe`, or `bare table`),
    `format` (`lookup-experts`, `official` or `huggingface`), `backbone`, `context` (tokens; null
    where the configuration doesn't say), `dtypes` (of the weights, the most frequent first),
    `chat_template`
    (whether there is one; null without a tokenizer), `lookup_experts` (the settings), `rows`
    (`form`, and `size`, the numbers of one; null without lookup experts), `parameters`, `table`,
    `embeddings` (the tables of embeddings by the modules' names; null without any), and `moe` (the
    settings) for the paper's mixture of experts.

    Of `parameters`, `resident` is what a running model holds, in table form or as a mixture;
    `readers`: what of it reads the rows of lookup experts; `experts`: routed experts in training
    form; `table`: numbers that the table stands for, or
    `offloaded`: those that it will stand for once the experts are folded, or a mixture's routed
    experts outside of the GPU; `loaded_per_token`: of either, what each token needs, of a mixture
    in the worst case; `active`: those of a mixture that a token uses.
    """
    path = local_folder(folder)
    if (path / MANIFEST_NAME).exists():
        return {
            "folder": str(path),
            "form": "bare table",
            "table": describe_table(open_table(path)),
        }
    config = read_config(path)
    official = official_kind(path, config)
    embeddings = embedding_tables(path, config)
    described: dict[str, Any] = {"folder": str(path)}
    settings: LookupSettings | None = None
    if official is not None:
        form = {"mole": "experts"}.get(official, official)
        described |= {"form": form, "format": "official", "backbone": "gateless_llama"}
        if official == "mole":
            settings = official_settings(path, config)
    elif config.get("model_type") == LookupExpertsConfig.model_type:
        if "lookup_experts" in config or not embeddings:
            settings = attached_settings(path, config)
        described |= {
            "form": settings.form if settings else "offloaded",
            "format": "lookup-experts",
            "backbone": config.get("backbone_type"),
        }
    elif config.get("model_type") == MoeGatelessLlamaConfig.model_type:
        described |= {"form": "moe", "format": "lookup-experts", "backbone": "gateless_llama"}
    else:
        described |= {
            "form": "dense",
            "format": "huggingface",
            "backbone": config.get("model_type"),
        }
    described["context"] = getattr(text_config(path), "max_position_embeddings", None)
    described["dtypes"] = weight_dtypes(path)
    described["chat_template"] = has_chat_template(path)
    described["lookup_experts"] = settings.to_dict() if settings else None
    described["rows"] = rows_of(path, settings) if settings else None
    described["table"] = None
    described["embeddings"] = {
        name: describe_table(table) for name, table in embeddings.items()
    } or None
    if described["form"] == "moe":
        described["moe"] = moe_settings(path, config)
        described["parameters"] = moe_parameters(path, described["moe"])
        return described
    described["parameters"] = count_parameters(path, MARKS[described["format"]])
    if settings is not None and settings.backbone is not None:
        described["parameters"]["resident"] += backbone_parameters(path, settings)
    if settings is not None and settings.form == "experts":
        described["parameters"] |= future_table_parameters(path, settings)
    if settings is not None and settings.form == "table":
        table = open_table(path / "table")
        described["table"] = describe_table(table)
        described["parameters"] |= table_parameters(table)
    for name, table in embeddings.items():
        of_table = table_parameters(table)
        of_table["loaded_per_token"] *= embedding_settings(config)[name].rows_per_token
        for key, number in of_table.items():
            described["parameters"][key] = described["parameters"].get(key, 0) + number
    return described


def embedding_tables(path: Path, config: dict[str, Any]) -> dict[str, Table]:
    """The tables of a folder's embeddings, by the names of the modules.

    Raises:
        TableError: one is missing, damaged, or of another model.
    """
    tables = {}
    for name, settings in embedding_settings(config).items():
        table = open_table(path / embedding_place(name))
        if table.manifest.fingerprint != settings.fingerprint:
            raise TableError(f"{table.folder}: this is the table of another model than {path}.")
        tables[name] = table
    return tables


def attached_settings(path: Path, config: dict[str, Any]) -> LookupSettings:
    """What was attached, by the `config.json` of a folder in our format."""
    if "lookup_experts" not in config:
        raise UserError(f"{path}: config.json doesn't say what was attached (lookup_experts).")
    return LookupSettings.from_dict(config["lookup_experts"])


def rows_of(path: Path, settings: LookupSettings) -> dict[str, Any]:
    """The form of a model's rows, and the numbers of one."""
    size = settings.row_size or text_config(path).hidden_size
    return {"form": settings.row_form, "size": size}


def count_parameters(folder: Path, marks: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Numbers of weights by the headers of a model folder's files.

    Args:
        folder: with the weights.
        marks: see `MARKS`.

    Returns:
        `resident` are all but `experts`; `readers`, where there are marks for them, are of these.
    """
    counts = dict.fromkeys(("resident", *(name for name in marks if name == "readers")), 0)
    counts["experts"] = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                number = math.prod(file.get_slice(name).get_shape())
                found = (kind for kind in marks if any(mark in name for mark in marks[kind]))
                kind = next(found, "resident")
                counts[kind] += number
                if kind == "readers":
                    counts["resident"] += number
    return counts


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DTYPES |= {"I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64", "BOOL": "bool"}


def weight_dtypes(folder: Path) -> list[str]:
    """The dtypes of a model folder's weights, that of most numbers first."""
    counts: Counter[str] = Counter()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_slice(name)
                dtype = weight.get_dtype()
                counts[_DTYPES.get(dtype, dtype)] += math.prod(weight.get_shape())
    return [dtype for dtype, _ in counts.most_common()]


def has_chat_template(folder: Path) -> bool | None:
    """Whether a folder's tokenizer has a chat template, by its files; None without a tokenizer."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        return False
    try:
        return bool(json.loads(settings.read_bytes()).get("chat_template"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings} can't be read: {error}.") from error


def backbone_parameters(folder: Path, settings: LookupSettings) -> int:
    """Those of the backbone that a folder with experts alone refers to."""
    assert settings.backbone is not None
    place, file = backbone_folder(folder, settings), settings.backbone.file
    if file is None:
        return count_parameters(place, {})["resident"]
    return sum(math.prod(shape) for _, (_, shape, _, _) in gguf_tensors(place / file))


def moe_parameters(folder: Path, settings: dict[str, int]) -> dict[str, int]:
    """Those of a mixture of experts: all are resident; a token uses those of its experts."""
    counts = count_parameters(folder, MOE_MARKS)
    outside = offloaded_mixture(
        settings["num_layers"],
        settings["num_experts"],
        settings["num_experts_per_tok"],
        settings["hidden_size"],
        settings["expert_size"],
    )
    total = counts["resident"] + counts["experts"]
    return {
        "resident": total,
        "experts": counts["experts"],
        "active": total - outside.parameters + outside.loaded_per_token,
        "offloaded": outside.parameters,
        "loaded_per_token": outside.loaded_per_token,
    }


def future_table_parameters(folder: Path, settings: LookupSettings) -> dict[str, int]:
    """Numbers that the table of experts in training form will stand for, and a token's share."""
    sizes = text_config(folder)
    row_size = settings.row_size or sizes.hidden_size
    table = offloaded_table(len(settings.layers), settings.num_experts, row_size, sizes.vocab_size)
    return {"offloaded": table.parameters, "loaded_per_token": table.loaded_per_token}


def text_config(folder: Path) -> Any:
    """What transformers makes of a folder's `config.json`, of the part that deals with text.

    Of a model with code of its own, which isn't run, only what the file states.
    """
    from transformers import AutoConfig, PreTrainedConfig

    config = read_config(folder)
    if needs_own_code(config) and "backbone" not in config:
        return PreTrainedConfig.from_dict(config)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: transformers can't read its config.json ({error}).") from error


def table_parameters(table: Table) -> dict[str, int]:
    """Numbers that a table stands for, and a token's share."""
    shape = table.layout.shape
    numbers = offloaded_table(shape.num_layers, shape.num_experts, shape.row_size, shape.vocab_size)
    return {"table": numbers.parameters, "loaded_per_token": numbers.loaded_per_token}


def describe_table(table: Table) -> dict[str, Any]:
    """A table's manifest in plain JSON values."""
    layout, manifest, counts = table.layout, table.manifest, read_counts(table)
    return {
        "shape": asdict(layout.shape),
        "encoding": layout.encoding.name,
        "block_size": layout.encoding.block_size,
        "record_bytes": layout.record_bytes,
        "stride": layout.stride,
        "table_bytes": layout.table_bytes,
        "shards": len(manifest.shards),
        "fingerprint": manifest.fingerprint,
        "created_by": manifest.created_by,
        "tokens_counted": None if counts is None else int(counts.sum()),
    }


@dataclass(frozen=True)
class Verification:
    """What `verify_folder` found."""

    folder: str
    report: VerifyReport
    matches_model: bool | None
    """None for a bare table: there was no model to compare with."""
    problems: tuple[str, ...]
    """One sentence each; empty if all is well."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "intact": not self.problems}


def verify_folder(
    folder: str | Path, progress: Progress | None = None, trust_remote_code: bool = False
) -> Verification:
    """Read a whole table, check every record, and that it belongs to the model beside it.

    Args:
        folder: an inference folder, or the folder of a table alone.
        progress: called with (ids done, ids in all).
        trust_remote_code: let code that the folder brings along run, which its model may need.

    Raises:
        TableError: the table's files are missing, truncated or foreign.
        UserError: there is no table to verify.
    """
    path = local_folder(folder)
    bare = (path / MANIFEST_NAME).exists()
    if bare:
        tables = {"": open_table(path)}
    else:
        config = read_config(path)
        tables = _tables_to_verify(path, config)
        if needs_own_code(config):
            require_trust(path, trust_remote_code)
    reports, problems = [], []
    for place, table in tables.items():
        read_counts(table)  # damaged, they are an error
        report = verify_table(table, progress)
        reports.append(report)
        where = f"{place}: " if len(tables) > 1 else ""
        if report.num_bad:
            problems.append(f"{where}{report.num_bad} of {report.num_ids} records are damaged")
        problems += [f"{where}record {bad.id} in {bad.file}: {bad.problem}" for bad in report.bad]
    mismatches = [] if bare else _mismatches(path, tables, trust_remote_code)
    return Verification(
        str(path),
        _together(reports),
        None if bare else not mismatches,
        tuple(problems + mismatches),
    )


def _tables_to_verify(path: Path, config: dict[str, Any]) -> dict[str, Table]:
    """The tables of a model folder, by their places; at least one."""
    if config.get("model_type") != LookupExpertsConfig.model_type:
        raise UserError(f"{path} has no table to verify: it is no model in table form.")
    places = [embedding_place(name) for name in embedding_settings(config)]
    if "lookup_experts" in config or not places:
        if attached_settings(path, config).form == "table":
            places.append(TABLE)
        elif not places:
            raise UserError(
                f"{path} has no table to verify: its experts are in training form. "
                "Fold them first: mole reparameterize."
            )
    return {place: open_table(path / place) for place in places}


def _together(reports: Sequence[VerifyReport]) -> VerifyReport:
    return VerifyReport(
        num_ids=sum(report.num_ids for report in reports),
        num_bad=sum(report.num_bad for report in reports),
        bad=tuple(bad for report in reports for bad in report.bad),
        num_bytes=sum(report.num_bytes for report in reports),
        seconds=sum(report.seconds for report in reports),
    )


def _mismatches(path: Path, tables: dict[str, Table], trust_remote_code: bool) -> list[str]:
    """What of the model beside its tables isn't what they were made from."""
    found = []
    try:
        model = load(path, store="mmap", weights="plain", trust_remote_code=trust_remote_code)
    except TableError as error:
        return [str(error)]
    embedding = model.get_input_embeddings()
    in_table = isinstance(embedding, TableEmbedding)  # whose own fingerprint was compared
    made_from = tables[TABLE].manifest.embedding_hash if TABLE in tables else None
    if TABLE in tables and not in_table and made_from != embedding_hash(embedding):
        found.append("the model's embedding isn't the one that the table was made from")
    made_with = {table.manifest.tokenizer_hash for table in tables.values()} - {None}
    if made_with - {tokenizer_hash(path)}:
        found.append("the tokenizer isn't the one that the table was made with")
    readers = table_readers(model)
    assert readers is not None
    readers.close()
    return found
