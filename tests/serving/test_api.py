"""What the routes answer, and what they say to requests that can't be answered."""

import asyncio
import json

import pytest
import torch
from tiny_models import attached_model, greedy, tiny_model

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.serving import guard
from lookup_experts.serving.guard import ApiKeys
from lookup_experts.serving.metrics import ServingMetrics
from lookup_experts.serving.templates import (
    PLAIN_TEMPLATE,
    check_chat_template,
    read_chat_template,
)
from lookup_experts.serving.waiting import Limits

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture
def client(make_client):
    return make_client(chat_template=PLAIN_TEMPLATE)


@pytest.fixture(scope="module")
def refusing(make_client):
    """A client for all requests that change nothing, since they are refused."""
    return make_client(chat_template=PLAIN_TEMPLATE)


def complete(client, **body):
    return client.post(COMPLETIONS, json={"temperature": 0, **body})


def events_of(response) -> list[dict]:
    """The chunks of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response, status: int) -> dict:
    """The error of a response, which must have OpenAI's shape and be a sentence."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"][-1] in ".?" and len(error["message"]) > 20
    return error


# --------------------------------------------------------------------------------- completions


def test_the_four_forms_of_a_prompt(client, tokenizer):
    ids = tokenizer("the fox")["input_ids"]
    one = complete(client, prompt="the fox", max_tokens=6).json()
    assert one["object"] == "text_completion"
    assert one["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 6} | {
        "total_tokens": len(ids) + 6
    }
    text = one["choices"][0]["text"]
    assert complete(client, prompt=ids, max_tokens=6).json()["choices"][0]["text"] == text
    for prompts in (["the fox", "once upon"], [ids, tokenizer("once upon")["input_ids"]]):
        both = complete(client, prompt=prompts, max_tokens=6).json()["choices"]
        assert [choice["index"] for choice in both] == [0, 1]
        assert both[0]["text"] == text != both[1]["text"]


def test_a_stream_is_the_same_in_pieces(client):
    for options in (
        {},
        {"n": 2, "temperature": 1.5, "seed": 3},
        {"echo": True, "logprobs": 2},
        {"stop": ["er", "on"]},
    ):
        body = {"prompt": "the quick", "max_tokens": 12, **options}
        whole = complete(client, **body).json()
        chunks = events_of(
            complete(client, **body, stream=True, stream_options={"include_usage": True})
        )
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-1]["choices"] == []
        for index, choice in enumerate(whole["choices"]):
            of_choice = [
                chunk["choices"][0]
                for chunk in chunks[:-1]
                if chunk["choices"][0]["index"] == index
            ]
            assert "".join(part["text"] for part in of_choice) == choice["text"]
            reasons = [part["finish_reason"] for part in of_choice]
            assert reasons == [None] * (len(reasons) - 1) + [choice["finish_reason"]]
            if "logprobs" in options:
                tokens = [one for part in of_choice[:-1] for one in part["logprobs"]["tokens"]]
                assert tokens == choice["logprobs"]["tokens"]


