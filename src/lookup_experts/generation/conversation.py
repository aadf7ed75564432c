"""A conversation: what was said so far, as the prompt of what is said next."""

from collections.abc import Callable
from typing import Any

from lookup_experts.generation.sampling import Sampling
from lookup_experts.generation.text import Generation, context_of, generate_ids


class Conversation:
    """Turns of a user and a model.

    With a chat template the turns are messages; without one they are one growing text. When they
    no longer fit the model's context, the oldest are forgotten, which is said. A turn is never cut:
    the answer ends where the context does.

    Args:
        model: any causal LM of transformers.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen.
        notify: told what is forgotten.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._notify = notify
        self._messages: list[dict[str, str]] = []

    def answer(self, turn: str, on_text: Callable[[str], None] | None = None) -> Generation:
        """The model's answer to a turn of the user; both are remembered.

        Raises:
            UserError: the turn alone fills the context; it is not remembered.
        """
        messages = [*self._messages, {"role": "user", "content": turn}]
        messages, prompt_ids = self._fitting(messages)
        generation = generate_ids(
            self._model,
            prompt_ids,
            self._sampling,
            tokenizer=self._tokenizer,
            on_text=on_text,
        )
        self._messages = [*messages, {"role": "assistant", "content": generation.text or ""}]
        return generation

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The latest messages that leave room for an answer, and their token ids."""
        context = context_of(self._model)
        ids = self._encode(messages)
        if context is None:
            return messages, ids
        room = min(self._sampling.max_new_tokens, context // 2)
        before = len(messages)
        while len(ids) + room > context and len(messages) > 2:
            messages = messages[2:]
            ids = self._encode(messages)
        if forgotten := (before - len(messages)) // 2:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            self._notify(
                f"The context of {context:,} tokens is full: the oldest {turns} forgotten."
            )
        return messages, ids

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            return self._tokenizer(text)["input_ids"]
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
