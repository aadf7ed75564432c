"""Connections as clients, browsers and what lies between use them; threads and names."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from run_command import run_command
from served_here import served_here
from server_process import Server

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.serving.guard import ApiKeys
from lookup_experts.serving.threads import in_passing_thread, usable_cores

SITE = "https://example.org"
COMPLETIONS = "/v1/completions"


def connect(server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)


def ask(connection, **body) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": "the fox", **body}), headers)
    return connection.getresponse()


@pytest.fixture
def model(table_folder):
    return le.load(table_folder)


@pytest.fixture(scope="module")
def narrow(table_folder):
    """A server with one place."""
    options = ("--max-batch", 1, "--max-queue", 4, "--keep-alive", 2, "--cors-origin", SITE)
    with Server(table_folder, *options, "--model-name", "tiny/one", "--threads", 1) as running:
        yield running


# ------------------------------------------------------------------------------------- streams


def test_a_stream_begins_within_a_second_whatever_the_queue_is(model, tokenizer):
    """The batch is full for seconds."""
    with served_here(model, tokenizer) as (url, service):
        decode = service.engine._forward.decode
        service.engine._forward.decode = lambda *step: time.sleep(0.04) or decode(*step)
        address = url.removeprefix("http://")
        first = http.client.HTTPConnection(address, timeout=30)
        running = ask(first, max_tokens=100, n=4, stream=True)
        assert running.readline().startswith(b"data: ")
        started_at = time.monotonic()
        waiting = ask(http.client.HTTPConnection(address, timeout=30), max_tokens=2, stream=True)
        assert (waiting.status, waiting.readline()) == (200, b": waiting\n")
        assert time.monotonic() - started_at < 1.0
        assert service.engine.num_running == 4  # it still waits
        rest = waiting.read()
        assert time.monotonic() - started_at > 2.0
        assert rest.count(b"data: ") == 4 and rest.endswith(b"data: [DONE]\n\n")
        running.read()


def test_comments_come_while_nothing_else_does(make_client, monkeypatch):
    from lookup_experts.serving import calls

    monkeypatch.setattr(calls, "EARLY_SECONDS", 0.05)
    monkeypatch.setattr(calls, "SILENT_SECONDS", 0.1)
    client = make_client()
    decode = client.service.engine._forward.decode
    monkeypatch.setattr(
        client.service.engine._forward, "decode", lambda *step: time.sleep(0.35) or decode(*step)
    )
    prefill = client.service.engine._forward.prefill
    monkeypatch.setattr(
        client.service.engine._forward,
        "prefill",
        lambda *step, **how: time.sleep(0.35) or prefill(*step, **how),
    )
    body = {"prompt": "the", "max_tokens": 3, "temperature": 0}
    text = client.post(COMPLETIONS, json={**body, "stream": True}).text
    parts = text.split("\n\n")
    assert parts[0] == ": waiting" and parts.count(": waiting") >= 4
    chunks = [json.loads(part[len("data: ") :]) for part in parts if part.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    whole = client.post(COMPLETIONS, json=body).json()
    assert streamed == whole["choices"][0]["text"]


def test_errors_known_at_once_keep_their_status(narrow):
    for body, status in (
        ({"max_tokens": 1000}, 400),
        ({"model": "other"}, 404),
        ({"n": 6}, 400),
        ({"prompt": ""}, 400),
    ):
        response = ask(connect(narrow), **body, stream=True)
        assert response.status == status
        assert response.getheader("content-type") == "application/json"
    held = connect(narrow)
    running = ask(held, max_tokens=120, ignore_eos=True, n=5, stream=True)
    refused = ask(connect(narrow), n=2, stream=True)
    assert (refused.status, running.status) == (429, 200)
    running.read()


def test_an_error_after_a_silent_beginning_is_the_last_event(make_client, monkeypatch):
    from lookup_experts.serving import calls

    monkeypatch.setattr(calls, "EARLY_SECONDS", 0.02)
    client = make_client(seconds=0.3)
    prefill = client.service.engine._forward.prefill
    monkeypatch.setattr(
        client.service.engine._forward,
        "prefill",
        lambda *step, **how: time.sleep(0.4) or prefill(*step, **how),
    )
    response = client.post(COMPLETIONS, json={"prompt": "the", "stream": True, "max_tokens": 90})
    assert response.status_code == 200
    last = [part for part in response.text.split("\n\n") if part][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


# ------------------------------------------------------------------------------------- idleness


def test_an_idle_connection_lives_as_long_as_was_said(narrow, server):
    short, long = connect(narrow), connect(server)
    for connection in (short, long):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    time.sleep(6)
    long.request("GET", "/health")  # beyond uvicorn's own 5 seconds
    assert long.getresponse().status == 200
    assert long.sock is not None
    assert short.sock.recv(1) == b""  # closed by the server


# ------------------------------------------------------------------------------------- browsers


def test_pages_of_other_sites_may_use_the_api_where_that_was_said(make_client, tmp_path):
    (tmp_path / "keys").write_text("key\n")
    client = make_client(keys=ApiKeys(tmp_path / "keys"), origins=[SITE])
    preflight = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
    }
    response = client.options(COMPLETIONS, headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == SITE
    assert "authorization" in response.headers["access-control-allow-headers"]
    other = client.options(COMPLETIONS, headers={**preflight, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    asked = {"Origin": SITE, "Authorization": "Bearer key"}
    answer = client.post(COMPLETIONS, json={"prompt": "the"}, headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SITE
    refused = client.post(COMPLETIONS, json={"prompt": "the"}, headers={"Origin": SITE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == SITE  # or a page can't read it


def test_other_sites_are_not_let_in_otherwise(make_client):
    client = make_client()
    asked = {"Origin": SITE, "Access-Control-Request-Method": "POST"}
    assert client.options(COMPLETIONS, headers=asked).status_code == 405
    answer = client.get("/v1/models", headers=asked)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["example.org", "https://example.org/", "ftp://x", "https://", ""]
)
def test_origins_that_are_none(origin):
    from lookup_experts.commands.serve import check_origin

    with pytest.raises(UserError, match="scheme and host"):
        check_origin(origin)
    check_origin("*")
    check_origin("http://localhost:3000")


def test_head_where_get_is(narrow):
    paths = ("/", "/health", "/v1/models", "/v1/models/tiny/one", "/v1/stats", "/openapi.json")
    for path in (*paths, "/metrics", "/app.js"):
        connection = connect(narrow)
        connection.request("GET", path)
        got = connection.getresponse()
        got.read()
        connection.request("HEAD", path)
        head = connection.getresponse()
        assert (head.status, head.read()) == (200, b"")
        assert head.getheader("content-type") == got.getheader("content-type")
        connection.request("GET", "/health")  # the connection is in order
        assert connection.getresponse().status == 200
    for path, status in (("/nothing", 404), (COMPLETIONS, 405)):
        connection = connect(narrow)
        connection.request("HEAD", path)
        head = connection.getresponse()
        assert (head.status, head.read()) == (status, b"")


# --------------------------------------------------------------------------- names and threads


def test_a_model_goes_by_the_name_it_was_given(narrow):
    connection = connect(narrow)
    connection.request("GET", "/v1/models")
    assert json.load(connection.getresponse())["data"][0]["id"] == "tiny/one"
    response = ask(connect(narrow), model="tiny/one", max_tokens=1)
    assert json.load(response)["model"] == "tiny/one"


def test_options_that_can_not_be(table_folder):
    from lookup_experts.commands.serve import serve

    for options, words in (
        ({"threads": 0}, "--threads is 0"),
        ({"keep_alive": 0}, "--keep-alive is 0"),
        ({"model_name": " "}, "--model-name is empty"),
        ({"cors_origin": ["x"]}, "--cors-origin x"),
    ):
        with pytest.raises(UserError, match=words):
            serve(str(table_folder), **options)


def test_cores_are_those_of_the_container(tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n")
    folder = tmp_path / "cgroups" / "a" / "b"
    folder.mkdir(parents=True)
    cgroups, bound = tmp_path / "cgroups", len(os.sched_getaffinity(0))

    def cores() -> int:
        return usable_cores(cgroups, tmp_path / "own")

    assert cores() == bound
    (folder / "cpu.max").write_text("max 100000\n")
    assert cores() == bound
    (folder.parent / "cpu.max").write_text("50000 100000\n")
    assert cores() == 1
    (folder.parent / "cpu.max").write_text(f"{100000 * bound + 1} 100000\n")
    assert cores() == bound
    assert usable_cores(cgroups, tmp_path / "nowhere") == bound


_THREADS = """
import sys, time, resource
from lookup_experts.serving.threads import sleep_soon, use_threads
if sys.argv[1] == "soon":
    sleep_soon()
