"""Answers that keep to a form, by a real grammar over a real vocabulary."""

import json
import time
from collections.abc import Iterator

import chat_templates
import jsonschema
import pytest
from server_tools import WEATHER
from tiny_tokenizers import writing_model, writing_tokenizer

from lookup_experts.serving.constraints import Constraints, GrammarError
from lookup_experts.serving.tool_calls import ToolCallReader, grammar_of

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}


@pytest.fixture(scope="module", params=["HERMES", "MISTRAL", "LLAMA"])
def client(request, make_client):
    tokenizer = writing_tokenizer(getattr(chat_templates, request.param))
    made = make_client(model=writing_model(), tokenizer=tokenizer)
    made.family = request.param
    return made


def ask(client, **body):
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 1.0,
        "max_tokens": 400,
        **body,
    }
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def events_of(client, **body) -> Iterator[dict]:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, **body}
    response = client.post(CHAT, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["choices"][0]


def test_a_schema_is_kept_to(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    choices = ask(client, response_format=form, n=4, seed=1)
    assert len({choice["message"]["content"] for choice in choices}) > 1
    for choice in choices:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["finish_reason"] == "stop"
    plain = ask(client, max_tokens=30, seed=1)[0]["message"]["content"]
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(plain)


def test_json_mode_gives_an_object(client):
    # A random model would hardly ever close its braces.
    closing = client.tokenizer.convert_tokens_to_ids("}")
    choices = ask(
        client,
        response_format={"type": "json_object"},
        logit_bias={str(closing): 30},
        temperature=0,
    )
    assert isinstance(json.loads(choices[0]["message"]["content"]), dict)
    cut = ask(client, response_format={"type": "json_object"}, max_tokens=1)[0]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["content"].lstrip().startswith("{")


def test_a_form_beside_penalties_and_least_lengths(client):
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["red", "green"]}}}
    for more in ({"min_tokens": 40}, {"logit_bias": {"2": 100}}, {"presence_penalty": 2}):
        choice = ask(client, response_format=form, **more)[0]
        assert json.loads(choice["message"]["content"]) in ("red", "green")
        assert choice["finish_reason"] == "stop"


def test_a_stream_of_a_form_is_the_same_in_pieces(client):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    whole = ask(client, response_format=form, seed=3)[0]["message"]["content"]
    pieces = [
        event["delta"].get("content", "")
        for event in events_of(client, response_format=form, seed=3)
    ]
    assert "".join(pieces) == whole


# --------------------------------------------------------------------------------------- tools


def arguments_of(call) -> dict:
    assert set(call) == {"id", "type", "function"} and call["type"] == "function"
    assert len(call["id"]) == 9 and call["id"].isalnum()
    return json.loads(call["function"]["arguments"])


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_must_be(client, seed):
    many = {"tools": [WEATHER, TIME], "tool_choice": "required", "max_tokens": 1500}
    choice = ask(client, **many, seed=seed)[0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    for call in choice["message"]["tool_calls"]:
        schema = {"get_weather": WEATHER, "get_time": TIME}[call["function"]["name"]]
        jsonschema.validate(arguments_of(call), schema["function"]["parameters"])
    named = {"type": "function", "function": {"name": "get_weather"}}
    (call,) = ask(client, tools=[TIME, WEATHER], tool_choice=named)[0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert set(arguments_of(call)) == {"city"}


def test_streamed_calls_are_the_same_in_pieces(client):
    body = {"tools": [WEATHER], "tool_choice": "required", "seed": 5, "max_tokens": 1700}
    whole = ask(client, **body)[0]["message"]["tool_calls"]
    calls: list[dict] = []
    reasons = []
    for event in events_of(client, **body):
        reasons.append(event["finish_reason"])
        for part in event["delta"].get("tool_calls", ()):
            if part["index"] == len(calls):
                assert part["type"] == "function" and part["function"]["name"]
                calls.append({**part["function"]})
            else:
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    assert calls == [call["function"] for call in whole]
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


def test_a_call_that_may_be(client):
    """A random model begins no call by itself; one that leans to it does, and then must keep on."""
    begins = {"HERMES": "<tool_call>", "MISTRAL": "[TOOL_CALLS]"}.get(client.family)
    free = ask(client, tools=[WEATHER], max_tokens=40, seed=2)[0]
    assert "tool_calls" not in free["message"]
    assert free["finish_reason"] in ("stop", "length")
    if begins is None:
        return
    bias = {str(client.tokenizer.convert_tokens_to_ids(begins)): 12}
    choice = ask(
        client, tools=[WEATHER], logit_bias=bias, parallel_tool_calls=False, temperature=0
    )[0]
    (call,) = choice["message"]["tool_calls"]
    assert set(arguments_of(call)) == {"city"}
    assert begins not in (choice["message"]["content"] or "")


def test_no_call_where_none_may_be(client):
    choice = ask(client, tools=[WEATHER], tool_choice="none", max_tokens=20)[0]
    assert "tool_calls" not in choice["message"]
    assert ask(client, tools=[], tool_choice="auto", parallel_tool_calls=True, max_tokens=3)


def test_a_call_that_is_cut_off_ends_by_length(client):
    choice = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=30)[0]
    assert choice["finish_reason"] == "length"


def test_answer_in_a_form_or_a_call(client):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    for seed in range(3):
        message = ask(client, tools=[WEATHER], response_format=form, seed=seed)[0]["message"]
        if message.get("tool_calls"):
            assert set(arguments_of(message["tool_calls"][0])) == {"city"}
        else:
            jsonschema.validate(json.loads(message["content"]), SCHEMA)


def test_a_template_without_tools_says_so(make_client):
    client = make_client(model=writing_model(), tokenizer=writing_tokenizer(chat_templates.CHATML))
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}
    response = client.post(CHAT, json=body)
    assert response.status_code == 400
    assert "no place for" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "tools"
    assert client.post(CHAT, json={**body, "tool_choice": "none"}).status_code == 200


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("family", ["HERMES", "MISTRAL", "LLAMA"])
def test_calls_are_read_wherever_pieces_end(family):
    from lookup_experts.serving.templates import ChatTemplate

    template = ChatTemplate(writing_tokenizer(), getattr(chat_templates, family), ["<|im_end|>"])
    syntax = template.tool_syntax
    arguments = ['{"city": "a } \\" { b", "n": [1, {}]}', "{}"]
    before = "I look < it up: [ {"
    written = [
        f"{syntax.head}f{place}{syntax.middle}{one}}}" for place, one in enumerate(arguments)
    ]
    if syntax.between is None:
        written = written[:1]
    text = before + " " + syntax.opening + (syntax.between or "").join(written) + syntax.closing
    for size in range(1, 20):
        reader = ToolCallReader(syntax)
        content, calls = "", []
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        for place, piece in enumerate(pieces):
            now = reader.add(piece, place == len(pieces) - 1)
            content += now.content
            for part in now.calls:
                if "name" in part["function"]:
                    calls.append(part["function"])
                else:
                    calls[part["index"]]["arguments"] += part["function"]["arguments"]
        assert content.rstrip() == reader.content.rstrip() == before
        assert [call["arguments"] for call in calls] == arguments[: len(written)]
        assert [call["name"] for call in calls] == ["f0", "f1"][: len(written)]
        assert [call["function"] for call in reader.calls] == calls


