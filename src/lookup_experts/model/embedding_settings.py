"""Which embeddings of a model lie in tables, as plain values that a configuration can hold."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from lookup_experts.errors import UserError

KEY = "offloaded_embeddings"
"""Of a configuration: module name -> `EmbeddingSettings` as a dict."""
_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class EmbeddingSettings:
    """How one embedding's rows lie in its table."""

    layers: int
    """L, in how many parts a row is used, each in a block of its own; 1: at once."""
    rows_per_token: int
    """How many rows a token of text needs; more than one where n-grams are hashed."""
    fingerprint: str
    """Of the embedding's weight; the table must say the same."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def embedding_settings(config: Any) -> dict[str, EmbeddingSettings]:
    """What a configuration, or a `config.json`, says of embeddings in tables, by module name; empty
    where it says nothing.

    Raises:
        UserError: it isn't what `offload` writes.
    """
    values = config.get(KEY) if isinstance(config, dict) else getattr(config, KEY, None)
    if values is None:
        return {}
    fields = set(EmbeddingSettings.__dataclass_fields__)
    well_formed = isinstance(values, dict) and all(
        isinstance(name, str)
        and _NAME.fullmatch(name)
        and isinstance(one, dict)
        and set(one) == fields
        and all(
            isinstance(one[size], int) and one[size] > 0 for size in ("layers", "rows_per_token")
        )
        and isinstance(one["fingerprint"], str)
        for name, one in values.items()
    )
    if not well_formed:
        raise UserError(
            f"The model's configuration should say of each embedding in a table its "
            f"{', '.join(sorted(fields))} ({KEY}); it says {values!r:.200}."
        )
    return {name: EmbeddingSettings(**one) for name, one in values.items()}