import torch
use_threads(2)
assert torch.get_num_threads() == 2
weights = torch.randn(2000, 2000)
for _ in range(3):
    weights @ weights
begin = time.process_time()
for _ in range(100):
    weights.add_(1)  # over all threads, and then nothing for a while
    time.sleep(0.005)
print(time.process_time() - begin)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_that_wait_take_no_time_from_others():
    """Counted in time of the processor, so that it doesn't matter who else is at work."""

    def seconds(how: str) -> float:
        code = [sys.executable, "-c", _THREADS, how]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP"))}
        done = subprocess.run(code, capture_output=True, text=True, check=True, env=clean)
        return float(done.stdout)

    spinning, soon = seconds("as torch does"), seconds("soon")
    assert soon < spinning / 1.5


def test_threads_are_as_many_as_was_said(run_python):
    code = (
        "import sys, torch\nfrom lookup_experts.serving.threads import use_threads\n"
        "use_threads(int(sys.argv[1]) or None)\nprint(torch.get_num_threads())"
    )
    assert run_python(code, 3)[1] == "3\n"
    assert 1 <= int(run_python(code, 0)[1]) <= usable_cores()


_HELPERS = """
import os, sys, time, torch
from lookup_experts.serving.threads import in_passing_thread
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
work = lambda: float(torch.ones(2**22).add_(1).sum())
before = count()
assert in_passing_thread(work) == 2**23
until = time.monotonic() + 20
while count() > before and time.monotonic() < until:  # they are told to end, and then do
    time.sleep(0.01)
passed = count()
work()
print(passed - before, count() - passed)
"""


