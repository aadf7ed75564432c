"""Folders with random numbers that `mole serve` takes: the backbone alone, and MoLE from disk."""

from pathlib import Path
from typing import Any

from lookup_experts.benchmarks.models import FINGERPRINT, Case, dense_model, table_model
from lookup_experts.generation.folding import save_without_experts
from lookup_experts.table.opening import Table


def save_folders(case: Case, table: Table, work: Path) -> dict[str, Path]:
    """A folder for each system, by name, written anew; the table stays where it is.

    Args:
        case: the shape and the number of experts.
        table: of the case.
        work: where the folders go.
    """
    folders = {name: work / "serve" / f"{case.name}-{name}" for name in ("dense", "mole")}
    models = {"dense": dense_model(case), "mole": table_model(case, table, "direct")}
    for name, folder in folders.items():
        model = models[name]
        # Random weights would end some texts early, and the systems' at different places.
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        if name == "mole":
            save_without_experts(model, folder, FINGERPRINT)
            link = folder / "table"
            link.unlink(missing_ok=True)
            link.symlink_to(table.folder.resolve())
        else:
            model.save_pretrained(folder)
        counting_tokenizer(case.layout.shape.vocab_size).save_pretrained(folder)
    return folders


def counting_tokenizer(vocab_size: int) -> Any:
    """A text for every id: the bytes, then a made-up word for each further id.

    Prompts are sent as ids, so it only turns what is generated into text of a usual length.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"Ġ{number}" for number in range(max(0, vocab_size - len(letters)))]
    vocabulary = {word: number for number, word in enumerate(words[:vocab_size])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
