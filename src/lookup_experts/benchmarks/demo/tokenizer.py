"""A tokenizer for the demo's text."""

from pathlib import Path

from lookup_experts.benchmarks.demo.corpus import read_corpus
from lookup_experts.training.tokenizer import save_tokenizer

END_OF_DOCUMENT = "<|endoftext|>"


def train_tokenizer(corpus: Path, vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE tokenizer, save it to `folder`, and give its number of entries.

    Args:
        corpus: the file of `write_corpus`.
        vocab_size: the entries wanted; a short text gives fewer.
        folder: written whole or not at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_corpus(corpus), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT)
    save_tokenizer(fast, folder)
    return len(fast)
