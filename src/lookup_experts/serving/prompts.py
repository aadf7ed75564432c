"""From what a client sends to token ids that the model can take."""

import threading
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.messages import Message, Tool
from lookup_experts.serving.templates import ChatTemplate, own_template


class Prompter:
    """Turns prompts and conversations into token ids.

    Args:
        model: whose vocabulary and context count.
        tokenizer: its tokenizer; text is encoded by a copy, one at a time, since encoding may
            change its settings. Templates and decoding don't, and wait for nobody.
        chat_template: a template's text to use instead of the tokenizer's own, or None.
        end_ids: the token ids that end a text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, chat_template: str | None, end_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = deepcopy(tokenizer)
        self._lock = threading.Lock()
        ends = [name for name in tokenizer.convert_ids_to_tokens(list(end_ids)) if name]
        self._templates = [
            None if text is None else ChatTemplate(tokenizer, text, ends)
            for text in (
                chat_template or own_template(tokenizer),
                chat_template or own_template(tokenizer, for_tools=True),
            )
        ]
        self.vocab_size = vocab_size_of(model)
        self.context = context_of(model, tokenizer)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt given as text, or as ids, which are checked."""
        if isinstance(prompt, str):
            refuse_half_characters(prompt, "prompt")
            with self._lock:
                ids = self._tokenizer(prompt)["input_ids"]
        else:
            ids = list(prompt)
        if not ids:
            raise ApiError(400, "The prompt is empty; give at least one token.", "prompt")
        self.check_ids(ids, "prompt")
        return ids

    def template(self, for_tools: bool = False) -> ChatTemplate:
        """The chat template; that for tools, where there are two.

        Raises:
            ApiError: there is none.
        """
        template = self._templates[int(for_tools)]
        if template is None:
            raise ApiError(
                400,
                "This model's tokenizer has no chat template. Use /v1/completions, or start the "
                "server with --chat-template.",
                "messages",
                "no_chat_template",
            )
        return template

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._templates[0] is not None

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), goes_on: bool = False
    ) -> list[int]:
        """The ids of a conversation, up to where the answer begins, or goes on."""
        text = self.template(bool(tools)).render(messages, tools, goes_on)
        refuse_half_characters(text, "messages")
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ApiError(400, "The conversation has no text.", "messages")
        self.check_ids(ids, "messages")
        return ids

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raise an `ApiError` for ids that the model doesn't know; `ids` isn't empty."""
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < self.vocab_size:
                raise ApiError(
                    400,
                    f"Token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1}).",
                    param,
                )

    def room_for(self, ids: Sequence[int], max_tokens: int | None) -> int:
        """How many tokens may be generated: what was asked for, or all that fits."""
        wanted = 1 if max_tokens is None else max_tokens
        if len(ids) + wanted > self.context:
            raise ApiError(
                400,
                f"The prompt has {len(ids)} tokens and max_tokens is {wanted}, but the model's "
                f"context is {self.context} tokens; shorten the prompt or lower max_tokens.",
                "max_tokens" if len(ids) < self.context else "prompt",
                "context_length_exceeded",
            )
        return self.context - len(ids) if max_tokens is None else max_tokens

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens written out."""
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def refuse_half_characters(text: str, param: str) -> None:
    """Raise an `ApiError` for what JSON can write and no text can hold: half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400, f"Character {error.start} is half a surrogate pair; send whole ones.", param
        ) from error


def vocab_size_of(model: Any) -> int:
    """How many token ids the model knows; a table may know fewer than its embedding."""
    size = model.get_input_embeddings().weight.shape[0]
    layouts = [one.layout for one in getattr(model, "tables", {}).values()]
    table = getattr(getattr(model, "expert_source", None), "table", None)
    if table is not None:
        layouts.append(table.layout)
    return min([size, *(layout.shape.vocab_size for layout in layouts)])


def context_of(model: Any, tokenizer: Any) -> int:
    """Tokens that a prompt and its continuation may have together."""
    config = model.config.get_text_config(decoder=True)
    stated = getattr(config, "max_position_embeddings", None)
    if stated is None and tokenizer.model_max_length < 10**9:
        stated = tokenizer.model_max_length
    return 2048 if stated is None else int(stated)
