"""Token shards on disk: the specification, and the manifest that describes them.

A prepared folder holds

    manifest.json          what is in it; written last, so a folder that has one is complete
    job.json               what was asked for; written first, compared when the command is repeated
    tokenizer/             the tokenizer as `AutoTokenizer` saves it
    train-00000.bin ...    the training text
    validation-00000.bin   the held-out text; no file where nothing was held out

A shard is nothing but token ids, little-endian, `uint16` where the vocabulary has at most 65,536
entries and `uint32` where it has more. A split is its shards one after the other: documents in the
order of the inputs, each between what the tokenizer puts before a text and the end-of-document
token. All shards of a split but the last hold the same number of tokens, and a document may go on
in the next shard.

manifest.json is one JSON object with exactly these keys:

    format, version        "lookup-experts token shards", 1
    tokenizer              {name, hash}: as it was given; SHA-256 of tokenizer/tokenizer.json
    vocab_size             1 + the largest token id of the tokenizer
    bos_token_ids          what is before every document: what the tokenizer begins a text with, or
                           [] (`--no-bos`); a manifest without this key means []
    eos_token_id           the end-of-document token
    dtype                  "uint16" or "uint32"
    held_out               {fraction, by}: by "document", by "tail" (the end of the text, where
                           there is one document only), or "nothing"
    splits                 {train, validation}: each a list of shards
                           {file, num_tokens, num_documents, sha256, largest_token_id}; a document
                           counts where it ends; the last key may be missing
    num_empty_documents    documents without text, left out
    inputs                 [{name, num_bytes}] or, for hub data sets, [{name, revision}]

Other versions and keys are refused. Writing shards is in `shards.py`, reading them in `data.py`.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from lookup_experts.errors import UserError

FORMAT = "lookup-experts token shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
_OPTIONAL = {"bos_token_ids"}


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    num_tokens: int
    num_documents: int
    sha256: str
    largest_token_id: int | None = None
    """None in folders from before it was noted."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says, see the top of this module."""

    tokenizer: dict[str, str]
    vocab_size: int
    eos_token_id: int
    dtype: str
    held_out: dict[str, Any]
    splits: dict[str, list[Shard]]
    num_empty_documents: int
    inputs: list[dict[str, Any]]
    bos_token_ids: list[int] = field(default_factory=list)

    def num_tokens(self, split: str) -> int:
        return sum(shard.num_tokens for shard in self.splits[split])

    def num_documents(self, split: str) -> int:
        return sum(shard.num_documents for shard in self.splits[split])

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The manifest of a prepared folder; a `UserError` where there is none, or not a whole one.

        Sizes are compared with the files, contents are not (`TokenShards.verify` does that).
        """
        path = folder / MANIFEST_NAME
        try:
            manifest = cls._from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no token shards (no {MANIFEST_NAME}). "
                f"Make or finish them with `mole prepare ... --out {folder}`."
            ) from None
        except NotADirectoryError:
            raise UserError(f"{folder} is a file; expected a folder of `mole prepare`.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} can't be read: {error}. Delete {folder} and prepare the text again."
            ) from None
        manifest._check_files(folder)
        return manifest

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        given = (content.pop("format", None), content.pop("version", None))
        if given != (FORMAT, VERSION):
            raise ValueError(f"it is of format {given}, expected {(FORMAT, VERSION)}")
        expected = {known.name for known in fields(cls)}
        if set(content) | _OPTIONAL != expected:
            different = (set(content) | _OPTIONAL) ^ expected
            raise ValueError(f"unknown or missing keys {sorted(different)}")
        if content["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"unknown dtype {content['dtype']!r}")
        splits = {name: [Shard(**shard) for shard in content["splits"][name]] for name in SPLITS}
        for name, shards in splits.items():
            # Names are fixed, so that no path leads out of the folder.
            if [shard.file for shard in shards] != [
                shard_name(name, i) for i in range(len(shards))
            ]:
                raise ValueError(f"the shards of {name!r} are not numbered from 0")
        return cls(**{**content, "splits": splits})

    def _check_files(self, folder: Path) -> None:
        item_bytes = int(self.dtype.removeprefix("uint")) // 8
        for shard in (shard for split in SPLITS for shard in self.splits[split]):
            path = folder / shard.file
            expected = shard.num_tokens * item_bytes
            actual = path.stat().st_size if path.is_file() else None
            if actual != expected:
                what = "is missing" if actual is None else f"has {actual} bytes"
                raise UserError(
                    f"{path} {what}, expected {expected} bytes. "
                    f"Copy it again, or delete {folder} and prepare the text again."
                )


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"