def test_text_that_only_looks_like_a_call_is_text():
    from lookup_experts.serving.templates import ChatTemplate

    syntax = ChatTemplate(writing_tokenizer(), chat_templates.HERMES, ["<|im_end|>"]).tool_syntax
    reader = ToolCallReader(syntax)
    pieces = [reader.add(piece).content for piece in ("a <tool", "_box>", " <tool_c")]
    assert [*pieces, reader.add("", True).content] == ["a", " <tool_box>", "", " <tool_c"]
    assert not reader.calls
    reader = ToolCallReader(syntax)
    assert reader.add("so  <tool_call> it is").content == "so"
    assert reader.add("!", True).content == "  <tool_call> it is!"


# -------------------------------------------------------------------------------------- limits


@pytest.fixture(scope="module")
def constraints():
    return Constraints(writing_tokenizer(), 320, [2])


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"not": {"type": "string"}},
        {"type": "string", "pattern": "("},
        {"$ref": "#/$defs/nowhere"},
        {"type": "string", "maxLength": -1},
        {"enum": []},
        deep(400),
        {"type": "object", "properties": {"a": 5}},
    ],
)
def test_schemas_that_can_not_be_kept_to_are_refused(constraints, schema):
    with pytest.raises(GrammarError, match="JSON schema") as error:
        constraints.of_schema(schema)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {}, "minItems": 10**9},
        {"type": "string", "pattern": "(((a{1,999}){1,999}){1,999}){1,999}"},
        {"type": "string", "pattern": "(a|aa)+" * 300 + "$"},
        {"anyOf": [{"type": "string", "pattern": f"a{{{n}}}b*"} for n in range(1, 2000)]},
        {"enum": [f"{n}" * 20 for n in range(20_000)]},
        {"$ref": "#"},
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
        {"allOf": [{"type": "object", "properties": {f"p{n}": {}}} for n in range(200)]},
    ],
)
def test_schemas_that_ask_for_much_take_little(constraints, schema):
    started_at = time.monotonic()
    try:
        constraint = constraints.of_schema(schema)
        for _ in range(20):
            allowed = constraint.allowed(320)
            if constraint.error or constraint.is_complete or not allowed.any():
                break
            constraint.take(int(allowed.nonzero()[0]))
    except GrammarError as error:
        assert str(error).endswith(".")
    assert time.monotonic() - started_at < 10


def test_a_grammar_that_becomes_too_much_is_told(make_client, monkeypatch):
    from lookup_experts.serving.constraints import Constraint

    client = make_client(model=writing_model(), tokenizer=writing_tokenizer(chat_templates.CHATML))
    monkeypatch.setattr(Constraint, "error", property(lambda self: "too many states"))
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_object"},
    }
    response = client.post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "grammar_error"
    assert "too many states" in response.json()["error"]["message"]


def test_a_model_without_an_end_token_and_a_tokenizer_larger_than_it():
    tokenizer = writing_tokenizer()
    tokenizer.eos_token = None
    constraint = Constraints(tokenizer, 280, []).of_schema({"enum": ["ab"]})
    written = b""
    while not constraint.is_complete:
        allowed = constraint.allowed(280)
        assert len(allowed) == 280
        token_id = int(allowed.nonzero()[-1])
        written += tokenizer.decode([token_id]).encode()
        constraint.take(token_id)
    assert json.loads(written) == "ab"


def test_grammars_name_special_tokens_by_their_ids():
    from lookup_experts.serving.messages import Tool
    from lookup_experts.serving.templates import ChatTemplate

    tokenizer = writing_tokenizer()
    template = ChatTemplate(tokenizer, chat_templates.MISTRAL, ["<|im_end|>"])
    grammar = grammar_of(
        template.tool_syntax,
        [Tool.model_validate(WEATHER)],
        must_call=False,
        many=True,
        answer=None,
        special_ids=Constraints(tokenizer, 320, [2]).special_ids(),
    )
    assert "<[3]>" in grammar and "TOOL_CALLS" not in grammar
