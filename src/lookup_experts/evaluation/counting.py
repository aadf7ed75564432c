"""How often each token occurs in a text: what `reparameterize` keeps with a table."""

from pathlib import Path

import numpy as np

from lookup_experts.errors import UserError
from lookup_experts.evaluation.text import find_text, token_chunks
from lookup_experts.folders.model_folder import local_folder
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation.inspection import text_config
from lookup_experts.table.progress import Progress
from lookup_experts.training.data import TokenShards
from lookup_experts.training.sources import PreparedSource
from lookup_experts.training.upcycling import check_tokenizer

TOKENS_AT_ONCE = 2**22


def count_tokens(
    text: Path, model: str | Path, progress: Progress, trust_remote_code: bool = False
) -> np.ndarray:
    """Count the token ids of a text.

    Args:
        text: a folder of `mole prepare`, whose training text counts, or a file with text.
        model: the folder, or the name on the hub, of the model, whose tokenizer cuts a text.
        progress: called with (tokens or bytes done, in all).
        trust_remote_code: let code that the tokenizer brings along run.

    Returns:
        int64 [vocab_size of the model].

    Raises:
        UserError: no such text, it was prepared with another tokenizer, it has no tokens, or it
            has ids that the model doesn't have.
    """
    folder = local_folder(model)
    counts = np.zeros(text_config(folder).vocab_size, np.int64)
    if text.is_dir():
        prepared = PreparedSource(text)
        check_tokenizer(folder, prepared.vocabulary)
        prepared.require_rows(len(counts))
        shards = TokenShards(text)
        for start in range(0, shards.num_tokens, TOKENS_AT_ONCE):
            ids = shards.window(start, min(TOKENS_AT_ONCE, shards.num_tokens - start))
            np.add.at(counts, ids, 1)
            progress(start + len(ids), shards.num_tokens)
    else:
        source = find_text(text)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        for found, position in token_chunks(source, tokenizer, len(counts)):
            np.add.at(counts, np.array(found, np.int64), 1)
            progress(position, source.num_bytes)
    if not counts.any():
        raise UserError(f"{text} has no tokens to count.")
    return counts
