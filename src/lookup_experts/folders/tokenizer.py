"""The tokenizer beside a model, and what else prepares its input."""

import shutil
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.folders.model_folder import copy_file, first_line, local_folder
from lookup_experts.folders.own_code import copy_named_code, require_trust

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "audio_tokenizer_config.json",
    # Vocabularies, by the names that the tokenizers of transformers know.
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "bpe.codes",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_pronunciation.json",
    "word_shape.json",
)
"""The files of tokenizers and processors."""
_TEMPLATES = "additional_chat_templates"
"""The folder of the chat templates that have a name."""


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model.

    Args:
        folder: a folder, or a name on the Hugging Face hub.
        trust_remote_code: let code that the folder brings along for it run.

    Raises:
        UserError: the folder has none, or it needs code that may not be run.
    """
    from transformers import AutoTokenizer

    path = local_folder(folder)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}), so text can't become token "
            "ids. Put the tokenizer's files there."
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain exceptions
        if "trust_remote_code" in str(error):
            require_trust(f"The tokenizer in {path}", trust_remote_code)
        raise UserError(f"The tokenizer in {path} can't be read: {first_line(error)}") from error


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Bring the tokenizer of a model folder, with its chat templates and the processor that it is
    part of, to the folder `target`, over what is there. Nothing is loaded."""
    for path in _files(folder):
        copy_file(path, target / path.name)
    copy_named_code(folder.glob("*_config.json"), target)
    # A processor can have several tokenizers.
    inner = [path.parent for path in sorted(folder.glob("*_tokenizer/tokenizer_config.json"))]
    for part in [folder / _TEMPLATES, *inner]:
        if part.is_dir():
            shutil.rmtree(target / part.name, ignore_errors=True)
            (target / part.name).mkdir()
            for path in _files(part):
                copy_file(path, target / part.name / path.name)


def _files(folder: Path) -> list[Path]:
    patterns = ("*.jinja",) if folder.name == _TEMPLATES else _PATTERNS
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)
