"""What a run is trained on: prepared folders and streams, one or a mixture of several.

`--data` names a source: a folder of `mole prepare`, or `stream:` and what `mole prepare` takes (a
Hugging Face data set, .jsonl or .parquet files); `=0.7` at its end is its share of a mixture.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from lookup_experts.errors import UserError
from lookup_experts.training.data import TokenDataset, TokenShards
from lookup_experts.training.inputs import find_inputs
from lookup_experts.training.manifest import SPLITS, Manifest
from lookup_experts.training.order import (
    MixedSequences,
    SequenceSource,
    ShuffledSequences,
    share_out,
)
from lookup_experts.training.prepare import TOKENIZER_NAME
from lookup_experts.training.recipe import TrainingRecipe
from lookup_experts.training.run_folder import identify_data
from lookup_experts.training.streams import RowStream, StreamedSequences
from lookup_experts.training.tokenizer import (
    TOKENIZER_FILE,
    bos_token_ids,
    load_tokenizer,
    saved_tokenizer_hash,
    token_without_row,
    tokenizer_hash,
    vocabulary_size,
)

STREAM = "stream:"
_SHOWN_TOKENS = 16
"""Of a document's beginning, in a message."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of the tokenizer of its text."""

    tokenizer: dict[str, str]
    """`name` as it was given, and `hash`."""
    vocab_size: int
    """1 + the largest token id."""
    bos_token_ids: list[int]
    """The tokens before every document, if any."""
    eos_token_id: int
    """The token after every document."""


@dataclass(frozen=True)
class SourceName:
    """What one `--data` says."""

    name: str
    weight: float | None

    @classmethod
    def parse(cls, given: str | Path) -> "SourceName":
        name, equals, weight = str(given).rpartition("=")
        if not equals or Path(given).exists():
            return cls(str(given), None)
        try:
            share = float(weight)
        except ValueError:
            return cls(str(given), None)
        if not 0 < share < float("inf"):
            raise UserError(f"--data {given}: the weight is {weight}; expected a number above 0.")
        return cls(name, share)

    @property
    def is_stream(self) -> bool:
        return self.name.startswith(STREAM)


