"""A stream of token ids as real text has them: which ids come, and how often, decides what is
read, what is cached and how much of a batch repeats."""

from pathlib import Path

import numpy as np

from lookup_experts.errors import UserError

MAX_CORPUS_BYTES = 8_000_000
MIN_CORPUS_BYTES = 1_000_000
TOKENIZER_ENTRIES = 16_384


def load_ids(path: Path, vocab_size: int) -> np.ndarray:
    """Token ids int64 from a `.npy` file or a folder that `mole prepare` made.

    Raises:
        UserError: no such file, another kind of file, or ids that the model doesn't have.
    """
    if path.is_dir():
        from lookup_experts.training.data import TokenShards

        shards = TokenShards(path, "train")
        ids = shards.window(0, shards.num_tokens).astype(np.int64)
    elif path.suffix == ".npy" and path.is_file():
        ids = np.load(path).astype(np.int64)
    else:
        raise UserError(f"{path}: expected a .npy file of token ids, or a folder of mole prepare.")
    if ids.ndim != 1 or not len(ids):
        raise UserError(f"{path}: expected one row of token ids, found the shape {ids.shape}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{path}: ids must be below {vocab_size}, the largest is {ids.max()}.")
    return ids


def standard_library_ids(work: Path) -> np.ndarray:
    """Token ids int64 of Python's standard library, which is on every machine.

    Args:
        work: where the ids are kept for the next time.
    """
    path = work / "standard-library-ids.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        _write_standard_library_ids(path)
    return np.load(path).astype(np.int64)


def _write_standard_library_ids(path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from lookup_experts.benchmarks.demo.corpus import read_corpus, standard_library, write_corpus
    from lookup_experts.benchmarks.demo.tokenizer import train_tokenizer
    from lookup_experts.training.files import atomic_write

    corpus, folder = path.with_suffix(".jsonl"), path.with_suffix("")
    write_corpus(standard_library(), corpus, MAX_CORPUS_BYTES, MIN_CORPUS_BYTES)
    train_tokenizer(corpus, TOKENIZER_ENTRIES, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [tokenizer(document)["input_ids"] for document in read_corpus(corpus)]
    with atomic_write(path) as file:
        np.save(file, np.concatenate(ids).astype(np.int32))
    corpus.unlink()
