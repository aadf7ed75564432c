"""Small tokenizers of each kind that models have, trained on a few words."""

import json
from typing import Any

TEXT = "the quick brown fox jumps over the lazy dog, once upon a time; the end."
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_fallback_tokenizer() -> Any:
    """As Llama 2's and Gemma's: words begin with ▁, and what is unknown comes as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=["▁"],
        show_progress=False,
    )
    trained.train_from_iterator(TEXT.split(", "), trainer)
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in BYTES:
        vocabulary[byte] = len(vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def word_piece_tokenizer() -> Any:
    """As BERT's: words, and pieces of words that begin with ##."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=100, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    trained.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="[UNK]", sep_token="[SEP]")


SPECIALS = ["<pad>", "<|im_start|>", "<|im_end|>", "[TOOL_CALLS]"]


def writing_tokenizer(chat_template: str | None = None) -> Any:
    """Byte-level with all bytes, so that it can write anything; `<|im_end|>` ends a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT], trainer)
    trained.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def writing_model(seed: int = 0) -> Any:
    """A tiny model for it, with a context in which JSON has room."""
    from tiny_models import tiny_model

    return tiny_model("llama", seed, vocab_size=320, max_position_embeddings=2048, eos_token_id=2)