def test_texts_end_before_stop_strings(client):
    whole = complete(client, prompt="the fox", max_tokens=30).json()["choices"][0]["text"]
    stop = whole[7:10]
    cut = complete(client, prompt="the fox", max_tokens=30, stop=stop).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_echo_with_log_probabilities_is_what_lm_eval_reads(client, tokenizer):
    ids = tokenizer("the fox jumps")["input_ids"]
    answer = complete(client, prompt=ids, max_tokens=1, logprobs=1, echo=True).json()
    told = answer["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(ids) + 1
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert "".join(told["tokens"]) == answer["choices"][0]["text"]
    scores = client.service._model(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
    for place, token_id in enumerate(ids[1:]):
        expected = float(scores[place, token_id])
        assert told["token_logprobs"][place + 1] == pytest.approx(expected, abs=1e-4)
        assert max(told["top_logprobs"][place + 1].values()) == pytest.approx(
            float(scores[place].max()), abs=1e-4
        )
    scored = complete(client, prompt=ids, max_tokens=0, logprobs=1, echo=True).json()
    assert scored["choices"][0]["logprobs"]["tokens"] == told["tokens"][:-1]
    assert scored["usage"]["completion_tokens"] == 0


def test_details_ride_on_the_chunks_of_tokens(client):
    chunks = events_of(
        complete(client, prompt="the fox", max_tokens=5, stream=True, lookup_details=True)
    )
    assert len(chunks) == 6
    for chunk in chunks[:-1]:
        lookup = chunk["lookup"]
        assert set(lookup) == {"token_id", "text", "weights", "bytes_read", "cache_hit", "ms"}
        assert [len(layer) for layer in lookup["weights"]] == [4, 4, 4]
        assert lookup["bytes_read"] == (0 if lookup["cache_hit"] else 1536)
    assert "lookup" not in chunks[-1]
    chat = events_of(
        client.post(
            CHAT,
            json={
                "messages": [{"role": "user", "content": "fox"}],
                "max_tokens": 3,
                "stream": True,
                "lookup_details": True,
            },
        )
    )
    assert [("lookup" in chunk) for chunk in chat] == [False, True, True, True, False]


# ---------------------------------------------------------------------------------------- chat


def test_chat_answers_through_the_template(client, tokenizer):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "the "}] * 2},
        {"role": "assistant", "content": "fox", "refusal": None},
        {"role": "user", "content": "dog"},
    ]
    body = {"messages": messages, "max_completion_tokens": 6, "temperature": 0}
    answer = client.post(CHAT, json={**body, "logprobs": True, "top_logprobs": 2}).json()
    prompt = "System: be kind\nUser: the the \nAssistant: fox\nUser: dog\nAssistant:"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = greedy(client.service._model, ids, 6)[0].tolist()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(expected)}
    entries = choice["logprobs"]["content"]
    assert [bytes(entry["bytes"]).decode() for entry in entries] == [
        tokenizer.decode([token_id]) for token_id in expected
    ]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    chunks = events_of(client.post(CHAT, json={**body, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]


def test_chat_without_a_template_says_what_to_do(make_client):
    client = make_client()
    error = error_of(client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}), 400)
    assert "no chat template" in error["message"]
    assert error["code"] == "no_chat_template"


def test_a_template_may_refuse_a_conversation(make_client):
    client = make_client(chat_template="{{ raise_exception('only users here') }}")
    error = error_of(client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}), 400)
    assert "only users here" in error["message"]


def test_a_template_that_fails_refuses_a_conversation(make_client):
    client = make_client(chat_template="{{ messages[0]['content'] + 1 }}")
    error = error_of(client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}), 400)
    assert "template refuses" in error["message"]


def test_of_several_templates_the_default_one_counts(tokenizer):
    from copy import deepcopy

    from lookup_experts.serving.messages import Message
    from lookup_experts.serving.prompts import Prompter

    several = deepcopy(tokenizer)
    several.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools"}
    prompter = Prompter(tiny_model("llama"), several, None)
    messages = [Message(role="user", content="the fox")]
    assert prompter.encode_chat(messages) == tokenizer("the fox")["input_ids"]
    given = Prompter(tiny_model("llama"), several, "a {{ messages[0]['content'] }}")
    assert given.encode_chat(messages) == tokenizer("a the fox")["input_ids"]


def test_chat_goes_on_to_the_end_of_the_context(make_client):
    client = make_client(chat_template=PLAIN_TEMPLATE)
    body = {"messages": [{"role": "user", "content": "fox"}], "temperature": 0}
    usage = client.post(CHAT, json=body).json()["usage"]
    assert usage["total_tokens"] == 128


def test_an_answer_that_was_cut_off_goes_on(make_client):
    """From its last character, without a line end or a new turn between."""
    client = make_client(chat_template=PLAIN_TEMPLATE)
    question = [{"role": "user", "content": "the fox"}]

    def answer(messages: list, tokens: int, **more: object) -> str:
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, **more}
        return client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]

    said = [*question, {"role": "assistant", "content": "over the lazy"}]
    prompt = "User: the fox\nAssistant: over the lazy"
    body = {"prompt": prompt, "max_tokens": 7, "temperature": 0}
    expected = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    assert answer(said, 7, continue_final_message=True) == expected
    assert answer(said, 7) != expected
    body = {"messages": question, "continue_final_message": True}
    assert "of the assistant" in error_of(client.post(CHAT, json=body), 400)["message"]


def test_whether_there_is_a_chat_is_told(make_client):
    told = [
        make_client(**options).get("/v1/stats").json()["chat"]
        for options in ({}, {"chat_template": PLAIN_TEMPLATE})
    ]
    assert told == [False, True]


