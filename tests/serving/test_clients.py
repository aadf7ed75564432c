"""What people's programs do with the server: real clients, a real process, a model that writes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import chat_templates
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from server_process import Server
from server_tools import WEATHER
from tiny_tokenizers import writing_model, writing_tokenizer

openai = pytest.importorskip("openai", reason="the client tests need the openai package")

NAME = "tiny-writer"
ASKED = [{"role": "user", "content": "the fox"}]


class Animal(BaseModel):
    """An animal."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green"]
    age: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("writing") / "model"
    writing_model().save_pretrained(made)
    writing_tokenizer(chat_templates.HERMES).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def writer(folder) -> Iterator[Server]:
    with Server(folder, "--model-name", NAME, "--threads", 1, "--max-batch", 4) as running:
        yield running


@pytest.fixture(scope="module")
def client(writer):
    return openai.OpenAI(base_url=f"{writer.url}/v1", api_key="any", max_retries=0, timeout=60)


def is_of_weather(calls: list[tuple[str, dict]]) -> bool:
    return bool(calls) and all(
        name == "get_weather" and set(given) == {"city"} and len(given["city"]) <= 5
        for name, given in calls
    )


# -------------------------------------------------------------------------------------- openai


def test_openai_parses_an_answer_of_a_schema(client):
    answer = client.chat.completions.parse(model=NAME, messages=ASKED, response_format=Animal)
    assert isinstance(answer.choices[0].message.parsed, Animal)


def test_openai_calls_tools_whole_and_streamed_and_answers_them(client):
    body = {"model": NAME, "messages": ASKED, "tools": [WEATHER], "seed": 3, "max_tokens": 1000}
    must = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat.completions.create(**body, **must).choices[0]
    calls = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert is_of_weather([(one.function.name, json.loads(one.function.arguments)) for one in calls])
    with client.chat.completions.stream(**body, **must) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0].message
    assert [one.function.arguments for one in final.tool_calls] == [
        one.function.arguments for one in calls
    ]
    results = [
        {"role": "tool", "tool_call_id": one.id, "content": [{"type": "text", "text": "sunny"}]}
        for one in calls
    ]
    history = [*ASKED, answer.message.model_dump(), *results]
    after = client.chat.completions.create(**{**body, "messages": history, "max_tokens": 5})
    assert after.usage.prompt_tokens > client.chat.completions.create(**body).usage.prompt_tokens


def test_openai_log_probabilities_of_a_stream_join_to_the_text(client):
    body = {"model": NAME, "messages": ASKED, "max_tokens": 40, "seed": 1}
    chunks = list(client.chat.completions.create(**body, logprobs=True, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    joined = b"".join(bytes(entry.bytes) for part in told for entry in part.content)
    assert joined.decode(errors="replace") == text != ""


def test_openai_is_told_what_is_not_there(client):
    with pytest.raises(openai.NotFoundError, match="use /v1/chat/completions"):
        client.responses.create(model=NAME, input="x")
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is not supported"):
        client.chat.completions.create(model=NAME, messages=ASKED, reasoning_effort="high")


# ------------------------------------------------------------------------------ other programs


def test_langchain(writer):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not here")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    model = langchain.ChatOpenAI(
        base_url=f"{writer.url}/v1", api_key="any", model=NAME, max_retries=0, max_tokens=1000
    )
    greedy = model.bind(temperature=0, max_tokens=12)
    talk = [SystemMessage("be kind"), HumanMessage([{"type": "text", "text": "the fox"}])]
    whole = greedy.invoke(talk)
    assert whole.content == "".join(piece.content for piece in greedy.stream(talk))
    assert whole.usage_metadata["output_tokens"] == 12
    assert isinstance(model.with_structured_output(Animal).invoke("the fox"), Animal)
    by_call = model.with_structured_output(Animal, method="function_calling")
    assert isinstance(by_call.invoke("the fox"), Animal)
    # Drawn, a random model may begin a string that it never ends.
    closing = {"logit_bias": {"94": 30}, "temperature": 0}
    by_mode = model.bind(response_format={"type": "json_object"}, **closing)
    assert by_mode.invoke("the fox").content.lstrip().startswith("{")
    answer = model.bind_tools([WEATHER], tool_choice="any", parallel_tool_calls=False).invoke(talk)
    assert is_of_weather([(call["name"], call["args"]) for call in answer.tool_calls])
    results = [ToolMessage("sunny", tool_call_id=call["id"]) for call in answer.tool_calls]
    after = greedy.invoke([*talk, answer, *results])
    assert isinstance(after, AIMessage)
    assert after.usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]


