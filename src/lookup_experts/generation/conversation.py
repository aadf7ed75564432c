"""A conversation: what was said so far, as the prompt of what is said next."""

from collections.abc import Callable
from typing import Any

from lookup_experts.generation.text import Generation, Sampling, generate_ids


class Conversation:
    """Turns of a user and a model.

    With a chat template the turns are messages; without one they are one growing text. When it
    no longer fits the model's context, the oldest turns are forgotten.

    Args:
        model: any causal LM of transformers.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._messages: list[dict[str, str]] = []

    def answer(self, turn: str, on_text: Callable[[str], None] | None = None) -> Generation:
        """The model's answer to a turn of the user; both are remembered."""
        self._messages.append({"role": "user", "content": turn})
        generation = generate_ids(
            self._model,
            self._prompt_ids(),
            self._sampling,
            tokenizer=self._tokenizer,
            on_text=on_text,
        )
        self._messages.append({"role": "assistant", "content": generation.text or ""})
        return generation

    def _prompt_ids(self) -> list[int]:
        context = getattr(self._model.config, "max_position_embeddings", None)
        ids = self._encode()
        while context is not None and len(ids) + self._sampling.max_new_tokens > context:
            if len(self._messages) < 3:
                return ids[-max(1, context - self._sampling.max_new_tokens) :]
            del self._messages[:2]
            ids = self._encode()
        return ids

    def _encode(self) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in self._messages)
            return self._tokenizer(text)["input_ids"]
        return self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
