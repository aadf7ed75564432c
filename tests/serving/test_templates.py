"""Conversations go to chat templates as those want them, whole, or are refused."""

from pathlib import Path

import chat_templates
import pytest
from server_tools import WEATHER
from tiny_tokenizers import writing_tokenizer

from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.messages import Message, Tool
from lookup_experts.serving.templates import ChatTemplate

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
HISTORY = [
    {"role": "user", "content": "How is it in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
    {"role": "assistant", "content": "Sunny.", "refusal": None, "annotations": []},
    {"role": "user", "content": "And in Rome?"},
]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(writing_tokenizer(), getattr(chat_templates, name), ["<|im_end|>"])


def messages(*given: dict) -> list[Message]:
    return [Message.model_validate(one) for one in given]


def tools(*given: dict) -> list[Tool]:
    return [Tool.model_validate(one) for one in given or (WEATHER,)]


def test_a_history_of_calls_is_written_as_the_model_writes_them():
    text = template("HERMES").render(messages(*HISTORY), tools())
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": ' in text
    assert '{"city": "Paris"}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text
    assert "None" not in text
    assert text.endswith("And in Rome?<|im_end|>\n<|im_start|>assistant\n")
    text = template("MISTRAL").render(messages(*HISTORY), tools())
    assert '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}' in text


@pytest.mark.parametrize("name", ["HERMES", "TEXT_ARGUMENTS"])
def test_arguments_are_an_object_or_text_as_the_template_wants(name):
    text = template(name).render(messages(*HISTORY), tools())
    assert '"arguments": {"city": "Paris"}}' in text


def test_arguments_that_are_no_json_are_shown_as_they_are():
    broken = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": '}}
    said = {"role": "assistant", "content": "", "tool_calls": [broken]}
    text = template("HERMES").render(messages(HISTORY[0], said, HISTORY[2]), tools())
    assert '{\\"city\\": ' in text


@pytest.mark.parametrize(
    ("name", "conversation", "what"),
    [
        ("CHATML", HISTORY, "a call of a tool in message 1"),
        ("LLAMA", [{"role": "user", "content": "x"}], None),
        ("PARTS", HISTORY, "a call of a tool in message 1"),
    ],
)
def test_what_a_template_leaves_out_is_refused(name, conversation, what):
    if what is None:
        assert "x" in template(name).render(messages(*conversation))
        return
    with pytest.raises(ApiError, match=what) as error:
        template(name).render(messages(*conversation))
    assert error.value.status == 400


def test_a_role_that_a_template_leaves_out_is_refused():
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    only = ChatTemplate(writing_tokenizer(), users, [])
    with pytest.raises(ApiError, match=r"message 0 \(system\)"):
        only.render(messages({"role": "system", "content": "a"}, {"role": "user", "content": "b"}))
    with pytest.raises(ApiError, match="refuses"):
        template("MISTRAL").render(messages({"role": "system", "content": "a"}))


def test_developer_is_system_where_the_template_doesn_t_know_it():
    said = messages({"role": "developer", "content": "be kind"}, {"role": "user", "content": "x"})
    assert "<|im_start|>system\nbe kind" in template("CHATML").render(said)
    knows = chat_templates.CHATML + "{# developer #}"
    text = ChatTemplate(writing_tokenizer(), knows, []).render(said)
    assert "<|im_start|>developer\nbe kind" in text


@pytest.mark.parametrize("name", ["CHATML", "PARTS"])
def test_parts_with_marks_in_every_role(name):
    part = {"type": "text", "text": "the ", "cache_control": {"type": "ephemeral"}}
    roles = ("system", "user", "assistant", "tool")
    text = template(name).render(
        messages(*({"role": role, "content": [part, {**part, "text": role}]} for role in roles))
    )
    assert all(f"the {role}" in text for role in roles)


def test_a_refusal_is_what_the_assistant_said():
    parts = [{"type": "refusal", "refusal": "I won't."}]
    for said in ({"content": parts}, {"content": None, "refusal": "I won't."}):
        text = template("CHATML").render(messages({"role": "assistant", **said}))
        assert "assistant\nI won't.<|im_end|>" in text


def test_other_fields_of_a_message_go_to_the_template():
    named = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    text = ChatTemplate(writing_tokenizer(), named, []).render(
        messages({"role": "user", "name": "Ann", "content": "hi"})
    )
    assert text == "Ann: hi"


@pytest.mark.parametrize(
    ("name", "opening", "head", "between", "closing", "trigger"),
    [
        (
            *("HERMES", "<tool_call>\n", '{"name": "', "\n</tool_call>\n<tool_call>\n"),
            *("\n</tool_call>", "<tool_call>"),
        ),
        ("MISTRAL", "[TOOL_CALLS] [", '{"name": "', ", ", "]", "[TOOL_CALLS]"),
        ("LLAMA", "", '{"name": "', None, "", '{"name": "'),
    ],
)
def test_how_calls_are_written_is_read_off_the_template(
    name, opening, head, between, closing, trigger
):
    syntax = template(name).tool_syntax
    assert (syntax.opening, syntax.head) == (opening, head)
    assert (syntax.between, syntax.closing, syntax.trigger) == (between, closing, trigger)
    assert syntax.middle == ('", "parameters": ' if name == "LLAMA" else '", "arguments": ')


@pytest.mark.parametrize("name", ["CHATML", "XML_CALLS", "PARTS"])
def test_templates_without_calls_in_json_have_no_tools(name):
    assert template(name).tool_syntax is None


# What real templates want; TRL has them.
JSON_CALLS = {"qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "llama3_1", "llama3_2"}
OTHER_CALLS = {"deepseekv3", "gemma4", "glm4moe", "gptoss", "qwen3_6"}
NO_CALLS = {"llama3", "phi3", "idefics3", "smolvlm"}
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "How is it in Paris?"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": [{"type": "text", "text": "And in Rome?"}]},
]


@pytest.mark.parametrize("name", sorted(JSON_CALLS | OTHER_CALLS | NO_CALLS))
def test_real_templates(name):
    trl = pytest.importorskip("trl", reason="real chat templates are TRL's")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this version of TRL has no template {name}")
    tokenizer = writing_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    real = ChatTemplate(tokenizer, path.read_text(), ["<|im_end|>", "<|eot_id|>"])
    text = real.render(messages(*TALK))
    assert all(word in text for word in ("be kind", "in Paris?", "Sunny.", "And in Rome?"))
    assert (real.tool_syntax is not None) == (name in JSON_CALLS)
    if name in NO_CALLS:
        with pytest.raises(ApiError, match="would leave out a call"):
            real.render(messages(*HISTORY), tools())
        return
    text = real.render(messages(*HISTORY), tools())
    assert all(word in text for word in ("get_weather", "Paris", "sunny", "Sunny.", "in Rome?"))
    assert "None" not in text and '\\"city\\"' not in text
