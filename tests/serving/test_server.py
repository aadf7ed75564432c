"""The real server: its process, real clients, real disconnections, real damage."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch
from server_process import Server
from tiny_models import greedy_reference, token_ids

import lookup_experts as le

openai = pytest.importorskip("openai", reason="the client tests need the openai package")

SHARD = "table/table-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def model(table_folder):
    return le.load(table_folder)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30)


def stats(server) -> dict:
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/v1/stats", timeout=10) as response:
        return json.load(response)


def metric(server, name: str) -> float:
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def idle_within(server, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        told = stats(server)
        if told["running"] == told["waiting"] == 0:
            return True
        time.sleep(0.02)
    return False


def raw_request(server, body: dict) -> socket.socket:
    """A completion asked for over a plain socket, which the test can close at any time."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


# ------------------------------------------------------------------------------- real clients


def test_the_openai_client(server, client, model, tokenizer):
    assert client.models.list().data[0].id == client.models.retrieve(server.name).id == server.name
    arguments = {"model": server.name, "prompt": "the fox", "max_tokens": 20, "temperature": 0}
    ids = tokenizer("the fox")["input_ids"]
    expected = greedy_reference(model, torch.tensor([ids]), 20)[0].tolist()
    whole = client.completions.create(**arguments)
    assert whole.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    streamed = client.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    stopped = client.completions.create(**arguments, stop=[whole.choices[0].text[5:8]])
    assert stopped.choices[0].text == whole.choices[0].text[:5]
    two = client.completions.create(**{**arguments, "temperature": 1.5}, n=2, seed=1)
    again = client.completions.create(**{**arguments, "temperature": 1.5}, n=2, seed=1)
    assert [choice.text for choice in two.choices] == [choice.text for choice in again.choices]
    assert two.choices[0].text != two.choices[1].text
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(**{**arguments, "model": "other"})
    with pytest.raises(openai.BadRequestError, match="context is 128"):
        client.completions.create(**{**arguments, "max_tokens": 1000})


def test_the_openai_client_s_log_probabilities_are_those_of_generate(
    server, client, model, tokenizer
):
    ids = torch.tensor([tokenizer("once upon a time")["input_ids"]])
    with torch.no_grad():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    scores = model.compute_transition_scores(
        generated.sequences, generated.logits, normalize_logits=True
    )
    told = client.completions.create(
        model=server.name, prompt="once upon a time", max_tokens=10, temperature=0, logprobs=1
    ).choices[0]
    assert told.logprobs.token_logprobs == pytest.approx(scores[0].tolist(), abs=1e-4)


def test_the_openai_client_chats(server, client, model, tokenizer):
    arguments = {
        "model": server.name,
        "messages": [{"role": "user", "content": "the fox"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**arguments)
    streamed = client.chat.completions.create(**arguments, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12
    scored = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=1)
    streamed = client.chat.completions.create(**arguments, logprobs=True, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    ids = tokenizer("User: the fox\nAssistant:")["input_ids"]
    generated = greedy_reference(model, torch.tensor([ids]), 12)[0]
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(ids), generated])[None]).logits[0].float()
    rows = logits[len(ids) - 1 : -1].log_softmax(-1)
    expected = rows.gather(1, generated[:, None])[:, 0].tolist()
    told = [entry.logprob for entry in scored.choices[0].logprobs.content]
    assert told == pytest.approx(expected, abs=1e-4)
    told = [entry.logprob for part in parts if part is not None for entry in part.content]
    assert told == pytest.approx(expected, abs=1e-4)


