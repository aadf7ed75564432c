"""How large the demo is: everything that decides how long it takes and what it can show."""

from dataclasses import dataclass
from typing import Any

BYTES_PER_NUMBER = 4
"""Everything is float32: then table and experts agree to the last token."""
_CHECKPOINT_BYTES_PER_PARAMETER = 12
_CHECKPOINTS = 2
"""One is kept, and one more is there while it is written."""


@dataclass(frozen=True)
class Sizes:
    """Of the text, the models and the measurements."""

    text_bytes: int
    """At most so much text is used, from the beginning."""
    min_text_bytes: int
    """With less text there is nothing to learn and too little to hold out."""
    vocab_size: int
    """Entries of the tokenizer, unless the text has fewer."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_experts: int
    """Routed experts per layer of the MoLE model; each is as large as the FFN."""
    context_length: int
    sequences_per_step: int
    steps: int
    learning_rate: float
    validate_sequences: int
    held_out: float = 0.05
    """The share of the text that is held out."""
    validations: int = 5
    """Evenly over the training; so often a checkpoint is written, too."""
    prompts: int = 6
    """Passages of held-out text that are continued from the experts and from the table."""
    prompt_tokens: int = 24
    new_tokens: int = 40
    decode_passages: int = 2
    """Passages of held-out text, each a context long, that decoding is timed on."""

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size

    def recipe(self, num_experts: int | None) -> dict[str, Any]:
        """The content of a recipe: the MoLE model's, or with None that of the dense model."""
        model: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "ffn_size": self.ffn_size,
            "init_std": 0.02,
        }
        if num_experts is not None:
            model["experts"] = {"num_experts": num_experts}
        every = -(-self.steps // self.validations)
        return {
            "model": model,
            "training": {
                "context_length": self.context_length,
                "steps": self.steps,
                "sequences_per_step": self.sequences_per_step,
                "sequences_per_micro_batch": self.sequences_per_step,
                "learning_rate": self.learning_rate,
                "warmup_fraction": 0.05,
                # Many processors have no bfloat16 arithmetic and take longer for it.
                "precision": "fp32",
                "validate_every": every,
                "validate_sequences": self.validate_sequences,
                "checkpoint_every": every,
                "keep_checkpoints": 1,
            },
        }

    def disk_bytes(self) -> int:
        """About what a demo needs on the disk at its fullest."""
        dense = 2 * self.vocab_size * self.hidden_size + self.num_layers * (
            4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_size
        )
        experts = self.num_layers * self.num_experts * 2 * self.hidden_size * self.ffn_size
        table = self.num_layers * self.num_experts * self.hidden_size * self.vocab_size
        checkpoints = _CHECKPOINTS * (2 * dense + experts) * _CHECKPOINT_BYTES_PER_PARAMETER
        models = (3 * dense + experts + table) * BYTES_PER_NUMBER
        return checkpoints + models + 2 * self.text_bytes


FULL = Sizes(
    text_bytes=16_000_000,
    min_text_bytes=200_000,
    vocab_size=8192,
    hidden_size=384,
    num_layers=3,
    num_heads=6,
    num_experts=4,
    context_length=256,
    sequences_per_step=4,
    steps=170,
    learning_rate=1.5e-3,
    validate_sequences=64,
)
QUICK = Sizes(
    text_bytes=2_500_000,
    min_text_bytes=200_000,
    vocab_size=4096,
    hidden_size=256,
    num_layers=3,
    num_heads=4,
    num_experts=4,
    context_length=256,
    sequences_per_step=2,
    steps=100,
    learning_rate=1e-3,
    validate_sequences=32,
    validations=2,
    decode_passages=1,
)
