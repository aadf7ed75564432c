"""Serving: `mole serve` in a process of its own, loaded by concurrent streams; dense and MoLE in
turn on the same machine, or MoLE alone under steady load.

The client is a few lines over a socket: OpenAI's own takes longer for each token than a GPU does
for those of all streams, and would be what is measured. That it understands the server is a matter
of tests.
"""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lookup_experts import console
from lookup_experts.benchmarks.models import (
    FINGERPRINT,
    Case,
    dense_model,
    random_table,
    table_model,
)
from lookup_experts.benchmarks.peers import Generating, measured_generating
from lookup_experts.benchmarks.plots import draw_bars
from lookup_experts.benchmarks.processes import proportional_set_size_of_family
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import id_stream
from lookup_experts.benchmarks.timing import Advance, median, pair_ratios, percentile, rotated
from lookup_experts.benchmarks.vllm_server import vllm_server
from lookup_experts.errors import UserError
from lookup_experts.generation.folding import save_without_experts
from lookup_experts.table.opening import Table

MOST_PROMPTS = 512
REQUEST_SECONDS = 300.0
SAMPLE_SECONDS = 5.0
EAGER = " eager"
"""Behind a system's name: without CUDA graphs."""
IN_VLLM = " in vLLM"
"""Behind a system's name: vLLM's server, and not `mole serve`."""
TABLES = "tables"
"""The system of one backbone with several tables; requests ask for one after the other."""
WARM_UP_SHARE = 0.2
"""Of a soak; the memory after it is compared with that to its end."""


def bench_serve(
    case: Case,
    options: Mapping[str, Sequence[object]],
    streams: Sequence[int],
    rounds: int,
    prompt: int,
    tokens: int,
    soak: float,
    ids: Path | None,
    work: Path,
    results: Results,
    peers: Sequence[Generating] = (),
    num_tables: int = 1,
) -> None:
    """`mole bench serve`: each number of streams of requests, of `prompt` tokens that `tokens` are
    generated for; or with `soak`, the largest for so many minutes.

    Args:
        options: of `mole serve`, for each system that is measured: `dense`, `mole`, and with
            `EAGER` behind the name the same without CUDA graphs; with `IN_VLLM` behind it, of
            vLLM's server.
        rounds: loads of each system, in turn.
        peers: measured before the servers start, on the dense model.
        num_tables: of the system `TABLES`, each as large as that of `mole`, in files of their own.
    """

    def add(*found: Result) -> None:
        results.add(*(result | {"dtype": case.dtype_name} for result in found))

    add(*measured_generating(peers, streams, prompt, tokens))
    with (
        loaded(case, options, prompt, tokens, ids, work, num_tables) as clients,
        console.progress_bar("Serving") as progress,
    ):
        if soak:
            (name,) = clients
            add(asyncio.run(_soak(name, clients[name], max(streams), soak, progress)))
        else:
            asyncio.run(take_turns(clients, streams, rounds, progress, add))
    results.finish(draw)