def test_helpers_of_a_passing_thread_are_gone(run_python):
    """Those of a thread that stays, stay."""
    code, out, err = run_python(_HELPERS)
    assert (code, out) == (0, "0 1\n"), err


def test_a_passing_thread_hands_on_what_went_wrong():
    with pytest.raises(UserError, match="no such thing"):
        in_passing_thread(lambda: (_ for _ in ()).throw(UserError("no such thing")))


_INTERRUPTED = """
import sys, time, threading
from lookup_experts.serving.threads import in_passing_thread
def work():
    try:
        print("works", flush=True)
        while True:
            time.sleep(0.01)
    finally:
        print("tidied up", flush=True)
try:
    in_passing_thread(work)
except KeyboardInterrupt:
    print(threading.active_count())
"""


def test_ctrl_c_ends_the_work_of_a_passing_thread():
    command = [sys.executable, "-u", "-c", _INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest) == (0, "tidied up\n1\n")


def test_the_server_loads_in_a_passing_thread(table_folder, monkeypatch, capsys):
    threads = []

    def load(*arguments, **options):
        threads.append(threading.current_thread().name)
        raise UserError("It can't be had.")

    monkeypatch.setattr("lookup_experts.folders.load.load", load)
    code, _, err = run_command(capsys, "serve", table_folder, "--port", 0)
    assert (code, threads) == (2, ["passing"])
    assert err.strip().endswith("It can't be had.")
