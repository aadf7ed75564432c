"""Models whose embeddings lie in tables: what their class does differently, once they are there.

As with lookup experts the class is a subclass of the model's own, made when it is first needed.
Making the folder of such a model is `generation/offload.py`.
"""

from functools import cache
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.folders.configuration import attached_config_class
from lookup_experts.folders.model_folder import find_folder
from lookup_experts.folders.replacing import replaced_model
from lookup_experts.folders.tables import (
    TABLE_OPTIONS,
    embedding_place,
    one_store,
    share_cache,
)
from lookup_experts.made_classes import make_class
from lookup_experts.model.embedding_settings import embedding_settings
from lookup_experts.model.table_embedding import put_in_table, table_embeddings
from lookup_experts.table.reader import TableReader, open_reader

PREFIX = "Offloaded"
"""What the name of such a model's class says beside that of the model."""


class OffloadedEmbeddingsMixin:
    """What a model does differently whose embeddings lie in tables."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for name, settings in embedding_settings(config).items():
            put_in_table(_embedding(self, name), settings.layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; the tables beside the weights are opened too.

        Keyword arguments named in `TABLE_OPTIONS` go to their readers.

        Raises:
            TableError: a table is missing, damaged, or of another model.
        """
        options = {name: kwargs.pop(name) for name in TABLE_OPTIONS if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if key in kwargs}
        folder = find_folder(pretrained_model_name_or_path, **hub)
        _open_tables(model, folder, one_store(folder, options))
        return loaded

    @property
    def embedding_readers(self) -> dict[str, TableReader]:
        """What reads the tables of embeddings, by the names of the modules."""
        model: Any = self
        return {name: module.source for name, module in table_embeddings(model).items()}  # type: ignore[misc]

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Refused, since a table has the rows that it has.

        Raises:
            UserError: in any case, but where nothing is to be resized.
        """
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            raise UserError(
                "The vocabulary of a model whose embeddings lie in tables can't be resized, since "
                "its tables have the rows that they were made with. Resize the model that it was "
                "made from, and offload it anew."
            )
        return super().resize_token_embeddings(  # type: ignore[misc]
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As transformers does; the tables are saved with the weights."""
        if not is_main_process:  # which then writes nothing
            super().save_pretrained(save_directory, is_main_process, **kwargs)  # type: ignore[misc]
            return
        tables = {
            embedding_place(name): reader.folder for name, reader in self.embedding_readers.items()
        }
        with replaced_model(Path(save_directory), kwargs.get("variant"), tables) as folder:
            super().save_pretrained(folder, is_main_process, **kwargs)  # type: ignore[misc]


@cache
def offloaded_class(model_class: Any) -> Any:
    """The class of a model whose embeddings lie in tables: a subclass of the model's own."""
    return make_class(
        offloaded_class,
        model_class,
        PREFIX + model_class.__name__,
        (OffloadedEmbeddingsMixin, model_class),
        __doc__=f"{model_class.__name__} with embeddings in tables.",
        config_class=attached_config_class(model_class.config_class),
    )


def _embedding(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"The configuration says that the embedding {name!r} lies in a table, and this "
            f"{type(model).__name__} has no such module."
        ) from None


def _open_tables(model: Any, folder: Path, options: dict[str, Any]) -> None:
    settings = embedding_settings(model.config)
    shares = share_cache(folder, options.pop("cache", 0), model.config)
    for name, embedding in table_embeddings(model).items():
        place, one, like = embedding_place(name), settings[name], embedding.like
        embedding.source = open_reader(
            folder / place,
            num_layers=one.layers,
            num_experts=1,
            row_size=embedding.embedding_dim // one.layers,
            fingerprint=one.fingerprint,
            dtype=like.dtype,
            vocab_size=embedding.num_embeddings,
            rows_per_token=one.rows_per_token,
            device=like.device,
            cache=shares.get(place, 0),
            **options,
        )
