"""Serving: `mole serve` in a process of its own, loaded by concurrent streams of OpenAI's client;
dense and MoLE from disk in turn on the same machine, or MoLE alone under steady load."""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lookup_experts import console
from lookup_experts.benchmarks.models import (
    FINGERPRINT,
    Case,
    dense_model,
    random_table,
    table_model,
)
from lookup_experts.benchmarks.plots import draw_bars
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import id_stream
from lookup_experts.benchmarks.timing import Advance, median, pair_ratios, percentile, rotated
from lookup_experts.errors import UserError
from lookup_experts.generation.folding import save_without_experts
from lookup_experts.table.format import Table

MOST_PROMPTS = 512
REQUEST_SECONDS = 300.0
SAMPLE_SECONDS = 5.0
WARM_UP_SHARE = 0.2
"""Of a soak; the memory after it is compared with that to its end."""
_COMMAND = "from lookup_experts.cli import main; main()"


def bench_serve(
    case: Case,
    reading: Sequence[str],
    device: str,
    streams: Sequence[int],
    rounds: int,
    prompt: int,
    tokens: int,
    soak: float,
    ids: Path | None,
    work: Path,
    results: Results,
) -> None:
    """`mole bench serve`.

    Args:
        case: the models.
        reading: options of `mole serve` that say how the table is read.
        device: where the models run.
        streams: numbers of requests at once.
        rounds: loads of each system, in turn.
        prompt, tokens: of each request, and to generate for it.
        soak: minutes of steady load on MoLE instead.
        ids: see `id_stream`.
        work: where table and folders are kept.
    """
    console.quiet_transformers()
    with console.progress_bar("Writing a table") as progress:
        table = random_table(case, work, progress)
    text = id_stream(ids, case.layout.shape.vocab_size, work)
    if len(text) <= prompt:
        raise UserError(f"--ids has {len(text)} ids; a prompt of {prompt} needs more.")
    starts = range(0, len(text) - prompt, max(1, (len(text) - prompt) // MOST_PROMPTS))
    prompts = [text[start : start + prompt].tolist() for start in starts]
    folders = save_folders(case, table, work)
    options = {"dense": (), "mole": reading}
    common = ("--device", device, "--max-batch", max(streams))
    with ExitStack() as stack:
        clients = {}
        for name in ("mole",) if soak else ("dense", "mole"):
            server = stack.enter_context(ServerProcess(folders[name], *options[name], *common))
            clients[name] = Client(server, prompts, tokens)
        with console.progress_bar("Serving") as progress:
            if soak:
                steady = measure_soak("mole", clients["mole"], max(streams), soak, progress)
                found = [asyncio.run(steady)]
            else:
                found = asyncio.run(measure_streams(clients, streams, rounds, progress))
    results.add(*(result | {"dtype": case.dtype_name} for result in found))
    results.finish(draw)


# ------------------------------------------------------------------------------------ servers


def save_folders(case: Case, table: Table, work: Path) -> dict[str, Path]:
    """A folder for each system, by name, written anew; the table stays where it is.

    Args:
        case: the shape and the number of experts.
        table: of the case.
        work: where the folders go.
    """
    folders = {name: work / "serve" / f"{case.name}-{name}" for name in ("dense", "mole")}
    models = {"dense": dense_model(case), "mole": table_model(case, table, "direct")}
    for name, folder in folders.items():
        model = models[name]
        # Random weights would end some texts early, and the systems' at different places.
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        if name == "mole":
            save_without_experts(model, folder, FINGERPRINT)
            link = folder / "table"
            link.unlink(missing_ok=True)
            link.symlink_to(table.folder.resolve())
        else:
            model.save_pretrained(folder)
        counting_tokenizer(case.layout.shape.vocab_size).save_pretrained(folder)
    return folders


def counting_tokenizer(vocab_size: int) -> Any:
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


class ServerProcess:
    """A running server, ready when this returns; ends with the `with` block.

    Args:
        folder: of the model.
        options: of `mole serve`.

    Raises:
        UserError: it did not start.
    """

    def __init__(self, folder: Path, *options: object) -> None:
        words = ["serve", str(folder), "--port", "0", *map(str, options)]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _COMMAND, *words],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        said = ""
        for line in self._process.stderr:
            said += line
            if match := re.search(r"Serving (\S+) at (http://\S+)", line):
                self.model, self.url = match[1], match[2]
                return
        self._process.wait()
        raise UserError(f"mole serve did not start: {said.strip() or 'it said nothing'}")

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


# ------------------------------------------------------------------------------------ clients


@dataclass
class Stream:
    """One request: when it was sent and when its tokens came, in `time.perf_counter()`."""

    sent_at: float
    token_times: list[float] = field(default_factory=list)
    complete: bool = False
    error: str | None = None


@dataclass
class Load:
    """What a server gave."""

    streams: list[Stream]
    seconds: float
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, resident bytes of the server."""

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return sum(len(stream.token_times) for stream in self.streams) / self.seconds


class Client:
    """Sends requests of a fixed size to one server.

    Args:
        server: the server.
        prompts: token ids of prompts, taken in turn.
        tokens: to generate for each.

    Raises:
        UserError: openai is not installed.
    """

    def __init__(self, server: ServerProcess, prompts: Sequence[list[int]], tokens: int) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "mole bench serve loads the server with OpenAI's client: pip install openai."
            ) from error
        self._client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_SECONDS,
        )
        self._model, self._prompts, self._tokens = server.model, prompts, tokens
        self._next = 0

    async def load_once(self, streams: int) -> Load:
        """So many requests at once, until all have ended."""
        started_at = time.perf_counter()
        done = await asyncio.gather(*(self._next_request() for _ in range(streams)))
        return Load(list(done), time.perf_counter() - started_at)

    async def send_all_prompts(self, streams: int, progress: Advance) -> None:
        """Each prompt once, so many at a time, for a single token.

        Raises:
            UserError: one of them failed.
        """
        prompts = iter(enumerate(self._prompts))

        async def work() -> None:
            for number, prompt in prompts:
                progress(number, len(self._prompts))
                stream = await self._request(prompt, 1)
                if stream.error:
                    raise UserError(f"A request before the soak failed: {stream.error}")

        await asyncio.gather(*(work() for _ in range(streams)))

    async def soak(self, streams: int, seconds: float, progress: Advance) -> Load:
        """So many requests at all times for so long; the server's memory is sampled meanwhile."""
        started_at = time.perf_counter()
        load = Load([], 0.0)

        def elapsed() -> float:
            return time.perf_counter() - started_at

        async def work() -> None:
            while elapsed() < seconds:
                load.streams.append(await self._next_request())

        async def watch() -> None:
            while elapsed() < seconds:
                load.memory.append((elapsed(), await self._resident_bytes()))
                progress(int(elapsed()), int(seconds))
                await asyncio.sleep(min(SAMPLE_SECONDS, seconds / 10))

        await asyncio.gather(watch(), *(work() for _ in range(streams)))
        load.seconds = elapsed()
        load.memory.append((load.seconds, await self._resident_bytes()))
        return load

    async def _resident_bytes(self) -> int:
        told: Any = await self._client.get("/stats", cast_to=object)
        return int(told["resident_bytes"])

    async def _next_request(self) -> Stream:
        prompt = self._prompts[self._next % len(self._prompts)]
        self._next += 1
        return await self._request(prompt, self._tokens)

    async def _request(self, prompt: list[int], tokens: int) -> Stream:
        stream = Stream(time.perf_counter())
        ended = False
        try:
            chunks = await self._client.completions.create(
                model=self._model,
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                stream=True,
            )
            async for chunk in chunks:
                if chunk.choices[0].finish_reason is None:
                    stream.token_times.append(time.perf_counter())
                else:
                    ended = True
        except Exception as error:  # of the client, or of what it is built on: the request is lost
            stream.error = f"{type(error).__name__}: {error}"
            return stream
        stream.complete = ended and len(stream.token_times) == tokens
        return stream


# ------------------------------------------------------------------------------------ figures


async def measure_streams(
    clients: Mapping[str, Client], counts: Sequence[int], rounds: int, progress: Advance
) -> list[Result]:
    """For each number of streams: rounds in which each system is loaded once, the other idle.

    Args:
        clients: by system; `dense` is what the others are compared with.
        counts: numbers of concurrent streams.
        rounds: measured for each number, after one that isn't.
        progress: told how many loads are done.
    """
    results: list[Result] = []
    done, total = 0, len(counts) * (rounds + 1) * len(clients)
    names = list(clients)
    for streams in counts:
        loads: dict[str, list[Load]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in rotated(names, number):
                loads[name].append(await clients[name].load_once(streams))
                done += 1
                progress(done, total)
        measured = {name: found[1:] for name, found in loads.items()}
        dense = [load.tokens_per_second for load in measured["dense"]]
        for name, found in measured.items():
            speeds = [load.tokens_per_second for load in found]
            requests = [stream for load in found for stream in load.streams]
            results.append(
                {
                    "system": name,
                    "streams": streams,
                    "tokens_per_second": median(speeds),
                    "ratio_to_dense": median(pair_ratios(speeds, dense)),
                    **_latencies(requests),
                    **_losses(requests),
                }
            )
    return results


async def measure_soak(
    name: str, client: Client, streams: int, minutes: float, progress: Advance
) -> Result:
    """One system under steady load: requests lost, growth of memory, drift of latency.

    It has seen every prompt before, so what the first requests of each kind take is there.
    """
    await client.send_all_prompts(streams, progress)
    load = await client.soak(streams, minutes * 60, progress)
    steady = [used for at, used in load.memory if at >= WARM_UP_SHARE * load.seconds]
    middle = len(load.streams) // 2
    return {
        "system": name,
        "streams": streams,
        "soak_minutes": load.seconds / 60,
        "tokens_per_second": load.tokens_per_second,
        **_latencies(load.streams),
        "inter_token_ms_p95_halves": [
            _latencies(half)["inter_token_ms"]["p95"]
            for half in (load.streams[:middle], load.streams[middle:])
        ],
        **_losses(load.streams),
        "resident_bytes_after_warm_up": steady[0],
        "resident_bytes_at_end": steady[-1],
        "resident_bytes_change": max(abs(used / steady[0] - 1) for used in steady),
        "resident_bytes_over_time": [[round(at, 1), used] for at, used in load.memory],
    }


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
        "mole serve, OpenAI's client",
        "tokens per second",
        [f"{result['system']}\n{result['streams']} streams" for result in results],
        [result["tokens_per_second"] for result in results],
    )
