"""From what a client sends to token ids that the model can take."""

import threading
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.protocol import Message

PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Prompter:
    """Turns prompts and conversations into token ids.

    Args:
        model: whose vocabulary and context count.
        tokenizer: its tokenizer; text is encoded by a copy, one at a time, since encoding may
            change its settings. Decoding doesn't, and waits for nobody.
        chat_template: a template's text to use instead of the tokenizer's own, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, chat_template: str | None) -> None:
        self._tokenizer = deepcopy(tokenizer)
        self._decoder = tokenizer
        self._lock = threading.Lock()
        self._template = chat_template or _own_template(tokenizer)
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
        self._check(ids)
        return ids

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._template is not None

    def encode_chat(self, messages: Sequence[Message], goes_on: bool = False) -> list[int]:
        """The ids of a conversation, up to where the answer begins, or goes on."""
        if self._template is None:
            raise ApiError(
                400,
                "This model's tokenizer has no chat template. Use /v1/completions, or start the "
                "server with --chat-template.",
                "messages",
                "no_chat_template",
            )
        conversation = [message.to_template() for message in messages]
        for message in conversation:
            refuse_half_characters(message["content"], "messages")
        try:
            with self._lock:
                ids = self._tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self._template,
                    add_generation_prompt=not goes_on,
                    continue_final_message=goes_on,
                    tokenize=True,
                    return_dict=False,
                )
        except _template_errors() as error:
            raise ApiError(
                400, f"The chat template refuses these messages: {error}.", "messages"
            ) from error
        if not ids:
            raise ApiError(400, "The conversation has no text.", "messages")
        self._check(ids)
        return ids

    def _check(self, ids: Sequence[int]) -> None:
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < self.vocab_size:
                raise ApiError(
                    400,
                    f"Token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1}).",
                    "prompt",
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

    def token_text(self, token_id: int) -> str:
        """One token alone as text."""
        return self.text([token_id])

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text."""
        return self._decoder.decode(list(ids), clean_up_tokenization_spaces=False)


def _own_template(tokenizer: Any) -> str | None:
    """A tokenizer's chat template: the default one, where it has several with names."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template may raise: it is a program, and not of this server."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)


def refuse_half_characters(text: str, param: str) -> None:
    """Raise an `ApiError` for what JSON can write and no text can hold: half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400, f"Character {error.start} is half a surrogate pair; send whole ones.", param
        ) from error


def vocab_size_of(model: Any) -> int:
    """How many token ids the model knows; its table may know fewer than its embedding."""
    size = model.get_input_embeddings().weight.shape[0]
    table = getattr(getattr(model, "expert_source", None), "table", None)
    return size if table is None else min(size, table.layout.shape.vocab_size)


def context_of(model: Any, tokenizer: Any) -> int:
    """Tokens that a prompt and its continuation may have together."""
    config = model.config.get_text_config(decoder=True)
    stated = getattr(config, "max_position_embeddings", None)
    if stated is None and tokenizer.model_max_length < 10**9:
        stated = tokenizer.model_max_length
    return 2048 if stated is None else int(stated)


def read_chat_template(given: str | None) -> str | None:
    """The template that `--chat-template` names: a file, or `plain`.

    Raises:
        UserError: no such file.
    """
    if given is None:
        return None
    if given == PLAIN:
        return PLAIN_TEMPLATE
    try:
        return Path(given).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {given}: {error}. Give a file with a Jinja template, or plain."
        ) from error


def check_chat_template(tokenizer: Any, template: str | None) -> None:
    """Raise a `UserError` for a template that can't be read as one."""
    from jinja2.exceptions import TemplateSyntaxError

    if template is None:
        return
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], chat_template=template, tokenize=False
        )
    except TemplateSyntaxError as error:
        raise UserError(f"The chat template, line {error.lineno}: {error.message}.") from error
    except _template_errors():
        pass  # it may refuse this conversation and take others
