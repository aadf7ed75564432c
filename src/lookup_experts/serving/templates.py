"""Chat templates: a conversation as the text that a model was trained to read.

A template is a program of the model's maker, and each takes conversations in its own way. What it
takes is found by trying it with a few words: whether it puts a message's text where it belongs,
whether it wants parts or a string, how it writes the call of a tool. What it would leave out is
refused, rather than that the model answers what nobody said.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from lookup_experts.errors import UserError
from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.messages import MadeCall, Message, Tool
from lookup_experts.serving.tool_calls import PROBE, ToolSyntax, syntax_of

PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
Conversation = list[dict[str, Any]]


class ChatTemplate:
    """One template, and what it takes. Safe to use from any thread.

    Args:
        tokenizer: whose special tokens the template may name.
        text: the template.
        end_names: the names of the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, text: str, end_names: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._end_names = end_names

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), goes_on: bool = False
    ) -> str:
        """A conversation up to where the answer begins, or goes on with the last message.

        Raises:
            ApiError: the template refuses it, or would leave something out.
        """
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        try:
            text = self._apply(self._conversation(messages), described, not goes_on, goes_on)
        except template_errors() as error:
            raise ApiError(
                400,
                f"The chat template refuses these messages: {str(error).rstrip('.')}.",
                "messages",
            ) from error
        self._check_nothing_is_left_out(messages, described)
        return text

    @cached_property
    def tool_syntax(self) -> ToolSyntax | None:
        """How calls of tools are written; None if the template has no place for tools, or calls
        are no JSON in it."""
        return syntax_of(self._try_calls, self._end_names)

    def _try_calls(self, conversation: Conversation, tools: list[Any], prompt: bool) -> str | None:
        for message in conversation:
            for call in message.get("tool_calls", ()):
                if self._wants_arguments_as_text:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return self._try(conversation, tools, prompt)

    # ------------------------------------------------------------------ what the template wants

    @cached_property
    def _knows_developer(self) -> bool:
        return "developer" in self._text

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a text is lost as a string, and not as a list of parts."""
        as_text = self._try([{"role": "user", "content": PROBE}])
        as_parts = self._try([{"role": "user", "content": [{"type": "text", "text": PROBE}]}])
        return PROBE not in (as_text or "") and PROBE in (as_parts or "")

    @cached_property
    def _wants_arguments_as_text(self) -> bool:
        """Whether the arguments of a call are lost as an object, and not as JSON text."""

        def shows(arguments: Any) -> bool:
            function = {"name": PROBE, "arguments": arguments}
            call = {"id": "123456789", "type": "function", "function": function}
            said = {"role": "assistant", "content": "", "tool_calls": [call]}
            text = self._try([{"role": "user", "content": "x"}, said], prompt=False)
            return f"{PROBE}value" in (text or "")

        given = {"key": f"{PROBE}value"}
        return not shows(given) and shows(json.dumps(given))

    def _try(
        self, conversation: Conversation, tools: Any = None, prompt: bool = True
    ) -> str | None:
        """A conversation as text, or None if the template refuses it."""
        try:
            return self._apply(conversation, tools, prompt)
        except template_errors():
            return None

    def _apply(
        self,
        conversation: Conversation,
        tools: Any = None,
        prompt: bool = True,
        goes_on: bool = False,
    ) -> str:
        return self._tokenizer.apply_chat_template(
            conversation,
            tools=tools or None,
            chat_template=self._text,
            add_generation_prompt=prompt,
            continue_final_message=goes_on,
            tokenize=False,
        )

    # ------------------------------------------------------------------ conversations

    def _conversation(self, messages: Sequence[Message]) -> Conversation:
        return [
            self._message(message, message.text, [call.function.name for call in _calls(message)])
            for message in messages
        ]

    def _message(self, message: Message, text: str, names: Sequence[str]) -> dict[str, Any]:
        """A message as the template wants it, with this text and these names of called tools."""
        is_system = message.role == "developer" and not self._knows_developer
        made: dict[str, Any] = {**message.others, "role": "system" if is_system else message.role}
        made["content"] = [{"type": "text", "text": text}] if self._wants_parts else text
        calls = zip(_calls(message), names, strict=True)
        if message.tool_calls:
            made["tool_calls"] = [self._call(call, name) for call, name in calls]
        return made

    def _call(self, call: MadeCall, name: str) -> dict[str, Any]:
        arguments: Any = call.function.arguments
        if not self._wants_arguments_as_text:
            # What a model wrote may be no JSON; it is shown as it is.
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        function = {"name": name, "arguments": arguments}
        return {"id": call.id, "type": "function", "function": function}

    def _check_nothing_is_left_out(self, messages: Sequence[Message], tools: Any) -> None:
        """Raise an `ApiError` for messages and calls that are not in the text, found by putting a
        word of its own in the place of each."""
        marked: Conversation = []
        marks: list[tuple[str, str]] = []
        for place, message in enumerate(messages):
            text = message.text
            if text.strip():
                text = f"text{place}{PROBE}"
                marks.append((text, f"message {place} ({message.role})"))
            names = [f"call{place}i{number}{PROBE}" for number in range(len(_calls(message)))]
            marks.extend((name, f"a call of a tool in message {place}") for name in names)
            marked.append(self._message(message, text, names))
        shown = self._try(marked, tools)
        for mark, meant in marks:
            if shown is not None and mark not in shown:
                raise ApiError(
                    400,
                    f"This model's chat template would leave out {meant}; it has no place for it.",
                    "messages",
                    "chat_template_leaves_out",
                )


def _calls(message: Message) -> Sequence[MadeCall]:
    return message.tool_calls or ()


def template_errors() -> tuple[type[Exception], ...]:
    """What a template may raise: it is a program, and not of this server."""
    from jinja2.exceptions import TemplateError

    return (
        *(TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
        RecursionError,
    )


def own_template(tokenizer: Any, for_tools: bool = False) -> str | None:
    """A tokenizer's chat template; where it has several with names, the default one, or that for
    tools."""
    own = tokenizer.chat_template
    if not isinstance(own, dict):
        return own
    return own.get("tool_use" if for_tools and "tool_use" in own else "default")


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
    except template_errors():
        pass  # it may refuse this conversation and take others