def test_curl(server):
    done = subprocess.run(
        [
            *("curl", "-sS", f"{server.url}/v1/completions", "-H"),
            *("Content-Type: application/json", "-d"),
            json.dumps({"prompt": "the", "max_tokens": 3, "stream": True}),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == 5
    assert lines[-1] == "data: [DONE]"


def test_64_streams_of_mixed_lengths_each_get_what_they_would_get_alone(server, model):
    async def stream(client, place: int) -> list[int]:
        chunks = await client.completions.create(
            model=server.name,
            prompt=prompts[place],
            max_tokens=lengths[place],
            temperature=0,
            stream=True,
            extra_body={"lookup_details": True},
        )
        return [chunk.lookup["token_id"] async for chunk in chunks if hasattr(chunk, "lookup")]

    async def all_streams() -> list[list[int]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60
        ) as client:
            return await asyncio.gather(*(stream(client, place) for place in range(64)))

    prompts = [token_ids(1 + place * 7 % 60, seed=place).tolist() for place in range(64)]
    lengths = [1 + place * 11 % 24 for place in range(64)]
    streams = asyncio.run(all_streams())
    with torch.no_grad():
        for prompt, length, ids in zip(prompts, lengths, streams, strict=True):
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            assert ids == expected[0, len(prompt) :].tolist()


def test_lm_eval_s_local_completions(server, table_folder, tokenizer, model):
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity")
    api = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not here")
    from lm_eval.api.instance import Instance

    remote = api.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=server.name,
        tokenizer_backend="huggingface",
        tokenizer=str(table_folder),
        max_length=128,
    )
    pairs = [("the quick brown", " fox"), ("once upon a", " time there was")]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    for (context, continuation), (value, is_greedy) in zip(
        pairs, remote.loglikelihood(requests), strict=True
    ):
        ids = tokenizer(context + continuation)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        scores = model(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
        rows = range(start - 1, len(ids) - 1)
        expected = sum(float(scores[row, ids[row + 1]]) for row in rows)
        assert value == pytest.approx(expected, abs=1e-3)
        assert is_greedy == all(int(scores[row].argmax()) == ids[row + 1] for row in rows)
    arguments = ("the fox", {"until": ["\n"], "max_gen_toks": 6})
    text = remote.generate_until([Instance("generate_until", {}, arguments, 0)])[0]
    ids = torch.tensor([tokenizer("the fox")["input_ids"]])
    assert text == tokenizer.decode(greedy_reference(model, ids, 6)[0], skip_special_tokens=True)


# ------------------------------------------------------------------------------ under misuse


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_places(server, stream):
    before = metric(server, "mole_generated_tokens_total")
    connection = raw_request(
        server, {"prompt": "the fox", "max_tokens": 110, "n": 40, "stream": stream}
    )
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    else:
        while not stats(server)["running"]:
            time.sleep(0.01)
    connection.close()
    assert idle_within(server, 1.0)
    assert metric(server, "mole_generated_tokens_total") - before < 40 * 110 / 2


def test_a_full_queue_says_when_to_come_back(server, client):
    first = raw_request(server, {"prompt": "the fox", "max_tokens": 110, "n": 64, "stream": True})
    assert first.recv(100)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model=server.name, prompt="the fox", n=64)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    first.close()
    assert idle_within(server, 2.0)
    assert client.completions.create(model=server.name, prompt="the fox").choices[0].text


def test_a_disk_error_fails_the_request_and_the_server_lives_through_kill_and_term(
    table_folder, tmp_path
):
    folder = shutil.copytree(table_folder, tmp_path / "own")
    with Server(folder, "--store", "direct") as first:
        connection = raw_request(first, {"prompt": "the fox", "max_tokens": 100, "stream": True})
        assert connection.recv(100)
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        port = first.port
        connection.close()
    with Server(folder, "--store", "direct", port=port) as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="any", max_retries=0)
        low, high = [[3, 4, 5], [90, 91, 92]]
        healthy = (
            client.completions.create(model="own", prompt=low, max_tokens=1, temperature=0)
            .choices[0]
            .text
        )
        shard = folder / SHARD
        with shard.open("r+b") as opened:
            opened.truncate(4096 + 50 * 1536)
        with pytest.raises(openai.InternalServerError, match="record") as failed:
            client.completions.create(model="own", prompt=high, max_tokens=1)
        assert failed.value.status_code == 503
        assert metric(second, "mole_table_errors_total") == 1
        again = client.completions.create(model="own", prompt=low, max_tokens=1, temperature=0)
        assert again.choices[0].text == healthy
        assert stats(second)["running"] == 0
        shutil.copyfile(table_folder / SHARD, shard)  # into the file that the server has open
        repaired = client.completions.create(model="own", prompt=high, max_tokens=1)
        assert repaired.choices[0].finish_reason == "length"
        assert _finishes_what_runs(second, client, low)


def _finishes_what_runs(server, client, prompt) -> bool:
    """A stream that runs when SIGTERM comes is finished, and the server exits with 0."""
    chunks = client.completions.create(
        model=server.name, prompt=prompt, max_tokens=60, temperature=0, stream=True
    )
    next(chunks)
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(server.stop()))
    waiting.start()
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    waiting.join(40)
    return reasons[-1] == "length" and codes == [0] and "Stopped." in server.said


def test_what_does_not_finish_in_time_is_given_up(model, tokenizer):
    """The end that a signal asks for is bounded, also while a client is answered for ever."""
    from lookup_experts.serving.run import open_socket, serve
    from lookup_experts.serving.service import Service, ServiceOptions
    from lookup_experts.serving.waiting import Limits

    service = Service(model, tokenizer, ServiceOptions("tiny", Limits(1, 0)))
    decode = service.engine._forward.decode
    service.engine._forward.decode = lambda *step: time.sleep(0.1) or decode(*step)
    listening = open_socket("127.0.0.1", 0)
    port, ended = listening.getsockname()[1], []

    def ask_and_signal():
        body = json.dumps({"prompt": "the fox", "max_tokens": 110, "stream": True})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read(20)
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(http.client.IncompleteRead):  # cut off
            ended.append(b"[DONE]" in answer.read())

    asking = threading.Thread(target=ask_and_signal)
    asking.start()
    said = []
    serve(service, listening, None, said.append, grace_seconds=1)  # 110 steps would take 11 s
    asking.join(10)
    assert said[-1] == "Stopped."
    assert not asking.is_alive() and True not in ended
    assert not service.engine.is_alive


def test_the_server_says_what_it_can_not_do(table_folder, tmp_path):
    def refused(*options: object) -> str:
        from lookup_experts.commands.serve import serve
        from lookup_experts.errors import UserError

        with pytest.raises(UserError) as error:
            serve(str(table_folder), **dict(options))
        return str(error.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Can't listen on" in refused(("port", taken.getsockname()[1]))
    assert "Can't listen on nowhere.invalid" in refused(("host", "nowhere.invalid"))
    assert "--max-batch is 0" in refused(("max_batch", 0))
    assert "--timeout is 0" in refused(("timeout", 0))
    assert "--api-key-file" in refused(("api_key_file", tmp_path / "nowhere"))
    assert "--chat-template" in refused(("chat_template", str(tmp_path / "nowhere")))


def test_other_addresses_without_a_key_are_warned_of(make_client):
    from lookup_experts.serving.run import warning_for

    assert warning_for("127.0.0.1", None) is None
    assert warning_for("::1", None) is None
    assert "--api-key-file" in warning_for("0.0.0.0", None)
    assert "--api-key-file" in warning_for("::", None)
    assert warning_for("0.0.0.0", object()) is None