# -------------------------------------------------------------------------- requests that can't


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "must be a string"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [[]]}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [4, 97]}, "prompt", "Token id 97 is outside"),
        ({"prompt": [4, -1]}, "prompt", "must be a string"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "only with echo"),
        ({"prompt": "a", "max_tokens": 128}, "max_tokens", "context is 128"),
        ({"prompt": [4] * 200}, "prompt", "context is 128"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than"),
        ({"prompt": "a", "top_p": 2}, "top_p", "less than"),
        ({"prompt": "a", "n": 0}, "n", "greater than"),
        ({"prompt": "a", "n": 13}, None, "at most 12"),
        ({"prompt": "a", "stop": ""}, "stop", "1 to 256 characters"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "up to 16"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less than"),
        ({"prompt": "a", "max_tokns": 5}, "max_tokns", "Did you mean 'max_tokens'"),
        ({"prompt": "a", "suffix": "b"}, None, "suffix is not supported"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "less than"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "greater than"),
        ({"prompt": "a", "logit_bias": {"97": 1}}, "logit_bias", "Token id 97 is outside"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, None, "logit_bias has 'x'"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, None, "from -100 to 100"),
        ({"prompt": "a", "logit_bias": {"5": True}}, None, "from -100 to 100"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens", "more than the 16"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", "up to 256 token ids"),
        ({"prompt": "a", "best_of": 3}, None, "best_of is not supported"),
        ({"prompt": "a", "lookup_details": True}, None, "needs stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, None, "needs stream"),
    ],
)
def test_completions_that_can_not_be(refusing, body, param, words):
    error = error_of(refusing.post(COMPLETIONS, json=body), 400)
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "cat", "content": "meow"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, None),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, None),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, None),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}] * 2 + [{}]}, "messages"),
    ],
)
def test_chats_that_can_not_be(refusing, change, param):
    body = {"messages": [{"role": "user", "content": "x"}], **change}
    assert error_of(refusing.post(CHAT, json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON object"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b"[1, 2]", "JSON object"),
        (b"null", "JSON object"),
        (b"\xff\xfe", ""),
        (b'{"prompt": "a\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", ""),
        (b'{"prompt": ' + b"[" * 100_000, ""),
        (b'{"\\ud800": 1, "prompt": "a"}', ""),
    ],
)
def test_bodies_that_are_none(refusing, body, words):
    response = refusing.post(
        COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
    )
    assert words in error_of(response, 400)["message"]


def test_bodies_that_are_too_large_or_too_slow(refusing, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BODY_BYTES", 2**20)
    error = error_of(refusing.post(COMPLETIONS, json={"prompt": "a" * 2**20}), 413)
    assert "1 MiB" in error["message"]
    parts = (b"a" * 2**18 for _ in range(8))  # chunked: no length is stated
    assert error_of(refusing.post(COMPLETIONS, content=parts), 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (COMPLETIONS, {"prompt": [1.5] * 10_000}, "must be a string"),
        (COMPLETIONS, {"prompt": [[1.5]] * 10_000}, "must be a string"),
        (COMPLETIONS, {"prompt": "a", "stop": [1] * 10_000}, "up to 16"),
        (COMPLETIONS, {"prompt": "a", **{f"a{place}": 1 for place in range(10_000)}}, "10001"),
        (
            COMPLETIONS,
            {"prompt": "a", "logit_bias": {f"a{place}": 1 for place in range(10_000)}},
            "logit_bias has 'a0'",
        ),
        (CHAT, {"messages": [{}] * 10_000}, "must be a list of messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 10_000}]}, "list of messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}] * 100}, "functions"),
    ],
)
def test_many_errors_cost_no_more_than_one(refusing, monkeypatch, path, body, words):
    from lookup_experts.serving import app

    numbers = []
    sentence_of = app.sentence_of
    monkeypatch.setattr(
        app,
        "sentence_of",
        lambda errors, path: numbers.append(len(errors)) or sentence_of(errors, path),
    )
    assert words in error_of(refusing.post(path, json=body), 400)["message"]
    assert numbers[0] < 10


