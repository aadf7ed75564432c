"""Prepared text and recipes so small that a training run takes a second."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookup_experts.training.recipe import Recipe

CONTEXT = 16


def make_tokenizer(folder: Path, begin: str = "", more: Sequence[str] = ()) -> Path:
    """A byte-level BPE tokenizer of 300 entries with an end-of-document token.

    Args:
        folder: where it goes.
        begin: a token of its own that is put before every text, as Llama 3 and Gemma do.
        more: tokens that get the ids after all others.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", begin] if begin else ["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(0)], trainer)
    names = {"eos_token": "<|end|>"}
    if begin:
        names["bos_token"] = begin
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A $B",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )
    tokenizer.add_special_tokens(list(more))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def make_text(seed: int, num_words: int = 400) -> str:
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "and", "then"]
    chosen = random.Random(seed)
    return " ".join(chosen.choice(words) for _ in range(num_words))


def make_data(folder: Path, seed: int = 0, validation: float = 0.2) -> Path:
    """What `mole prepare` makes of ten documents."""
    from lookup_experts.training.prepare import prepare

    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(10):
        (texts / f"{number}.txt").write_text(make_text(100 * seed + number))
    tokenizer = make_tokenizer(folder / "tokenizer")
    out = folder / "data"
    prepare([texts], tokenizer=tokenizer, out=out, validation=validation, num_workers=1)
    return out


def tiny_recipe(experts: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """Hidden 32, two layers, a few steps; keyword arguments replace keys of `training`."""
    model: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_size": 64,
        "init_std": 0.02,
    }
    if experts is not None:
        model["experts"] = experts
    length = {} if "tokens" in training else {"steps": 6}
    return Recipe.from_dict(
        {
            "model": model,
            "training": {
                "context_length": CONTEXT,
                "sequences_per_step": 4,
                "sequences_per_micro_batch": 2,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "log_every": 2,
                "validate_every": 4,
                "validate_sequences": 4,
                "checkpoint_every": 2,
                **length,
                **training,
            },
        }
    )