class PreparedSource:
    """A folder of token shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self._check_tokenizer()
        self.vocabulary = Vocabulary(
            self.manifest.tokenizer,
            self.manifest.vocab_size,
            self.manifest.bos_token_ids,
            self.manifest.eos_token_id,
        )
        self.identity: dict[str, Any] = identify_data(self.manifest)

    def _check_tokenizer(self) -> None:
        """The trained model gets a copy of it, so it must be the one that made the shards."""
        found = saved_tokenizer_hash(self.folder / TOKENIZER_NAME)
        if found != self.manifest.tokenizer["hash"]:
            what = "is missing" if found is None else "is not the one that the shards were made by"
            raise UserError(
                f"The tokenizer {self.folder / TOKENIZER_NAME / TOKENIZER_FILE} {what} "
                f"({self.manifest.tokenizer['name']}). Copy the folder again, or delete "
                f"{self.folder} and prepare the text again."
            )

    def require_rows(self, num_ids: int) -> None:
        """Raise a `UserError` that names the first token without a row, and its document."""
        if self.vocabulary.vocab_size <= num_ids:
            return
        for split in (name for name in SPLITS if self.manifest.splits[name]):
            shards = TokenShards(self.folder, split)
            position = shards.first_from(num_ids)
            if position is None:
                continue
            token_id = int(shards.window(position, 1)[0])
            number, before = shards.document_before(position)
            tokenizer = load_tokenizer(str(self.folder / TOKENIZER_NAME))
            begins = tokenizer.decode(before[:_SHOWN_TOKENS], skip_special_tokens=True)
            document = f"document {number:,} of the {split} text of {self.folder}"
            if begins.strip():
                document += f", which begins {begins.strip()!r}"
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise token_without_row(document, token, token_id, num_ids)

    def sequences(self, training: TrainingRecipe, seed: int) -> SequenceSource:
        tokens = TokenDataset(TokenShards(self.folder), training.context_length)
        return ShuffledSequences(tokens, training.num_sequences, seed)

    def held_out(self, training: TrainingRecipe) -> TokenDataset | None:
        if not self.manifest.splits["validation"]:
            return None
        return TokenDataset(TokenShards(self.folder, "validation"), training.context_length)

    def save_tokenizer(self, folder: Path) -> None:
        for path in (self.folder / TOKENIZER_NAME).glob("*"):
            shutil.copyfile(path, folder / path.name)


class StreamedSource:
    """Text that is tokenised while training."""

    def __init__(
        self, name: str, tokenizer: Any, tokenizer_name: str, bos: list[int], text_field: str
    ) -> None:
        self._name = name
        self._inputs = find_inputs([name.removeprefix(STREAM)])
        self._tokenizer = tokenizer
        self._text_field = text_field
        self._num_ids: int | None = None
        self.vocabulary = Vocabulary(
            {"name": tokenizer_name, "hash": tokenizer_hash(tokenizer)},
            vocabulary_size(tokenizer),
            bos,
            tokenizer.eos_token_id,
        )
        self.identity: dict[str, Any] = {
            "tokenizer": self.vocabulary.tokenizer["hash"],
            "stream": [source.for_manifest() for source in self._inputs],
            "text_field": text_field,
        }
        if bos:  # runs from before there was a choice had none, and don't state it
            self.identity["bos_token_ids"] = bos

    def require_rows(self, num_ids: int) -> None:
        """Raise that `UserError` later, when the row with such a token is read."""
        self._num_ids = num_ids if self.vocabulary.vocab_size > num_ids else None

    def sequences(self, training: TrainingRecipe, seed: int) -> StreamedSequences:
        rows = RowStream(self._inputs, self._text_field)
        # Batches are fetched at most a step before they are trained on, and one more.
        lag = 2 * training.sequences_per_step
        return StreamedSequences(
            rows,
            self._tokenizer,
            training.context_length,
            lag,
            bos=self.vocabulary.bos_token_ids,
            num_ids=self._num_ids,
        )

    def held_out(self, training: TrainingRecipe) -> None:
        return None

    def save_tokenizer(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


Source = PreparedSource | StreamedSource


class TrainingData:
    """The sources of a run.

    Args:
        names: what each `--data` says.
        tokenizer: for streams: a tokenizer's folder, its tokenizer.json, or its name on the hub;
            None: that of the first prepared folder.
        text_field: of a stream's rows, the field with the text.

    Raises:
        UserError: a source can't be read, weights are missing, or tokenizers differ.
    """

    def __init__(
        self,
        names: Sequence[str | Path],
        tokenizer: str | Path | None = None,
        text_field: str = "text",
    ) -> None:
        parsed = [SourceName.parse(name) for name in names]
        self._weights = _weights_of(parsed)
        self._sources = _open_sources(parsed, tokenizer, text_field)
        self.vocabulary = _common_vocabulary(parsed, self._sources)

    def identity(self) -> dict[str, Any]:
        """What tells this data from other, wherever it is."""
        if len(self._sources) == 1:
            return self._sources[0].identity
        pairs = zip(self._weights, self._sources, strict=True)
        return {
            f"source {number}": {"weight": weight, **source.identity}
            for number, (weight, source) in enumerate(pairs)
        }

    def require_rows(self, num_ids: int) -> None:
        """See that a model with rows for the ids below `num_ids` can train on this.

        The tokenizer may own ids beyond, as long as the text doesn't use them.

        Raises:
            UserError: prepared text has such a token. For streams it is raised while training.
        """
        for source in self._sources:
            source.require_rows(num_ids)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder that exists."""
        self._sources[0].save_tokenizer(folder)

    def sequences(self, training: TrainingRecipe) -> Dataset[Any]:
        """All sequences of a run, in their order."""
        opened = [
            source.sequences(training, training.seed + number)
            for number, source in enumerate(self._sources)
        ]
        if len(opened) == 1 and isinstance(opened[0], ShuffledSequences):
            return opened[0]
        return MixedSequences(opened, self._weights, training.num_sequences, training.seed)

    def held_out(self, training: TrainingRecipe) -> Dataset[Any] | None:
        """The sequences of every validation, spread evenly; None where no text was held out.

        Of a mixture each source that has held-out text gives its share.
        """
        opened = [source.held_out(training) for source in self._sources]
        found = [(w, d) for w, d in zip(self._weights, opened, strict=True) if d is not None]
        if not found:
            return None
        wanted = max(training.validate_sequences, len(found))
        counts = share_out(wanted, [weight for weight, _ in found])
        parts = [_spread(d, int(count)) for count, (_, d) in zip(counts, found, strict=True)]
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _weights_of(names: list[SourceName]) -> list[float]:
    if len(names) == 1:
        return [1.0]
    for source in names:
        if source.weight is None:
            raise UserError(
                f"--data {source.name} has no weight; with several sources give each its share, "
                f"like --data {source.name}=0.5."
            )
    return [source.weight or 0.0 for source in names]


def _open_sources(
    names: list[SourceName], tokenizer: str | Path | None, text_field: str
) -> list[Source]:
    prepared = {s: PreparedSource(Path(s.name)) for s in names if not s.is_stream}
    if len(prepared) == len(names):
        if tokenizer is not None:
            raise UserError("--tokenizer is for streams; prepared folders bring their own.")
        return [prepared[source] for source in names]
    if tokenizer is None:
        if not prepared:
            raise UserError(
                f"--data {names[0].name} is tokenised while training: name its --tokenizer."
            )
        tokenizer = next(iter(prepared.values())).folder / TOKENIZER_NAME
    loaded = load_tokenizer(str(tokenizer))
    # A mixture has one beginning: that of what was prepared.
    begun = [source.vocabulary.bos_token_ids for source in prepared.values()]
    bos = begun[0] if begun else bos_token_ids(loaded)
    return [
        prepared.get(source) or StreamedSource(source.name, loaded, str(tokenizer), bos, text_field)
        for source in names
    ]


def _common_vocabulary(names: list[SourceName], sources: list[Source]) -> Vocabulary:
    first = sources[0].vocabulary
    for name, source in zip(names, sources, strict=True):
        if source.vocabulary.tokenizer["hash"] != first.tokenizer["hash"]:
            raise UserError(
                f"{names[0].name} and {name.name} were tokenised by different tokenizers "
                f"({first.tokenizer['name']} and {source.vocabulary.tokenizer['name']}). Prepare "
                "them with the same one."
            )
        if source.vocabulary.bos_token_ids != first.bos_token_ids:
            raise UserError(
                f"The documents of {names[0].name} and {name.name} begin with different tokens "
                f"({first.bos_token_ids} and {source.vocabulary.bos_token_ids}). Prepare them "
                "alike: both with --no-bos, or both without."
            )
    return first


def _spread(sequences: TokenDataset, count: int) -> Subset[Any]:
    """So many sequences, or all, evenly over the text."""
    count = min(count, len(sequences))
    return Subset(sequences, [i * len(sequences) // count for i in range(count)])