@contextmanager
def loaded(
    case: Case,
    options: Mapping[str, Sequence[object]],
    prompt: int,
    tokens: int,
    ids: Path | None,
    work: Path,
    num_tables: int = 1,
) -> Iterator[dict[str, "Client"]]:
    """A running server of each system and its client; see `bench_serve`."""
    console.quiet_transformers()
    table = random_table(case, work)
    text = id_stream(ids, case.layout.shape.vocab_size, work)
    if len(text) <= prompt:
        raise UserError(f"--ids has {len(text)} ids; a prompt of {prompt} needs more.")
    starts = range(0, len(text) - prompt, max(1, (len(text) - prompt) // MOST_PROMPTS))
    prompts = [text[start : start + prompt].tolist() for start in starts]
    with ExitStack() as servers:
        clients = {}
        kinds = sorted({name.partition(" ")[0] for name in options} - {TABLES})
        folders = {kind: save_folder(kind, case, table, work) for kind in kinds}
        several: dict[str, Path] = {}
        if TABLES in options:
            several = save_tables(case, num_tables, work)
            folders[TABLES] = folders["dense"]
            given = [f"--table={name}={folder}" for name, folder in several.items()]
            options = {**options, TABLES: (*given, *options[TABLES])}
        started: dict[str, tuple[subprocess.Popen[Any], Callable[[], tuple[str, str, str]]]] = {}
        for name, words in options.items():
            server: Any = vllm_server if name.endswith(IN_VLLM) else _server
            started[name] = servers.enter_context(server(folders[name.partition(" ")[0]], *words))
        for name, (process, wait) in started.items():  # all of them start at once
            model, url, said = wait()
            for warning in re.findall(r"Steps run without .*", said):
                console.say(f"{name}: {warning}")
            asked = [f"{model}:{table}" for table in several] if name == TABLES else [model]
            clients[name] = Client(asked, url, prompts, tokens, process.pid)
        yield clients


# ------------------------------------------------------------------------------------ servers


def save_folder(system: str, case: Case, table: Table, work: Path) -> Path:
    """A folder that `mole serve` takes, of `dense` or `mole`, written anew; the table stays where
    it is."""
    folder = work / "serve" / f"{case.name}-{system}"
    model = dense_model(case) if system == "dense" else table_model(case, table, "direct")
    # Random weights would end some texts early, and the systems' at different places.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    if system == "dense":
        model.save_pretrained(folder)
    else:
        save_without_experts(model, folder, FINGERPRINT)
        link = folder / "table"
        link.unlink(missing_ok=True)
        link.symlink_to(table.folder.resolve())
    _counting_tokenizer(case.layout.shape.vocab_size).save_pretrained(folder)
    return folder


def save_tables(case: Case, number: int, work: Path) -> dict[str, Path]:
    """Folders with tables for the backbone in the folder of `dense`: name -> folder."""
    names = [f"t{place + 1}" for place in range(number)]
    return {
        name: save_folder("mole", case, random_table(case, work / name), work / name)
        for name in names
    }


def _counting_tokenizer(vocab_size: int) -> Any:
    """A text for every id: the bytes, then a made-up word for each further id.

    Prompts are sent as ids, so it only turns what is generated into text of a usual length.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"Ġ{number}" for number in range(max(0, vocab_size - len(letters)))]
    vocabulary = {word: number for number, word in enumerate(words[:vocab_size])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@contextmanager
def _server(
    folder: Path, *options: object
) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], tuple[str, str, str]]]]:
    """As `vllm_server`, of `mole serve`."""
    program = (sys.executable, "-u", "-c", "from lookup_experts.cli import main; main()")
    process = subprocess.Popen(
        [*program, "serve", str(folder), "--port", "0", *map(str, options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process, partial(_when_it_serves, process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _when_it_serves(process: "subprocess.Popen[str]") -> tuple[str, str, str]:
    """The model's name, its address, and all that was said before."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if match := re.search(r"Serving (\S+) at (http://\S+)", line):
            return match[1], match[2], said
    raise UserError(f"mole serve did not start: {said.strip() or 'it said nothing'}")


# ------------------------------------------------------------------------------------ clients


@dataclass
class Stream:
    """One request: when it was sent and when its tokens came, in `time.perf_counter()`."""

    sent_at: float
    token_times: list[float] = field(default_factory=list)
    """Of pieces: vLLM may send several tokens in one."""
    num_tokens: int = 0
    """As the server counts them."""
    complete: bool = False
    error: str | None = None


class Client:
    """Sends requests of a fixed size to one server, the prompts in turn.

    Tokens are drawn: with random weights the likeliest soon repeat, and nothing would be read.

    Args:
        models: the served names that are asked for in turn.
        url: the server's, `http://host:port`.
        prompts: token ids of each.
        tokens: that are generated after each.
        process: the server's, by its number, where it is one of this machine.
    """

    def __init__(
        self,
        models: Sequence[str],
        url: str,
        prompts: Sequence[list[int]],
        tokens: int,
        process: int | None = None,
    ) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self.prompts = prompts
        self.process = process
        self._tokens = tokens
        self._models, self._in_turn = itertools.cycle(models), itertools.cycle(prompts)

    async def resident_bytes(self) -> int:
        """Of the server."""
        async with self._answer("GET", "/v1/stats") as lines:
            told = [line async for line in lines if line.startswith(b"{")]
        return int(json.loads(told[0])["resident_bytes"])

    async def request(self, prompt: list[int] | None = None, tokens: int | None = None) -> Stream:
        """Generate after the next prompt as many tokens as are usual, or as it is said."""
        body = {
            "model": next(self._models),
            "prompt": prompt or next(self._in_turn),
            "max_tokens": tokens or self._tokens,
            "temperature": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream, ended = Stream(time.perf_counter()), False
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                async with self._answer("POST", "/v1/completions", body) as lines:
                    async for line in lines:
                        if not line.startswith(b"data: {"):  # the size of a chunk, or blank
                            continue
                        event = json.loads(line[len(b"data: ") :])
                        if "error" in event:
                            raise UserError(event["error"]["message"])
                        for choice in event["choices"]:
                            ended = choice["finish_reason"] is not None
                            if not ended or choice["text"]:
                                stream.token_times.append(time.perf_counter())
                        if event.get("usage"):
                            stream.num_tokens = event["usage"]["completion_tokens"]
        except (OSError, EOFError, ValueError, UserError) as error:  # the request is lost
            stream.error = f"{type(error).__name__}: {error}"
            return stream
        stream.complete = ended and stream.num_tokens == (tokens or self._tokens)
        return stream

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Any = None
    ) -> AsyncIterator[asyncio.StreamReader]:
        """The lines of an answer, its head read.

        Raises:
            OSError, EOFError, ValueError: the connection failed, or the request.
        """
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            content = b"" if body is None else json.dumps(body).encode()
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            writer.write(head.encode() + content)
            status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode()
            if " 200 " not in status:
                raise ValueError(f"{status}: {(await reader.read()).decode(errors='replace')}")
            yield reader
        finally:
            writer.close()


# ------------------------------------------------------------------------------------ figures


async def take_turns(
    clients: Mapping[str, Client],
    counts: Sequence[int],
    rounds: int,
    progress: Advance,
    add: Callable[..., None],
) -> None:
    """For each number of streams: a round that isn't counted, and rounds in which each system is
    loaded once, the others idle.

    Each system's result is given to `add`. `ratio_to_dense` of tokens per second is to the dense
    system served alike, `ratio_to_eager` to the same one without CUDA graphs, `ratio_to_mole` of
    several tables to one. `resident_bytes` is the memory of the server's processes after the last
    round, `beyond_dense_bytes` more than that of dense.
    """

    def held(name: str) -> Result:
        process, dense = clients[name].process, clients.get(beside(name))
        if process is None or dense is None or dense.process is None:
            return {}
        memory = proportional_set_size_of_family(process)
        beyond = memory - proportional_set_size_of_family(dense.process)
        return {"resident_bytes": memory, "beyond_dense_bytes": beyond}

    def beside(name: str) -> str:
        return "dense" if name == TABLES else name.replace("mole", "dense")

    done, total = 0, len(counts) * (rounds + 1) * len(clients)
    for streams in counts:
        requests: dict[str, list[Stream]] = {name: [] for name in clients}
        speeds: dict[str, list[float]] = {name: [] for name in clients}
        for number in range(rounds + 1):
            for name in rotated(list(clients), number):
                started_at = time.perf_counter()
                load = await asyncio.gather(*(clients[name].request() for _ in range(streams)))
                if number > 0:
                    requests[name] += load
                    speeds[name].append(_num_tokens(load) / (time.perf_counter() - started_at))
                done += 1
                progress(done, total)
        for name in clients:
            result: Result = {
                "system": name,
                "streams": streams,
                "tokens_per_second": median(speeds[name]),
            }
            others = {"ratio_to_dense": beside(name), "ratio_to_eager": f"{name}{EAGER}"}
            if name == TABLES:
                others["ratio_to_mole"] = "mole"
            for key, other in others.items():
                if other in speeds:
                    result[key] = median(pair_ratios(speeds[name], speeds[other]))
            add(result | _latencies(requests[name]) | _losses(requests[name]) | held(name))


async def _soak(
    name: str, client: Client, streams: int, minutes: float, progress: Advance
) -> Result:
    """One system under steady load: requests lost, growth of memory, drift of latency.

    It has seen every prompt before, so what the first requests of each kind take is there.
    """
    prompts = iter(enumerate(client.prompts))
    requests: list[Stream] = []
    memory: list[tuple[float, int]] = []

    async def send_prompts() -> None:
        for number, prompt in prompts:
            progress(number, len(client.prompts))
            stream = await client.request(prompt, tokens=1)
            if stream.error:
                raise UserError(f"A request before the soak failed: {stream.error}")

    await asyncio.gather(*(send_prompts() for _ in range(streams)))
    started_at, seconds = time.perf_counter(), minutes * 60

    def elapsed() -> float:
        return time.perf_counter() - started_at

    async def load() -> None:
        while elapsed() < seconds:
            requests.append(await client.request())

    async def watch() -> None:
        while elapsed() < seconds:
            memory.append((elapsed(), await client.resident_bytes()))
            progress(int(elapsed()), int(seconds))
            await asyncio.sleep(min(SAMPLE_SECONDS, seconds / 10))

    await asyncio.gather(watch(), *(load() for _ in range(streams)))
    seconds = elapsed()
    memory.append((seconds, await client.resident_bytes()))
    steady = [used for at, used in memory if at >= WARM_UP_SHARE * seconds]
    middle = len(requests) // 2
    return {
        "system": name,
        "streams": streams,
        "soak_minutes": seconds / 60,
        "tokens_per_second": _num_tokens(requests) / seconds,
        **_latencies(requests),
        "inter_token_ms_p95_halves": [
            _latencies(half)["inter_token_ms"]["p95"]
            for half in (requests[:middle], requests[middle:])
        ],
        **_losses(requests),
        "resident_bytes_after_warm_up": steady[0],
        "resident_bytes_at_end": steady[-1],
        "resident_bytes_change": max(abs(used / steady[0] - 1) for used in steady),
        "resident_bytes_over_time": [[round(at, 1), used] for at, used in memory],
    }


def _num_tokens(streams: Sequence[Stream]) -> int:
    return sum(stream.num_tokens for stream in streams)


def _losses(streams: Sequence[Stream]) -> Result:
    """How many requests there were, how many did not give all their tokens, and why."""
    return {
        "requests": len(streams),
        "lost": sum(not stream.complete for stream in streams),
        "errors": sorted({stream.error for stream in streams if stream.error}),
    }


def _latencies(streams: Sequence[Stream]) -> Result:
    """Milliseconds to the first token, and between tokens; None where no token came."""
    first = [stream.token_times[0] - stream.sent_at for stream in streams if stream.token_times]
    between = [
        later - earlier for stream in streams for earlier, later in pairwise(stream.token_times)
    ]
    return {"ttft_ms": _p50_p95(first), "inter_token_ms": _p50_p95(between)}


def _p50_p95(seconds: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    return {
        name: percentile(ordered, share) * 1e3 if ordered else None
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }


def draw(results: list[Result], path: Path) -> None:
    """Tokens per second of each system, by the number of streams."""
    draw_bars(
        path,
        "mole serve",
        "tokens per second",
        [f"{result['system']}\n{result['streams']} streams" for result in results],
        [result["tokens_per_second"] for result in results],
    )
