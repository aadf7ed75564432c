"""The tokenizer beside a model."""

from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import first_line, local_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        UserError: the folder has none.
    """
    from transformers import AutoTokenizer

    path = local_folder(folder)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}), so text can't become token "
            "ids. Put the tokenizer's files there."
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UserError(f"The tokenizer in {path} can't be read: {first_line(error)}") from error