def test_too_many_sequences_are_refused_before_any_work(refusing, monkeypatch):
    monkeypatch.setattr(refusing.service.prompter, "encode", lambda prompt: 1 / 0)
    monkeypatch.setattr(refusing.service.prompter, "encode_chat", lambda *_: 1 / 0)
    error = error_of(refusing.post(COMPLETIONS, json={"prompt": ["a"] * 7, "n": 64}), 400)
    assert "448 sequences" in error["message"] and "at most 12" in error["message"]
    body = {"messages": [{"role": "user", "content": "x"}], "n": 13}
    assert "at most 12" in error_of(refusing.post(CHAT, json=body), 400)["message"]


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    sent = []

    async def receive():
        await asyncio.sleep(10)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    asyncio.run(guard.Guard(None, None, ServingMetrics(None).requests)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert b"did not arrive" in sent[1]["body"]


def test_models_and_pages_that_are_not_there(refusing):
    for response in (
        complete(refusing, prompt="a", model="gpt-9"),
        refusing.get("/v1/models/gpt-9"),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found"
        assert "'tiny'" in error["message"]
    assert "/v1" in error_of(refusing.get("/v1/nothing"), 404)["message"]
    error_of(refusing.get("/nothing.js"), 404)
    error_of(refusing.get("/static/index.html"), 404)
    error_of(refusing.get(COMPLETIONS), 405)
    error_of(refusing.get("/../pyproject.toml"), 404)


# ----------------------------------------------------------------------------------- behaviour


def test_keys(make_client, tmp_path):
    path = tmp_path / "keys"
    path.write_text("first-key\nsecond-key\n")
    client = make_client(keys=ApiKeys(path))
    for key in ("first-key", "second-key"):
        response = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 200
    for header in ({}, {"Authorization": "Bearer first"}, {"Authorization": "Basic first-key"}):
        for path_of_api in ("/v1/models", "/v1/stats", "/metrics"):
            error = error_of(client.get(path_of_api, headers=header), 401)
            assert error["code"] == "invalid_api_key"
        assert client.post(COMPLETIONS, json={"prompt": "a"}, headers=header).status_code == 401
    assert client.get("/health").status_code == client.get("/").status_code == 200


def test_key_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        ApiKeys(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="one key per line"):
        ApiKeys(tmp_path / "empty")


def test_a_failed_record_is_a_503_and_the_server_goes_on(client, monkeypatch):
    context = client.service._model.lookup_entrance

    class Broken:
        def rows(self, ids, ready=False, base_model=None):
            raise TableError("table-00001.safetensors: record 5 can't be read.")

    with monkeypatch.context() as patched:
        patched.setattr(context, "source", Broken())
        for stream in (False, True):
            error = error_of(complete(client, prompt="the fox", stream=stream), 503)
            assert error["code"] == "table_error"
            assert error["type"] == "server_error"
    assert complete(client, prompt="the fox").status_code == 200
    assert "mole_table_errors_total 2.0" in client.get("/metrics").text


def test_a_request_that_takes_too_long(make_client):
    client = make_client(seconds=0.02)
    error = error_of(complete(client, prompt="the fox", max_tokens=110), 504)
    assert error["code"] == "timeout"


def test_a_full_queue(make_client):
    client = make_client(limits=Limits(1, 0))
    client.service.engine._running.append(None)  # as if a row was taken
    try:
        response = complete(client, prompt="the fox")
    finally:
        client.service.engine._running.clear()
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1


def test_health_says_when_nothing_is_taken(client):
    assert client.get("/health").json() == {"status": "ok"}
    client.service.engine.drain()
    assert error_of(client.get("/health"), 503)["code"] == "shutting_down"
    assert error_of(complete(client, prompt="a"), 503)["code"] == "shutting_down"


def test_what_the_server_tells_of_itself(client):
    complete(client, prompt="the fox", max_tokens=9)
    stats = client.get("/v1/stats").json()
    assert (stats["model"], stats["kind"]) == ("tiny", "mole-table")
    assert (stats["layers"], stats["experts"], stats["store"]) == (3, 4, "direct")
    assert (stats["router"], stats["row_size"], stats["record_bytes"]) == (True, 32, 1536)
    assert stats["tokens_per_second"] == pytest.approx(9 / 5)
    assert stats["bytes_read"] > 0 and 0 <= stats["hit_rate"] <= 1
    assert stats["ids_asked"] >= stats["ids_unique"] >= 9 > 0 <= stats["cache_hits"]
    assert stats["hit_rate"] == stats["cache_hits"] / stats["ids_unique"]
    assert stats["read_seconds"] > 0
    assert stats["resident_bytes"] > 10**7
    metrics = client.get("/metrics").text
    assert "mole_generated_tokens_total 9.0" in metrics
    assert "mole_time_to_first_token_seconds_count 1.0" in metrics
    assert "mole_inter_token_seconds_count 8.0" in metrics
    assert 'mole_requests_total{route="/v1/completions",status="200"} 1.0' in metrics
    assert "mole_table_read_bytes_total" in metrics


def test_a_dense_model_has_no_table_to_tell_of(make_client):
    client = make_client(model=tiny_model("llama"))
    stats = client.get("/v1/stats").json()
    assert (stats["kind"], stats["experts"], stats["store"]) == ("dense", 0, None)
    assert (stats["router"], stats["row_size"], stats["record_bytes"]) == (False, None, None)
    counted = ("ids_asked", "ids_unique", "cache_hits", "read_seconds")
    assert [stats[name] for name in counted] == [0, 0, 0, 0]
    chunks = events_of(
        complete(client, prompt="the", max_tokens=1, stream=True, lookup_details=True)
    )
    assert chunks[0]["lookup"]["weights"] is None
    assert "mole_table_read" not in client.get("/metrics").text


def test_a_form_without_a_router_tells_of_its_records(make_client, tmp_path):
    model = attached_model(form="meki", num_experts=1, expert_size=None, row_size=5)
    le.reparameterize(model, tmp_path / "folded", encoding="float32")
    loaded = le.load(tmp_path / "folded", store="direct", cache="2kB")
    told = []
    for served in (model, loaded):
        client = make_client(model=served)
        stats = client.get("/v1/stats").json()
        assert (stats["experts"], stats["router"], stats["row_size"]) == (1, False, 5)
        asked = {"prompt": "the fox", "max_tokens": 12, "temperature": 0}
        chunks = events_of(complete(client, **asked, stream=True, lookup_details=True))
        lookups = [chunk["lookup"] for chunk in chunks[:-1]]
        assert [lookup["weights"] for lookup in lookups] == [None] * 12
        told.append((stats["kind"], stats["record_bytes"], lookups))
    assert told[0][:2] == ("meki-experts", None)
    assert told[1][:2] == ("meki-table", 3 * 5 * 4)
    assert {lookup["cache_hit"] for lookup in told[0][2]} == {None}
    assert [x["token_id"] for x in told[0][2]] == [x["token_id"] for x in told[1][2]]
    for lookup in told[1][2]:
        assert (lookup["bytes_read"] == 0) is lookup["cache_hit"]
    assert any(lookup["cache_hit"] is False for lookup in told[1][2])


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "moe"), ("llama", "dense")])
def test_kinds(family, kind):
    from lookup_experts.serving.service import kind_of

    assert kind_of(tiny_model(family)) == kind