@pytest.mark.filterwarnings("ignore")
def test_litellm(writer, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it fetches prices elsewise
    litellm = pytest.importorskip("litellm", reason="litellm is not here")
    common = {
        "model": f"openai/{NAME}",
        "api_base": f"{writer.url}/v1",
        "api_key": "any",
        "messages": ASKED,
        "num_retries": 0,
    }
    whole = litellm.completion(**common, max_tokens=12, temperature=0)
    pieces = litellm.completion(
        **common, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12
    called = litellm.completion(
        **common,
        max_tokens=1000,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    calls = called.choices[0].message.tool_calls
    assert is_of_weather([(one.function.name, json.loads(one.function.arguments)) for one in calls])
    formed = litellm.completion(**common, max_tokens=400, response_format=Animal)
    assert Animal.model_validate_json(formed.choices[0].message.content)
    marked = [{"type": "text", "text": "the", "cache_control": {"type": "ephemeral"}}]
    assert litellm.completion(
        **{**common, "messages": [{"role": "system", "content": marked}, *ASKED]}, max_tokens=1
    )
    with pytest.raises(litellm.BadRequestError, match="context is 2048"):
        litellm.completion(**common, max_tokens=100_000)


def test_llm(writer, tmp_path):
    pytest.importorskip("llm", reason="llm is not here")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mole\n  model_name: {NAME}\n  api_base: {writer.url}/v1\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            capture_output=True,
            timeout=100,
            check=False,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    options = ("-m", "mole", "--key", "any", "-o", "temperature", "0", "-o", "max_tokens", "12")
    streamed = run("the fox", *options)
    assert streamed.strip() and streamed == run("the fox", *options, "--no-stream")
    assert run("and now", *options, "-c", "-s", "be kind").strip()
    schema = json.dumps(Animal.model_json_schema())
    formed = run("the fox", "-m", "mole", "--key", "any", "--schema", schema)
    assert Animal.model_validate_json(formed)


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory) -> Path:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Node and npm are not here; the AI SDK is not tried")
    made = tmp_path_factory.mktemp("node")
    packages = ("ai@6", "@ai-sdk/openai-compatible@2", "zod@4")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *packages]
    try:
        subprocess.run(command, cwd=made, check=True, timeout=100, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm can't install the AI SDK here; it is not tried")
    shutil.copy(Path(__file__).with_name("clients.mjs"), made)
    return made


@pytest.mark.timeout(240)
def test_the_ai_sdk_of_node(writer, node_folder):
    done = subprocess.run(
        ["node", "clients.mjs", writer.url],
        cwd=node_folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] == told["streamed"] != ""
    assert told["tokens"] == 8
    assert Animal.model_validate(told["object"])
    assert told["calls"] == told["streamedCalls"]
    assert all(name == "weather" and len(given["city"]) <= 5 for name, given in told["calls"])
    assert told["reason"] == "tool-calls"
    assert "context is 2048" in told["refused"]


# -------------------------------------------------------------------------------------- lm-eval


def test_lm_eval_begins_as_the_tokenizer_does(tmp_path):
    """With `add_bos_token=True`, as docs/serving.md says."""
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity")
    api = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not here")
    from lm_eval.api.instance import Instance
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = writing_model(), writing_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with Server(tmp_path / "model") as server:
        remote = api.LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=server.name,
            tokenizer_backend="huggingface",
            tokenizer=str(tmp_path / "model"),
            max_length=2048,
            add_bos_token=True,
        )
        pair = ("the quick", " brown fox")
        ((value, _),) = remote.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    ids = tokenizer("the quick brown fox")["input_ids"]
    assert ids[0] == 1
    start = len(tokenizer("the quick")["input_ids"])
    scores = model(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
    expected = sum(float(scores[row, ids[row + 1]]) for row in range(start - 1, len(ids) - 1))
    assert value == pytest.approx(expected, abs=1e-3)
