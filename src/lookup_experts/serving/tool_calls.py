"""Calls of tools: how a model's chat template writes them, the grammar of an answer that may have
some, and reading them out of the text as it comes.

Each family writes calls in its own way: `<tool_call>{"name": "f", "arguments": {}}</tool_call>`,
`[TOOL_CALLS] [{"name": ...}]`, `{"name": "f", "parameters": {}}` and nothing else. The template
shows which: it is given a call, and what it makes of it is looked at.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lookup_experts.serving.constraints import json_rule
from lookup_experts.serving.messages import Tool

PROBE = "qprobeq"
"""A word that no template has."""
_ARGUMENTS = {f"{PROBE}k": f"{PROBE}v"}

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool], str | None]
"""(conversation, tools, whether the answer is to begin) -> text, or None if it is refused."""


@dataclass(frozen=True)
class ToolSyntax:
    """How calls are written: opening, then head, name, middle, arguments and } of each call,
    `between` each two, and closing."""

    opening: str
    head: str
    middle: str
    between: str | None
    """None where an answer has one call at most."""
    closing: str

    @property
    def trigger(self) -> str:
        """What tells a call from other text."""
        return next(iter(self.opening.split()), self.head)

    @property
    def after_trigger(self) -> str:
        """What follows it, up to the first call's name."""
        if self.trigger == self.head:
            return ""
        return self.opening.partition(self.trigger)[2] + self.head


def syntax_of(render: Render, end_names: Sequence[str]) -> ToolSyntax | None:
    """How a template writes calls; None if it has no place for tools or writes no JSON.

    Args:
        render: applies the template.
        end_names: of the tokens that end an answer.
    """
    names = [f"{PROBE}{letter}" for letter in "ab"]
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "x",
                "parameters": {"type": "object", "properties": {}},
            },
        }
        for name in names
    ]
    user = {"role": "user", "content": "x"}
    prompt = render([user], tools, True)
    if prompt is None or not all(name in prompt for name in names):
        return None
    one = _answer(render, prompt, [user, _said(names[:1])], tools)
    read = one and _Read.of(one, names[0])
    if not one or not read:
        return None
    opening = one[: read.start].rpartition("</think>")[2].lstrip("\n")
    closing = _before_end(one[read.end :], end_names)
    between = None
    two = _answer(render, prompt, [user, _said(names)], tools)
    if two:
        first, second = _Read.of(two, names[0]), _Read.of(two, names[1])
        if first and second and first.end <= second.start:
            between = two[first.end : second.start]
    return ToolSyntax(opening, read.head, read.middle, between, closing)


