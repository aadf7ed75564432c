"""What asks for nothing is taken; what asks for something that is not there is refused by name."""

import pytest

from lookup_experts.serving import neutral
from lookup_experts.serving.messages import TEXT_PARTS
from lookup_experts.serving.neutral import asks_for_nothing
from lookup_experts.serving.protocol import ChatBody, CompletionBody
from lookup_experts.serving.templates import PLAIN_TEMPLATE

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
FIELDS = [
    *((COMPLETIONS, name, values) for name, values in neutral.COMPLETION.items()),
    *((CHAT, name, values) for name, values in neutral.CHAT.items()),
]


@pytest.fixture(scope="module")
def client(make_client):
    return make_client(chat_template=PLAIN_TEMPLATE)


def send(client, route, **fields):
    body = {"prompt": "the"} if route == COMPLETIONS else {}
    body = body or {"messages": [{"role": "user", "content": "the"}]}
    return client.post(route, json={**body, "max_tokens": 1, **fields})


@pytest.mark.parametrize(("route", "name", "values"), FIELDS)
def test_fields_that_ask_for_nothing(client, route, name, values):
    body = CompletionBody if route == COMPLETIONS else ChatBody
    nothing = (None,) if name in body.model_fields else (None, [], {})
    nothing = nothing if True in values or name in body.model_fields else (*nothing, False)
    for value in (*nothing, *values):
        response = send(client, route, **{name: value})
        assert response.status_code == 200, (name, value, response.text)
    if name in body.model_fields and name != "best_of":
        return
    response = send(client, route, **{name: 7})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == f"{name} is not supported by this server; leave it out."


ONLY_CHAT = {"store", "service_tier"}


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "metadata": {}, "service_tier": "auto"},
        {"metadata": {"a": "b"}, "user": "me", "prompt_cache_key": "k", "safety_identifier": "s"},
        {"stream_options": None},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0},
        {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0},
        {"logit_bias": {}, "stop": [], "stop_token_ids": [], "min_tokens": 0, "ignore_eos": False},
        {"logprobs": False},
        {"lookup_details": None, "stream": None, "n": None, "seed": None, "model": None},
    ],
)
def test_bodies_that_ask_for_nothing(client, route, fields):
    if route == COMPLETIONS:
        fields = {name: value for name, value in fields.items() if name not in ONLY_CHAT}
    response = send(client, route, **fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": False},
        {"reasoning_effort": None, "modalities": ["text"], "response_format": {"type": "text"}},
        {"top_logprobs": 0, "logprobs": False},
        {"response_format": None, "prediction": None, "audio": None, "verbosity": "medium"},
    ],
)
def test_chats_that_ask_for_nothing(client, fields):
    response = send(client, CHAT, **fields)
    assert response.status_code == 200, response.text


def test_going_on_needs_no_generation_prompt(client):
    said = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]
    on = {"messages": said, "continue_final_message": True}
    assert send(client, CHAT, **on, add_generation_prompt=False).status_code == 200
    response = send(client, CHAT, **on, response_format={"type": "json_object"})
    assert response.status_code == 400
    assert "can't be had with" in response.json()["error"]["message"]


def test_every_nullable_field_may_be_null(client):
    for route, body in ((COMPLETIONS, CompletionBody), (CHAT, ChatBody)):
        names = {*body.model_fields, *body.neutral} - {"prompt", "messages"}
        response = send(client, route, **dict.fromkeys(names))
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("route", "fields", "words"),
    [
        (CHAT, {"store": True}, "store is not supported"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        (CHAT, {"service_tier": "priority"}, "service_tier is not supported"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities is not supported"),
        (COMPLETIONS, {"length_penalty": True}, "length_penalty is not supported"),
        (COMPLETIONS, {"skip_special_tokens": False}, "skip_special_tokens is not supported"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt is not supported"),
        (CHAT, {"continue_final_message": True}, "needs a last message of the assistant"),
        (
            CHAT,
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "include_obfuscation is not supported",
        ),
        (COMPLETIONS, {"messages": []}, "It is a field of /v1/chat/completions."),
        (COMPLETIONS, {"tools": []}, "It is a field of /v1/chat/completions."),
        (CHAT, {"prompt": "x"}, "It is a field of /v1/completions."),
        (CHAT, {"temprature": 1}, "Did you mean 'temperature'?"),
    ],
)
def test_what_asks_for_more_is_refused(client, route, fields, words):
    response = send(client, route, **fields)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_hints_never_name_the_field_itself(client):
    for route in (COMPLETIONS, CHAT):
        for name in {*CompletionBody.model_fields, *ChatBody.model_fields, "xyzzy"}:
            response = send(client, route, **{name: object.__name__})
            if response.status_code != 200:
                assert f"mean {name!r}" not in response.json()["error"]["message"]


@pytest.mark.parametrize("value", [1, "x", [0], {"a": None}, True, 0.5])
def test_values_that_ask_for_something(value):
    assert not asks_for_nothing(value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "'image_url' is not understood"),
        ({"content": [{"type": "text"}]}, "needs 'text'"),
        ({"content": None}, "needs a content"),
        ({"content": "x", "function_call": {"name": "f"}}, "function_call in a message"),
        ({"content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "Only"),
    ],
)
def test_messages_that_can_not_be_say_why(client, message, words):
    response = send(client, CHAT, messages=[{"role": "user", **message}])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages"
    assert words in error["message"]


def test_messages_keep_what_answers_carry(client):
    said = {"role": "assistant", "content": "fox", "refusal": None, "annotations": []}
    said |= {"audio": None, "function_call": None, "tool_calls": None}
    turn = {
        "role": "user",
        "content": [{"type": kind, TEXT_PARTS[kind]: "x"} for kind in TEXT_PARTS],
    }
    assert send(client, CHAT, messages=[turn, said, turn]).status_code == 200


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/responses", "The Responses API is not served here; use /v1/chat/completions."),
        ("/v1/responses/resp_1", "The Responses API is not served here"),
        ("/v1/embeddings", "The API has /v1/chat/completions"),
        ("/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "Did you mean /v1/chat/completions?"),
    ],
)
def test_routes_that_are_not_there(client, path, words):
    response = client.post(path, json={"model": "x", "input": "y"})
    assert response.status_code == 404
    assert words in response.json()["error"]["message"]