def test_the_page_comes_with_the_strictest_policy(refusing):
    response = refusing.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in policy
    for path in ("/", "/v1/models", "/nothing"):
        assert refusing.get(path).headers["x-content-type-options"] == "nosniff"


def test_the_openapi_document(refusing):
    document = refusing.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"),
        *("/v1/stats", "/health", "/metrics"),
    }
    operation = document["paths"]["/v1/completions"]["post"]["responses"]
    assert "422" not in operation
    assert operation["429"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")


def test_chat_templates_of_the_command_line(tmp_path, tokenizer):
    assert read_chat_template(None) is None
    assert read_chat_template("plain") == PLAIN_TEMPLATE
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert read_chat_template(str(tmp_path / "own.jinja")).startswith("{{")
    with pytest.raises(UserError, match="or plain"):
        read_chat_template(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="line 1"):
        check_chat_template(tokenizer, "{% for %}")
    check_chat_template(tokenizer, "{{ raise_exception('not you') }}")


def test_a_table_smaller_than_the_embedding_bounds_the_ids(table_folder):
    from lookup_experts.serving.prompts import vocab_size_of

    model = le.load(table_folder)
    assert vocab_size_of(model) == 97
    assert vocab_size_of(tiny_model("llama", vocab_size=101)) == 101