def _said(names: Sequence[str]) -> dict[str, Any]:
    calls = [
        {
            # Some templates insist on ids of nine letters and figures.
            "id": f"12345678{place}",
            "type": "function",
            "function": {"name": name, "arguments": dict(_ARGUMENTS)},
        }
        for place, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _answer(
    render: Render, prompt: str, conversation: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> str | None:
    """What the template writes for the answer alone."""
    text = render(conversation, tools, False)
    if text is None:
        return None
    same = next(
        (place for place, pair in enumerate(zip(prompt, text, strict=False)) if len({*pair}) > 1),
        min(len(prompt), len(text)),
    )
    return text[same:]


def _before_end(text: str, end_names: Sequence[str]) -> str:
    """What is written before the answer is over."""
    places = [place for name in end_names if (place := text.find(name)) >= 0]
    return text[: min(places)] if places else text.rstrip()


@dataclass(frozen=True)
class _Read:
    """A call's JSON, found in a text."""

    start: int
    end: int
    head: str
    middle: str

    @classmethod
    def of(cls, text: str, name: str) -> "_Read | None":
        """The innermost object around a call's name."""
        at = text.find(json.dumps(name))
        start = at
        while (start := text.rfind("{", 0, max(start, 0))) >= 0:
            try:
                value, end = json.JSONDecoder().raw_decode(text, start)
            except ValueError:
                continue
            if end <= at:
                continue
            after = at + len(json.dumps(name))
            begin = text.find("{", after)
            if _ARGUMENTS not in value.values() or begin < 0:
                return None
            # A call's id, where it is written behind the arguments, is left out.
            return cls(start, end, text[start : at + 1], text[after - 1 : begin])
        return None


# ------------------------------------------------------------------------------------ grammars


def grammar_of(
    syntax: ToolSyntax,
    tools: Sequence[Tool],
    *,
    must_call: bool,
    many: bool,
    answer: dict[str, Any] | None,
    special_ids: Mapping[str, int],
) -> str:
    """The grammar of an answer, for llguidance.

    Args:
        syntax: how calls are written.
        tools: that may be called.
        must_call: at least one call, and no other text.
        many: several calls, where the template can write them.
        answer: the JSON schema of an answer without calls; None: any text, before calls too.
        special_ids: of the tokens that no string in a grammar stands for, by name.
    """

    def literal(text: str) -> str:
        return " ".join(_pieces(text, special_ids))

    calls = "call"
    if many and syntax.between is not None:
        calls = f"call ({literal(syntax.between + syntax.head)} call)*"
    calls += f" {literal(syntax.closing)}"
    rules = [
        "%llguidance {}",
        "call: " + " | ".join(f"call_{place}" for place in range(len(tools))),
    ]
    for place, tool in enumerate(tools):
        arguments = json_rule({**(tool.function.parameters or {}), "type": "object"})
        name = json.dumps(tool.function.name)
        rules.append(f'call_{place}: {name} {literal(syntax.middle)} {arguments} "}}"')
    trigger, rest = literal(syntax.trigger), literal(syntax.after_trigger)
    if must_call:
        rules.append(f"start: {trigger} {rest} {calls}")
    elif answer is not None:
        rules.append(f"start: {json_rule(answer)} | {trigger} {rest} {calls}")
    else:
        kind = "" if syntax.trigger in special_ids else "[lazy]"
        rules += ["TEXT: /(.|\\n)*/", "text: TEXT", f"triggered{kind}: TEXT {trigger}"]
        rules.append(f"start: text | triggered {rest} {calls}")
    return "\n".join(rules)


def _pieces(text: str, special_ids: Mapping[str, int]) -> list[str]:
    """A text as terminals: special tokens by their ids, strings for the rest."""
    for name in sorted(special_ids, key=len, reverse=True):
        before, found, after = text.partition(name)
        if found:
            token = f"<[{special_ids[name]}]>"
            return [*_pieces(before, special_ids), token, *_pieces(after, special_ids)]
    return [json.dumps(text, ensure_ascii=False)] if text else []


# ------------------------------------------------------------------------------------- reading


@dataclass
class ReadNow:
    """What a piece of text brought."""

    content: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Parts of calls, as a stream of OpenAI's API tells them."""


class ToolCallReader:
    """Tells calls from other text, piece by piece, in an answer that keeps to `grammar_of`.

    Args:
        syntax: how calls are written.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        self._syntax = syntax
        self._held = ""
        self._looks = ""
        """Blanks before the trigger of the first call."""
        self._state = self._text
        self._depth = 0
        self._in_string = self._is_escaped = False
        self.calls: list[dict[str, Any]] = []
        """Whole, as an answer that isn't streamed tells them."""
        self.content = ""

    def add(self, piece: str, is_last: bool = False) -> ReadNow:
        """Take more text; with the last one nothing is held back any more."""
        self._held += piece
        now = ReadNow("")
        while self._state(now):
            pass
        if is_last and self._state == self._text:
            now.content += self._held
        elif is_last and not self.calls:  # it only looked like the beginning of a call
            now.content += self._looks + self._held
        self.content += now.content
        return now

    def _text(self, now: ReadNow) -> bool:
        trigger = self._syntax.trigger
        place = self._held.find(trigger)
        if place >= 0:
            content = self._held[:place].rstrip()
            now.content += content
            self._looks = self._held[len(content) : place]
            self._held = self._held[place:]
            self._state = self._head
            return True
        keep = next(
            size for size in range(len(trigger) - 1, -1, -1) if self._held.endswith(trigger[:size])
        )
        sure = self._held[: len(self._held) - keep]
        blank = len(sure) - len(sure.rstrip())  # before a call it would be left out
        now.content += sure[: len(sure) - blank]
        self._held = self._held[len(sure) - blank :]
        return False

    def _head(self, now: ReadNow) -> bool:
        _, found, after = self._held.partition(self._syntax.head)
        if found:
            self._held = after
            self._state = self._name
        return bool(found)

    def _name(self, now: ReadNow) -> bool:
        name, found, after = self._held.partition(self._syntax.middle)
        if not found:
            return False
        self._held = after
        self._state = self._arguments
        # Some templates insist on ids of nine letters and figures when the call comes back.
        call = {"id": secrets.token_hex(5)[:9], "type": "function"}
        self.calls.append({**call, "function": {"name": name, "arguments": ""}})
        now.calls.append(
            {"index": len(self.calls) - 1, **call, "function": {"name": name, "arguments": ""}}
        )
        return True

    def _arguments(self, now: ReadNow) -> bool:
        end = self._end_of_json()
        piece = self._held if end is None else self._held[:end]
        self._held = "" if end is None else self._held[end:]
        if piece:
            self.calls[-1]["function"]["arguments"] += piece
            now.calls.append({"index": len(self.calls) - 1, "function": {"arguments": piece}})
        if end is not None:
            self._state = self._head
        return end is not None

    def _end_of_json(self) -> int | None:
        """One past the object's last character in what is held, or None if it goes on."""
        for place, character in enumerate(self._held):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None
